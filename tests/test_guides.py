"""The tutorials and how-to pages run as they stand, but for the name of the model: blocks in the order of the page, in one
folder. Files are those with a title, and `# → text` in Python says what is printed."""

import contextlib
import importlib.util
import inspect
import io
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

for package in ("transformers", "accelerate", "datasets", "peft", "typer", "yaml", "pandas"):
    pytest.importorskip(package)
import yaml
from transformers import TrainingArguments

from larpo import LarPOConfig
from larpo.align import AlignConfig
from larpo.cli import app
from larpo.commands import ScoreJob, TrainJob
from larpo.runs.settings import settings_of
from tests.helpers.align_runs import model_folder

ROOT = Path(__file__).resolve().parents[1]
PAGES = [page for folder in ("tutorials", "how-to") for page in sorted((ROOT / "docs" / folder).glob("*.md"))]
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]  # whose examples need models and data of a user
SETTINGS = {"train": [TrainJob, LarPOConfig], "data": [TrainJob, LarPOConfig], "score": [ScoreJob], "align": [AlignConfig]}
OPTIONS = {"config", "status", "limit", "html", "json", "all"}
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
BLOCK = re.compile(r'(?:<!-- (.*?) -->\n\n)?^```(\w+)(?: title="(.*?)")?\n(.*?)^```$', re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_a_guide_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    scope = {"__name__": "guide"}
    blocks = BLOCK.findall(page.read_text(encoding="utf-8").replace(HUB_NAME, model_folder()))
    assert blocks
    for note, language, title, text in blocks:
        needed = note.removeprefix("needs ") if note.startswith("needs ") else None
        if note.startswith("not run") or (needed and importlib.util.find_spec(needed) is None):
            continue
        if title:
            Path(title).write_text(text, encoding="utf-8")
        elif language == "python":
            _run_python(text, scope)
        elif language == "yaml":
            _check_yaml(text)
        else:
            assert language == "bash"
            for line in text.replace("\\\n", " ").splitlines():
                _run_command(shlex.split(line, comments=True))


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_settings_and_flags_in_examples_exist(page):
    blocks = [(language, text) for _, language, _, text in BLOCK.findall(page.read_text(encoding="utf-8"))]
    for text in (text for language, text in blocks if language == "yaml"):
        _check_yaml(text)
    commands = "".join(text.replace("\\\n", " ") for language, text in blocks if language == "bash")
    for command, rest in re.findall(r"\blarpo(?:\.cli)? (\w+)(.*)", commands):
        known = OPTIONS | set(settings_of(SETTINGS.get(command, [])))
        for flag in re.findall(r"(?<=--)[\w.-]+", rest.partition(" #")[0]):
            group, _, inner = flag.replace("-", "_").partition(".")
            assert group in known, flag
            assert not inner or (group == "training" and inner in settings_of([LarPOConfig])), flag


def _check_yaml(text):
    named = yaml.safe_load(text)
    assert any(set(named) <= set(settings_of(kinds)) for kinds in SETTINGS.values()), named
    assert set(named.get("training", {})) <= set(settings_of([LarPOConfig]))


def _run_python(text, scope):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(text, "guide", "exec"), scope)
    rest = printed.getvalue().splitlines()
    for line in re.findall(r"# → (.*)", text):
        assert line in rest, f"{line!r} is not among {rest}"
        rest = rest[rest.index(line) + 1 :]


def _run_command(words):
    """`larpo ...`, or what `accelerate launch` would start, in this process."""
    if words[:2] == ["accelerate", "launch"]:
        launch, words = words[: words.index("larpo.cli")], words[words.index("larpo.cli") :]
        if "--config_file" in launch:
            assert (ROOT / launch[launch.index("--config_file") + 1]).exists()
    assert words[0] in ("larpo", "larpo.cli")
    app(words[1:], standalone_mode=False)


def test_the_tables_of_trl_have_all_of_its_names():
    """Both directions: what TRL has is in the left column, and what stands for it is a setting of ours."""
    page = (ROOT / "docs/tutorials/from-dpo-trainer.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|$", page.partition("### The settings")[2], re.M)
    ours = {one.name for one in fields(LarPOConfig)}
    assert {name for _, said in rows for name in re.findall(r"`(\w+)=", said)} <= ours
    theirs = {name for named, _ in rows for name in re.findall(r"`(\w+)`", named)}
    trl = pytest.importorskip("trl")
    inherited = {one.name for one in fields(TrainingArguments)}
    assert {one.name for one in fields(trl.DPOConfig)} - inherited <= theirs
    arguments = set(inspect.signature(trl.DPOTrainer).parameters)
    rows = re.findall(r"^\| (`.*?) \| ", page.partition("### The trainer")[2].partition("### The settings")[0], re.M)
    assert arguments <= {name for named in rows for name in re.findall(r"`(\w+)`", named)}

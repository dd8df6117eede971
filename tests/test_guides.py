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
from tests.helpers.align_runs import model_folder

ROOT = Path(__file__).resolve().parents[1]
PAGES = [page for folder in ("tutorials", "how-to") for page in sorted((ROOT / "docs" / folder).glob("*.md"))]
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
            assert set(yaml.safe_load(text)) <= {one.name for one in fields(AlignConfig)}
        else:
            assert language == "bash"
            for line in text.replace("\\\n", " ").splitlines():
                _run_command(shlex.split(line, comments=True))


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

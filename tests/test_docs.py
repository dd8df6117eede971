"""What README and docs state about the tree and about recorded results is so."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
AMD, INTEL = "amd-epyc-2-threads-avx2", "intel-r-xeon-r-processor-1-threads-amx-bf16"
H100 = "nvidia-h100-80gb-hbm3"
RESULTS = (  # in the order of the tables
    *(f"{AMD}/{name}" for name in ("quick", "quick-trainable", "linear", "linear-T2048-H896-V32000", "prefix")),
    *(f"{INTEL}/{name}" for name in ("small-before", "small")),
    *(f"{H100}/{name}" for name in ("suites", "results")),
    "intel-r-xeon-r-processor-2-threads-amx-bf16/trainer",
)
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
BY_NAME = [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in PAGES]


@pytest.mark.parametrize("page", BY_NAME)
def test_tables_of_measurements_are_those_of_the_recorded_results(page):
    report = pytest.importorskip("benchmarks.report", exc_type=ImportError)
    results = report.load([ROOT / f"benchmarks/results/{name}.json" for name in RESULTS])
    text = page.read_text(encoding="utf-8")
    assert report.fill_markers(text, results) == text


@pytest.mark.parametrize("page", BY_NAME)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", BY_NAME)
def test_links_to_a_section_find_it(page):
    for target, section in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text(encoding="utf-8")):
        other = page if not target else page.parent / target
        if "://" in target or other.parent.name == "reference":  # whose sections are made of docstrings
            continue
        headings = re.findall(r"^#+ (.*)", other.read_text(encoding="utf-8"), re.M)
        assert section in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings], (
            f"{target}#{section}"
        )


@pytest.mark.parametrize("page", BY_NAME)
def test_files_and_commands_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"\b((?:larpo|larpo_kernels|benchmarks|tests|docs)/[\w./-]*\w)", text)
    made = ("benchmarks/out", "docs/reproduction")  # by a command
    missing = [
        path for path in named if not path.startswith(made) and not (ROOT / path).exists() and not list(ROOT.glob(path + "*"))
    ]
    assert not missing
    modules = re.findall(r"python3? -m ([\w.]+\w)", text) + re.findall(
        r"`((?:larpo|larpo_kernels|benchmarks)(?:\.[a-z_]+)+)\b", text
    )
    assert [name for name in modules if name.islower() and not _leads_somewhere(name)] == []
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert [name for name in re.findall(r"(?:^|`)make ([a-z-]+)\b", text, re.M) if f"\n{name}:" not in makefile] == []


@pytest.mark.parametrize("page", BY_NAME)
def test_what_examples_import_is_there(page):
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^\s*from ((?:larpo|larpo_kernels|benchmarks)[\w.]*) import ([\w, ]+)", text, re.M)
    named = {f"{module}.{name.split(' as ')[0].strip()}" for module, names in found for name in names.split(",")}
    assert [name for name in sorted(named) if not _leads_somewhere(name)] == []


def _leads_somewhere(dotted: str) -> bool:
    """Whether a name is a module, or an attribute of one."""
    module, _, rest = dotted.rpartition(".")
    try:
        if importlib.util.find_spec(dotted):
            return True
    except ModuleNotFoundError:
        pass
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError:
        return False
    return hasattr(found, rest)


def test_the_table_of_schedules_has_them_all():
    from larpo_kernels.linear.schedules import SCHEDULES

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \| .*\d \|", text, re.M)) == set(SCHEDULES) - {"auto"}


def test_the_table_of_a_servers_settings_has_them_all():
    pytest.importorskip("transformers")
    from dataclasses import fields

    from larpo.serving.settings import ServerSettings

    section = (ROOT / "docs/align.md").read_text(encoding="utf-8").partition("## Sampling with vLLM")[2].partition("**New")[0]
    named = {name for row in re.findall(r"^\| (`.*?) \|", section, re.M) for name in re.findall(r"`(\w+)`", row)}
    assert named == {one.name for one in fields(ServerSettings)}


def test_there_is_one_version():
    import larpo_kernels

    assert f"version: {larpo_kernels.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {larpo_kernels.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")

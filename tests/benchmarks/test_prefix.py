"""The prefix suite measures what it says: the same training step twice, the prompt shared or not."""

import ctypes
import json
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")

from benchmarks import report
from benchmarks.core import memory_child, suites
from benchmarks.core.measure import Settings, all_providers, measure
from benchmarks.core.memory import GIVE_BACK
from benchmarks.providers import prefix
from benchmarks.providers.prefix import ModelStep, SeparateRows, Shape
from benchmarks.providers.registry import Provider
from benchmarks.reporting.by_shape import by_shape
from larpo.modeling.row_layouts import shared_rows
from tests.helpers import HANGS
from tests.helpers.forked import Forked

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # of <malloc.h>
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 20,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 640,
    "initializer_range": 0.3,
}


@pytest.fixture
def problem(monkeypatch):
    monkeypatch.setattr(prefix, "SMOLLM2_135M", TINY)
    return ModelStep.build("P8-R4-m3", torch.float32, "cpu", 0)


def _table(problem, providers):
    return measure(problem, providers, SeparateRows(problem), Settings(rounds=2, memory=False))


def test_both_layouts_are_right_timed_and_shown_with_the_bound(problem):
    table = _table(problem, all_providers("prefix", "step"))
    assert [(row["status"], len(row["seconds"])) for row in table["rows"]] == [("ok", 2)] * 2
    for row, seconds in zip(table["rows"], (3.0, 2.0), strict=True):
        row["seconds"] = [seconds]
    names, values = by_shape([table])
    shown = dict(zip(names, values, strict=True))
    assert shown["speed-up"] == "1.50" and shown["bound"] == "1.80" and shown["share of the bound"] == "83%"
    assert (shown["prompt"], shown["completion"], shown["candidates"]) == ("8", "4", "3")


def test_rows_whose_positions_run_on_are_flagged(problem):
    def run_on(step):
        rows = shared_rows(step.candidates, 0)
        rows["position_ids"] = torch.arange(rows["position_ids"].shape[1])[None]
        return step.laid_out(rows)

    wrong = Provider("wrong", "prefix", prefix.shared, ("step",), prepare=run_on)
    (row,) = _table(problem, [wrong])["rows"]
    assert row["status"] == "WRONG" and "logps" in row["message"] and not row["seconds"]


def test_half_a_gradient_is_flagged(problem):
    def half(step):
        out = prefix.shared(step)
        return out._replace(value=out.value / 2)

    wrong = Provider("wrong", "prefix", half, ("step",), prepare=prefix.together)
    (row,) = _table(problem, [wrong])["rows"]
    assert row["status"] == "WRONG" and "d_weights" in row["message"]


def test_a_report_puts_all_shapes_in_one_table(problem):
    table = _table(problem, all_providers("prefix", "step"))
    cpu = {"model": "Some CPU", "cores": 2, "instruction_sets": []}
    result = {"machine": {"cpu": cpu, "gpu": None}, "git": {"commit": "0" * 40, "dirty": False}, "versions": {}}
    result |= {"date": "2026-01-01", "tables": [table, {**table, "m": 9}]}
    text = report.markdown("cpu/prefix-step", [result])
    assert text.count("| ---") == 12 and "\n| 8 | 4 | 3 |" in text and "\n| 8 | 4 | 9 |" in text


def test_the_bound_is_the_ratio_of_tokens():
    assert Shape.named("P256-R64-m8").bound == pytest.approx(8 * 320 / 768)
    with pytest.raises(ValueError, match="got 'm8'"):
        Shape.named("m8")


def test_the_suites_cross_list_sizes_and_ratios():
    for suite in ("prefix", "prefix-long"):
        shapes = [Shape.named(job.case) for job in suites.jobs(suite, "cpu")]
        assert {(s.prompt / s.completion, s.m) for s in shapes} == {(r, m) for r in (0.4, 1, 4) for m in (4, 8, 16)}


def _measured(arguments):
    """As in a process of its own, with the settings of malloc that it would be started with."""
    libc = ctypes.CDLL(None)
    for parameter, name in ((M_MMAP_THRESHOLD, "MALLOC_MMAP_THRESHOLD_"), (M_TRIM_THRESHOLD, "MALLOC_TRIM_THRESHOLD_")):
        assert libc.mallopt(parameter, int(GIVE_BACK[name]))
    memory_child._child(*arguments)
    return 0


@pytest.mark.skipif(sys.platform != "linux", reason="forked, for speed, and glibc's malloc is asked to give memory back")
def test_memory_is_that_of_a_step_beyond_the_model(tmp_path):
    step = ModelStep.build("P8-R4-m2", torch.float32, "cpu", 0)
    step.save(tmp_path / "problem.pt")
    command = ["python", "memory_child", str(tmp_path / "problem.pt"), "ours (shared prompt)", "1"]
    with (tmp_path / "said").open("w+") as output:
        assert Forked(SimpleNamespace(command=command, environment={}), output, _measured).wait(HANGS) == 0
        peak = json.loads((tmp_path / "said").read_text().splitlines()[-1])["bytes"]
    gradients = step.describe()["gradient_bytes"]
    assert gradients <= peak < 3 * gradients

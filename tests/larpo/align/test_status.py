"""Where a run stands, seen from outside, and what it tells the tools that draw curves."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from larpo.align import stages
from larpo.align.status import status
from larpo.runs.files import write_rows
from larpo.runs.lock import locked
from tests.helpers import HANGS
from tests.helpers.align_runs import align


def test_where_a_run_stands_at_each_stage(tmp_path, monkeypatch):
    seen = []

    def looked_at(name, run_stage):
        def stage(run, iteration):
            found = status(tmp_path)
            seen.append((found.now, found.at_work, [(i, stage) for i, stage, _ in found.done], str(found).splitlines()[0]))
            if name == "score" and iteration == 1:
                write_rows(run.folder.iteration(1) / "score-chunks" / "99999.parquet", [{"a": 1}])
                assert "in iteration 1 of 1, score (1 parts of it are kept)" in str(status(tmp_path))
            if name == "lists":
                write_rows(run.folder.iteration(1) / "negatives-chunks" / "00000.parquet", [{"a": 1}])
                assert "in iteration 1 of 1, lists (1 parts of it are kept)" in str(status(tmp_path))
            return run_stage(run, iteration)

        return stage

    for name in ("sample", "score", "lists", "train", "evaluate"):
        monkeypatch.setattr(stages, name, looked_at(name, getattr(stages, name)))
    with pytest.raises(ValueError, match=r"holds no run of `larpo align`: it has no config.yaml"):
        status(tmp_path)
    with locked(tmp_path):
        assert str(status(tmp_path)).endswith("not begun; 0.0 minutes of finished stages; a process is at work")
    align(tmp_path, iterations=1)
    order = [(0, "evaluate"), *((1, name) for name in ("sample", "score", "lists", "train", "evaluate"))]
    assert [(now, done) for now, _, done, _ in seen] == [(order[i], order[:i]) for i in range(6)]
    assert all(at_work for _, at_work, *_ in seen)
    assert "at the start, evaluate; 0.0 minutes of finished stages; a process is at work" in seen[0][-1]
    assert "in iteration 1 of 1, train; " in seen[4][-1] and " ago" in seen[4][-1]

    found = status(tmp_path)
    assert found.now is None and not found.at_work and "finished, 1 of 1 iterations; see summary.md" in str(found)
    lines = str(found).splitlines()
    assert len(lines) == 7 and "iteration-01 train" in lines[5] and "3 steps, loss " in lines[5]
    (tmp_path / "iteration-01" / "evaluate.json").unlink()
    assert str(status(tmp_path)).splitlines()[0].endswith("no process is at work: start the same command again to go on")
    (tmp_path / "iteration-01" / "diverged.json").write_text(json.dumps({"why": "the loss is nan"}))
    assert "training has diverged: the loss is nan" in str(status(tmp_path))


def test_the_command_needs_no_torch_and_starts_nothing(tmp_path):
    (tmp_path / "config.yaml").write_text("output_dir: x\niterations: 3\n")
    code = "import sys; from larpo.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code, "align", "--status", tmp_path], capture_output=True, text=True, timeout=HANGS
    )
    stands = "at the start, evaluate; 0.0 minutes of finished stages"
    assert done.stdout.endswith(f"{stands}; no process is at work: start the same command again to go on\n"), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_counts_of_every_stage_go_to_tensorboard_an_iteration_a_step(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = align(tmp_path, iterations=1, report_to="tensorboard")
    (folder,) = (tmp_path / "runs").iterdir()
    events = event_accumulator.EventAccumulator(str(folder))
    events.Reload()
    shown = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    rewards = [(i, pytest.approx(one["evaluate"]["reward"]["mean"])) for i, one in enumerate(result.metrics)]
    assert shown["eval/reward"] == rewards and shown["eval/best_of_n/1/4"][0][0] == 0
    assert shown["train/score/reward"] == [(1, pytest.approx(result.metrics[1]["score"]["reward"]))]
    assert shown["train/train/log/loss"] == [(1, pytest.approx(result.metrics[1]["train"]["log"][-1]["loss"]))]


def test_a_tool_that_fails_ends_no_run_and_one_that_is_unknown_no_stage_begins(tmp_path, monkeypatch, caplog):
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    class Away(TrainerCallback):
        def on_log(self, *args, **kwargs):
            raise ConnectionError("no route")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "away", Away)
    from larpo.align.reporting import Reporter

    for process in (1, 0):
        reporter = Reporter(["away"], SimpleNamespace(process_index=process))
        for _ in range(2):
            reporter.stage(1, "score", {"reward": 1.0})
        reporter.close()
    assert caplog.text.count("Away fails, and is told no more: ConnectionError: no route") == 1

    class Missing:
        def __init__(self):
            raise RuntimeError("it requires wandb to be installed")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "missing", Missing)
    with pytest.raises(ValueError, match="report_to: it requires wandb to be installed"):
        Reporter("missing", SimpleNamespace(process_index=0))
    with pytest.raises(ValueError, match=r"report_to: tensorbord is not supported, only .*tensorboard"):
        align(tmp_path, report_to="tensorbord")
    assert not list(tmp_path.rglob("*.parquet"))

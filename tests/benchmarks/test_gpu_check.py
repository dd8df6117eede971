"""benchmarks/gpu_check.py and benchmarks/tune.py as far as they go without a GPU: cutting, recording, printing, choosing."""

import functools
import json
import os
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, limits, report, tune
from benchmarks.gpu import device, plan, speed, steps
from benchmarks.gpu.plan import Planned
from benchmarks.gpu.steps import Step
from benchmarks.reporting import gpu_run
from tests.benchmarks.test_benchmarks import made_table, row
from tests.helpers import HANGS
from tests.helpers.forked import Forked

ROOT = Path(__file__).resolve().parents[2]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
WRITE = """
import json, sys, time
def write(**row):
    with open(sys.argv[2], "a") as file:
        file.write(json.dumps({"step": sys.argv[1], **row}) + "\\n")
"""


def fake(name, code, folder, limit_s=60.0, **options):
    command = [sys.executable, "-c", WRITE + code, name, str(folder / "rows")]
    return Step(name, f"what {name} shows", command, limit_s, **{"least_s": 0.0, **options})


def ran(*fakes, seconds=120.0, folder):
    made = [fake(*one, folder) if isinstance(one, tuple) else one for one in fakes]
    return list(steps.run(made, seconds, folder / "rows", folder / "log.txt"))


# --- steps ---------------------------------------------------------------------------------------------------------


def test_a_step_that_ends_keeps_its_rows(tmp_path):
    (found,) = ran(("one", "write(what='a', ok=True); write(what='b', value=2)"), folder=tmp_path)
    assert found["status"] == "ok" and found["message"] == ""
    assert found["rows"] == [{"what": "a", "ok": True}, {"what": "b", "value": 2}]


def test_a_step_past_its_own_limit_is_cut_with_all_it_started_and_keeps_what_it_wrote(tmp_path):
    sleeps = "[sys.executable, '-c', 'import time; time.sleep(60)']"
    slow = f"import subprocess; write(what=subprocess.Popen({sleeps}).pid); time.sleep(60); write(what='after')"
    cut, after = ran(fake("slow", slow, tmp_path, 1.0), ("next", "write(what='c')"), folder=tmp_path)
    assert cut["status"] == "cut" and cut["message"] == "after 1 s" and cut["seconds"] < 20
    assert after["status"] == "ok" and after["rows"] == [{"what": "c"}]
    (started,) = cut["rows"]
    assert not runs(started["what"])


def runs(pid):
    """A process that nobody has waited for yet runs no more."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_a_failing_step_is_shown_as_failed_and_does_not_stop_the_others(tmp_path):
    raising, wrong, dead, good = ran(
        ("raising", "write(what='a'); raise RuntimeError('no luck')"),
        ("wrong", "write(what='one', ok=True); write(what='two', ok=False, error='off by 3')"),
        ("dead", "import os; os.abort()"),
        ("good", "write(what='b', ok=True)"),
        folder=tmp_path,
    )
    assert [r["status"] for r in (raising, wrong, dead, good)] == ["failed", "failed", "failed", "ok"]
    assert raising["message"] == "RuntimeError: no luck" and raising["rows"] == [{"what": "a"}]
    assert wrong["message"] == "two off by 3"
    assert "no luck" in (tmp_path / "log.txt").read_text()


def test_steps_for_which_no_time_is_left_are_not_started(tmp_path):
    first = fake("first", "time.sleep(60)", tmp_path)
    second = fake("second", "write(what='never')", tmp_path, least_s=1.0)
    cut, left_out = ran(first, second, seconds=1.5, folder=tmp_path)
    assert cut["status"] == "cut"
    assert left_out["status"] == "not run" and left_out["message"] == steps.OUT_OF_TIME and left_out["rows"] == []


def test_a_step_leaves_the_seconds_that_a_later_one_reserves(tmp_path):
    first = fake("first", "time.sleep(60)", tmp_path)
    cut, last = ran(first, fake("last", "write(what='a')", tmp_path, reserved_s=20.0), seconds=21.0, folder=tmp_path)
    assert cut["status"] == "cut" and cut["seconds"] < 15 and last["status"] == "ok"


def test_steps_beside_each_other_run_at_the_same_time(tmp_path):
    wait = "import pathlib; pathlib.Path({me!r}).touch()\nwhile not pathlib.Path({other!r}).exists(): time.sleep(0.01)"
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    one = fake("one", wait.format(me=a, other=b), tmp_path)
    two = fake("two", wait.format(me=b, other=a), tmp_path, beside=True)
    assert [r["status"] for r in ran(one, two, seconds=HANGS, folder=tmp_path)] == ["ok", "ok"]


def test_a_step_that_waits_is_started_early_and_told_to_go_when_its_turn_comes(tmp_path):
    started, order = tmp_path / "started", tmp_path / "order"
    say = f"open({str(order)!r}, 'a').write('{{}} ')"
    first = f"import pathlib\nwhile not pathlib.Path({str(started)!r}).exists(): time.sleep(0.01)\n" + say.format("first")
    second = f"open({str(started)!r}, 'w').close(); word = sys.stdin.readline(); " + say.format("' + word + '")
    ran(fake("first", first, tmp_path), fake("second", second, tmp_path, waits=True), seconds=HANGS, folder=tmp_path)
    assert order.read_text() == "first go\n "


def test_a_row_that_was_half_written_is_left_out(tmp_path):
    file = tmp_path / "rows"
    file.write_text('{"step": "a", "what": "whole"}\n{"step": "b", "what": "another"}\n{"step": "a", "what": "ha')
    assert steps.read_rows(file, "a") == [{"what": "whole"}]
    assert steps.read_rows(tmp_path / "none", "a") == []


def test_rows_are_on_disk_before_the_next_is_computed(tmp_path):
    file, seen = tmp_path / "rows", []

    def rows():
        for i in range(3):
            seen.append(len(steps.read_rows(file, "a")))
            yield {"i": i}

    steps.write_rows(rows(), file, "a", say=lambda line: None)
    assert seen == [0, 1, 2] and len(steps.read_rows(file, "a")) == 3


# --- the command ---------------------------------------------------------------------------------------------------


def test_every_step_names_a_generator_that_exists():
    context = plan.Context(Path("rows"), None, 60.0)
    for one in plan.plan():
        assert hasattr(one.rows(context), "__next__")  # nothing runs before the first row is asked for
    assert len({one.name for one in plan.plan()}) == len(plan.plan())


def test_limits_are_the_planned_seconds_scaled_to_the_minutes_and_those_in_turn_fill_them():
    assert plan.planned_seconds() == pytest.approx(60 * plan.MINUTES - plan.LAST_S, abs=10)
    whole, half = (plan.steps(["run"], minutes, None, {"PYTHONPATH": "here"}, None) for minutes in (8.5, 4.375))
    assert [2 * step.limit_s for step in half] == pytest.approx([step.limit_s for step in whole])
    assert [step.name for step in whole if step.reserved_s] == ["model"]
    few = plan.steps(["run"], 8.5, ["profile", "big", "tests"], {"PYTHONPATH": "here"}, None)
    assert {step.name: step.beside for step in few} == {"profile": False, "big": False, "tests": True}
    peers = plan.steps(["run"], 8.5, ["trl", "rows"], {"PYTHONPATH": "here"}, Path("/peers"))
    found = {step.name: step.environment["PYTHONPATH"] for step in peers}
    assert found["trl fused head"] == f"here{os.pathsep}/peers" and found["rows"] == "here"


@pytest.mark.parametrize(
    "arguments", [["--minutes", "0.2"], ["--launch", "no.json"], ["--peers", "no_folder"], ["--only", "no step"]]
)
def test_arguments_that_would_run_something_else_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(arguments)
    assert f"{arguments[0]}: got" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="steps are forked here, for speed")
def test_a_dry_run_goes_through_every_step_whatever_befalls_some(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv(device.DRY_RUN, "1")
    own = plan.plan()
    faulty = [Planned(x, "goes wrong", f"tests.helpers.faulty_steps.{x}", 1) for x in ("crashes", "hangs", "raises")]
    monkeypatch.setattr(plan, "plan", lambda: [*own[:3], *faulty, *own[3:]])
    file = tmp_path / "inner" / "test_two.py"
    file.parent.mkdir()
    file.write_text("def test_good(device='x'): pass\ndef test_bad(): assert 1 == 2\n")
    monkeypatch.setattr("benchmarks.gpu.correct.test_files", lambda: [file])
    tmp_path = tmp_path / "out"
    asked = gpu_check.parser().parse_args(["--dry-run", "--minutes", "8.5", "--out", str(tmp_path), "--commit", "abc123"])
    for one in plan.plan():
        one.load()  # once, for all that are forked
    forked = functools.partial(Forked, run=gpu_check.main)
    assert gpu_check.check(asked, forked, begin=time.monotonic()) == 1  # for some failed
    printed = capfd.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    found = {one["step"]: one for one in results["steps"]}
    assert set(found) == {one.name for one in plan.plan()}
    bad = {name: one["status"] for name, one in found.items() if one["status"] != "ok"}
    assert bad == {"crashes": "failed", "hangs": "cut", "raises": "failed", "tests": "failed"}
    assert found["crashes"]["rows"] == found["hangs"]["rows"] == [{"what": "before", "ok": True}]
    assert found["raises"]["message"] == "RuntimeError: no luck"
    (tests,) = (row for row in found["tests"]["rows"] if "exit" in row)
    assert (tests["passed"], tests["failed"], tests["exit"]) == (1, 1, 1)
    assert tests["failures"][0]["test"].endswith("test_two.py::test_bad") and "1 == 2" in tests["failures"][0]["error"]
    assert results["git"]["commit"] == "abc123"
    assert len(list(tmp_path.iterdir())) <= 8 and not any(path.is_dir() for path in tmp_path.iterdir())
    last = printed.split("\n\n")[-1]
    assert last.startswith("step") and len(printed[printed.index("no GPU, a dry run") :]) < 10_000
    assert "runs on cuda" in json.dumps(found["cut-cross-entropy"]["rows"])  # a row says why a peer was not measured
    loaded = report.load([tmp_path / "suites.json"])
    text = report.markdown("cpu/linear-frozen/T64-H16-V96-m4", loaded)
    assert "| eager |" in text and "abc123" in text


@pytest.mark.slow
@NO_GPU
def test_without_a_gpu_it_says_so_in_one_sentence(tmp_path, capsys):
    where = ["--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "benchmarks/gpu_check.py", *where], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert tune.main(where) == 2
    for text in (done.stdout, capsys.readouterr().out):
        assert text.count("\n") == 1 and "GPU" in text
    assert not (tmp_path / "out").exists()


def result(step, rows=(), status="ok", message=""):
    return {"step": step, "what": "", "status": status, "seconds": 12.3, "message": message, "rows": list(rows)}


RECORDED = json.loads((ROOT / "benchmarks/results/nvidia-h100-80gb-hbm3/results.json").read_text())
MEASURED = {one["step"]: one["rows"] for one in RECORDED["steps"]}
ROW, HEAD = MEASURED["rows"][0], MEASURED["head"][2]  # 8192 x 128256; list_hold
DONE = [
    result("tests", [{"what": "so far", "passed": 50}, {"what": "kernel tests", "ok": True, "passed": 70, "skipped": 2}]),
    result("big", [{"what": "a", "ok": True}, {"what": "b", "ok": False}], "failed", "b: too large"),
    result("rows", [ROW]),
    result("head", [HEAD]),
    result("profile", [{"what": "recompute", "kernels": [{"kernel": "gemm", "ms": 5.5, "launches": 2}]}], "cut", "after 40 s"),
    result("suites", status="not run", message=steps.OUT_OF_TIME),
]


def test_results_are_on_disk_after_every_step(tmp_path):
    def one_by_one():
        for i, step in enumerate(DONE):
            if i:
                recorded = json.loads((tmp_path / "results.json").read_text())
                assert recorded["schema"] == 1 and len(recorded["steps"]) == i
            yield step

    assert gpu_check.record(one_by_one(), tmp_path, {"schema": 1}, say=lambda line: None) == DONE
    assert json.loads((tmp_path / "results.json").read_text())["steps"] == DONE
    assert not (tmp_path / "suites.json").exists()


def test_the_table_of_steps_comes_last_and_says_what_happened():
    text = gpu_run.summary(DONE)
    last = text.split("\n\n")[-1].splitlines()
    assert [line.split()[0] for line in last] == ["step", *(r["step"] for r in DONE)]
    assert "70 passed, 2 skipped" in last[1] and "ok" in last[1]
    assert "failed" in last[2] and "b: too large; 1 of 2 checks" in last[2]
    assert "cut" in last[5] and "after 40 s" in last[5]
    assert "not run" in last[6]
    (rows,), (head,) = ([x for x in text.splitlines() if x.startswith(y)] for y in ("8192 x 128256", "8192 x 4096 x 128256"))
    assert text.index("gemm") < text.index(rows) < text.index(head)
    assert rows.split()[3:] == ["bfloat16,", "tuned", "2782", "0.92", "2863", "0.95", "3022", "633"]
    assert head.split()[5:] == ["`list_hold`", "36.7", "ms", "34.8", "ms", "1.053", "704", "3.42", "GB", "tuned", "3.06", "ms"]
    many = gpu_run.summary([*DONE[:2], result("rows", [ROW] * 300), *DONE[3:]])
    assert len(many) < 10_000 and len(many.split("\n\n")[-1].splitlines()) == len(last)


def test_a_table_that_cannot_be_drawn_costs_no_other():
    text = gpu_run.summary([result("rows", [{"T": 8}]), result("head", [HEAD])])
    assert "rows: could not be drawn, KeyError" in text and "`list_hold`" in text


def test_a_recorded_run_is_shown_again(tmp_path, capsys):
    gpu_check.record(DONE, tmp_path, {"schema": 1}, say=lambda line: None)
    assert gpu_check.main(["--show", str(tmp_path / "results.json")]) == 0
    assert capsys.readouterr().out == gpu_run.summary(DONE) + "\n"


def test_tables_are_recorded_as_the_report_reads_them_and_others_are_compared_in_the_rounds_they_shared(tmp_path):
    ours, eager, peer = (row(name, [x * 1e-3] * 3) for name, x in (("ours (triton)", 1), ("eager", 4), ("a peer", 6)))
    alone = made_table(ours, eager, device="cuda")
    beside = made_table({**ours, "seconds": [2e-3] * 3}, {**eager, "seconds": [5e-3] * 3}, peer, device="cuda")
    case, turns = (result(name, [{"what": "", "ok": True, "table": x}]) for name, x in (("case", alone), ("a peer", beside)))
    gpu_check.record([case], tmp_path, {"schema": 1}, say=lambda line: None)
    assert json.loads((tmp_path / "suites.json").read_text())["tables"] == [alone]
    (table,) = gpu_run.merged([case, turns])
    assert [r["provider"] for r in table["rows"]] == ["ours (triton)", "eager", "a peer"]
    lines = {line.split("  ")[1]: line.split() for line in gpu_run.summary([case, turns]).splitlines() if line.startswith("  ")}
    assert lines["ours (triton)"][2:5] == ["1", "ms", "0.25"]
    assert lines["a peer"][2:6] == ["6", "ms", "1.20", "3.00"]  # 6 to 5 and to 2, not to 4 and to 1


def test_a_step_fails_by_ours_and_not_by_what_another_library_left_behind():
    ours, peer = row("ours (triton)", [1e-3]), row("a peer", [], status="error", message="illegal address")
    raised, off = ({**ours, "status": status, "message": "text"} for status in ("error", "WRONG"))
    found = [speed._row_of(made_table(*rows), None, "a peer") for rows in ([ours, peer], [raised, peer], [off, peer], [raised])]
    assert [x["ok"] for x in found] == [True, True, False, False]
    assert found[2]["error"] == "ours (triton) WRONG text"


def test_plots_show_what_was_measured(tmp_path):
    pytest.importorskip("matplotlib")
    drawn = gpu_run.draw([result("rows", [ROW]), result("head", [{**HEAD, "ignored": 0}])], tmp_path)
    assert [path.name for path in drawn] == ["rows.png", "head.png"] and all(path.stat().st_size for path in drawn)
    assert gpu_run.draw([result("big")], tmp_path) == []


# --- the tuner -----------------------------------------------------------------------------------------------------


def groups():
    return pytest.mark.parametrize("group", tune.GROUPS, ids=lambda group: group.name)


@groups()
def test_candidates_are_launches_that_make_sense(group):
    pytest.importorskip("triton")
    candidates = group.candidates()
    assert 1 < len(candidates) <= 50  # each is compiled
    assert len({tuple(values.items()) for values in candidates}) == len(candidates)
    assert set(group.values) <= set(tune.shipped("sm_90"))
    for values in candidates:
        assert all(value & (value - 1) == 0 for value in values.values())  # Triton's blocks are powers of 2
        if "tile_span" in values:
            assert values["tile_span"] % values["tile_rows"] == 0


def test_all_launch_parameters_are_tuned():
    launch = pytest.importorskip("larpo_kernels.backends.triton.launch")
    tuned = {name for group in tune.GROUPS for name in group.values}
    assert tuned == {field.name for field in fields(launch.Launch)} - {"origin"} | set(tune.SCHEDULE_VALUES)


def test_a_candidate_is_in_place_only_while_it_is_measured():
    launch = pytest.importorskip("larpo_kernels.backends.triton.launch")
    from larpo_kernels.linear import tile_shapes

    shipped, tokens = launch.TABLE["sm_90"], tile_shapes.GPU_TILE_TOKENS
    with pytest.raises(KeyError), tune.using({"row_block": 512, "GPU_TILE_TOKENS": 77}, "sm_90"):
        assert launch.TABLE["sm_90"].row_block == 512 and launch.TABLE["sm_90"].row_warps == shipped.row_warps
        assert tile_shapes.GPU_TILE_TOKENS == 77
        raise KeyError
    assert launch.TABLE["sm_90"] is shipped and tokens == tile_shapes.GPU_TILE_TOKENS


def test_the_fastest_wins_only_if_it_beats_noise():
    candidates = [{"x": 1}, {"x": 2}, {"x": 4}]
    rows = tune.ranked(candidates, [{"a": 1.0, "b": 4.0}, {"a": 0.5, "b": 4.0}, {"a": 2.0, "b": 4.0}])
    assert [row["values"]["x"] for row in rows] == [2, 1, 4]
    assert [row["ratio"] for row in rows] == pytest.approx([0.5**0.5, 1.0, 2**0.5])
    assert tune.winner(rows, {"x": 1}) == {"x": 2}
    close = tune.ranked(candidates[:2], [{"a": 1.0}, {"a": 0.99}])
    assert tune.winner(close, {"x": 1}) == {"x": 1}
    assert tune.winner([], {"x": 1}) == {"x": 1}


def test_problems_past_the_deadline_are_not_measured(monkeypatch):
    timed = []

    def medians(functions, **options):
        timed.append(sorted(functions))
        return {name: 1.0 for name in functions}

    monkeypatch.setattr(tune, "medians", medians)
    monkeypatch.setattr(tune, "problems", lambda group: iter([("first", None), ("second", None)]))
    monkeypatch.setattr(tune.time, "monotonic", iter([0.0, 5.0]).__next__)
    group = tune.Group("rows", {"row_block": (1, 2)})
    rows = tune.measured(group, group.candidates(), {}, "sm_90", deadline=3.0)
    assert timed == [["0", "1"]] and list(rows[0]["seconds"]) == ["first"]


def test_a_candidate_that_raises_is_left_out_and_the_others_are_measured(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv(device.DRY_RUN, "1")
    from larpo_kernels.linear import tile_shapes

    def run():
        if tile_shapes.GPU_TILE_TOKENS == 2:
            raise RuntimeError("too many resources requested")

    monkeypatch.setattr(tune, "problems", lambda group: iter([("first", run), ("second", run)]))
    group = tune.Group("schedule", {"GPU_TILE_TOKENS": (1, 2, 4)})
    rows = tune.measured(group, group.candidates(), {}, "sm_90", deadline=time.monotonic() + 60)
    assert sorted(row["values"]["GPU_TILE_TOKENS"] for row in rows) == [1, 4]
    assert all(set(row["seconds"]) == {"first", "second"} for row in rows)


def test_what_was_tuned_is_read_by_steps_and_for_its_own_architecture_only(tmp_path, monkeypatch):
    launch = pytest.importorskip("larpo_kernels.backends.triton.launch")
    monkeypatch.setenv(device.DRY_RUN, "1")
    monkeypatch.setattr(tune, "measured", lambda group, candidates, *_: tune.ranked(candidates, [{"a": 2.0}, {"a": 1.0}]))
    file = tmp_path / "launch.json"
    rows = list(tune.tuned(60.0, file, lambda group: [{"split_columns": 65536}], only=["split"]))
    assert [row["chosen"] for row in rows] == [{"split_columns": 65536}]
    assert tune.read(file, "sm_90") == tune.shipped("sm_90") | {"split_columns": 65536}
    assert tune.read(file, "sm_80") == tune.read(tmp_path / "none", "sm_90") == {}
    before = dict(launch.TABLE)
    try:
        tune.apply(file)
        assert launch.TABLE["sm_90"].split_columns == 65536
    finally:
        launch.TABLE.update(before)


def test_the_printed_entry_is_a_line_of_the_launch_table():
    launch = pytest.importorskip("larpo_kernels.backends.triton.launch")
    values = tune.shipped("sm_90") | {"row_block": 2048, "GPU_TILE_BYTES": 1 << 29, "GPU_TILE_TOKENS": 8192}
    line, tile_bytes, tokens = tune.entry("sm_90", values, "measured, NVIDIA H200, 2026-11-21").splitlines()
    found = eval("{" + line + "}", {"Launch": launch.Launch})["sm_90"]
    assert found.row_block == 2048 and found.row_warps == launch.TABLE["sm_90"].row_warps
    assert found.origin == "measured, NVIDIA H200, 2026-11-21"
    assert tile_bytes.startswith("GPU_TILE_BYTES = 1 << 29 ") and tokens.startswith("GPU_TILE_TOKENS = 8192 ")


def test_a_table_of_candidates_shows_the_fastest_first_and_says_when_there_is_none():
    group = tune.Group("rows", {"row_block": (1024, 2048)})
    rows = tune.ranked(group.candidates(), [{"forward": 2e-3}, {"forward": 1e-3}])
    head, names, first, second = tune.table(group, rows).splitlines()
    assert head.startswith("rows: 2 candidates") and names.split() == ["ratio", "row_block", "forward"]
    assert first.split() == ["0.500", "2048", "1.000"] and second.split() == ["1.000", "1024", "2.000"]
    assert tune.table(group, []) == "rows: not measured, the time limit was reached; shipped values stay"


@pytest.mark.slow
def test_candidates_are_compiled_without_a_gpu():
    pytest.importorskip("triton")
    code = """
from benchmarks import tune
base = tune.shipped("sm_90")
print(tune.spills("rows", base, "sm_90"), tune.spills("rows", base | {"row_block": 1000}, "sm_90"))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANGS
    )
    assert done.stdout.split() == ["0", "None"], done.stdout + done.stderr  # 1000 is no power of 2


# --- the model -----------------------------------------------------------------------------------------------------


def test_limits_are_the_arithmetic_of_the_documentation():
    card, head = limits.Card(4.3e12, 790e12), limits.Head(8192, 4096, 128256)
    assert head.logits(card, 1) == pytest.approx(8192 * 128256 * 2 / 4.3e12)
    assert head.exp_pass(card) / head.gemm(card) == pytest.approx(2 * 790e12 / (4.3e12 * 4096))
    assert limits.tile(head, 4096, 1 << 30) == (4096, 128256)
    assert limits.tile(head, 8192, 1 << 30) == (8192, 65536)
    assert head.sum_weight(card, 8192) == 0
    more = limits.Head(16384, 4096, 128256)
    a_block = more.sum_weight(card, 4096) - more.sum_weight(card, 5462)  # four blocks against three
    assert a_block == pytest.approx(8 * 128256 * 4096 / 4.3e12)
    text = (ROOT / "docs/performance.md").read_text()
    for line in limits.rows(card, [limits.Head(t, 4096, 128256) for t in (4096, 8192, 16384)], (4096, 8192, 16384), 1 << 30):
        assert any(" ".join(shown.split()) == " ".join(" ".join(line).split()) for shown in text.splitlines()), line


def test_limits_use_the_tiles_of_the_walk():
    from larpo_kernels.linear.tile_shapes import GPU_TILE_BYTES, GPU_TILE_TOKENS, tile_shape

    for t in (1000, 8192, 16384):
        for v in (32000, 128256, 262144):
            tokens, rows = tile_shape(t, 4096, v, torch.bfloat16, torch.device("cuda"))
            assert (tokens, rows) == pytest.approx(
                limits.tile(limits.Head(t, 4096, v), GPU_TILE_TOKENS, GPU_TILE_BYTES), abs=64
            )

"""The suite of small calls: what it shows, and the one bound on time that is held, far off on purpose."""

import pytest

pytest.importorskip("rich")
pytest.importorskip("typer")

from benchmarks import report
from benchmarks.core import cases, first_call, measure, suites
from benchmarks.core.problem import Problem
from benchmarks.reporting.by_shape import by_shape
from tests.benchmarks.test_benchmarks import made_table, recorded, row

SEVERAL = 3  # times eager's; about 1 is meant, and a busy machine moves a ratio of bests by half
TRIES = 3


def times_as_slow_as_eager(problem, name, rounds=15):
    """Best of many rounds in turns, so that whatever else the machine does hits both."""
    providers = measure.all_providers(problem.side, problem.mode, ["eager", name], small=True)
    best = {p.name: float("inf") for p in providers}
    for _ in range(rounds):
        for p in providers:
            best[p.name] = min(best[p.name], measure.run_once(p, problem)[0])
    return best[name] / best["eager"]


@pytest.mark.parametrize("case", ["T2048-H64-V1000-m4-length32"])
@pytest.mark.parametrize(
    ("side", "mode", "name"), [("logits", "train", "ours (torch)"), ("linear", "trainable", "ours auto (torch)")]
)
def test_a_small_call_does_not_take_several_times_as_long_as_eager(one_thread, case, side, mode, name):
    problem = Problem.from_case(cases.build(case), side, mode)
    ratios = []
    while len(ratios) < TRIES and (not ratios or ratios[-1] > SEVERAL):
        ratios.append(times_as_slow_as_eager(problem, name))
    assert ratios[-1] < SEVERAL, f"{name} took {min(ratios):.1f} times as long as eager at best"


def test_the_suite_has_the_shapes_it_names():
    shapes = [tuple(cases.build(job.case).labels.shape) for job in suites.small()[:-2] if job.side == "logits"]
    assert shapes == [(4, 5), (16, 16), (64, 32)]


def test_a_sample_is_as_many_calls_as_fill_its_time_and_says_what_one_takes():
    calls = []
    (eager,) = measure.all_providers("logits", "train", ["eager"])
    counting = measure.replace(eager, forward=lambda p: (calls.append(p), eager.forward(p))[1])
    problem = Problem.from_case(cases.build("T8-H4-V9-m2"), "logits", "train")
    seconds = measure.run_queued(counting, problem, 5, None)
    assert len(calls) == 5 and seconds > 0
    assert all(p.caught["logits"].shape == problem.logits.shape for p in calls)  # each had its backward


def small_table(side, mode, eager, ours, **changes):
    plan = None if side == "logits" else "list_hold, all E fits"
    name = "ours (torch)" if plan is None else "ours auto (torch)"
    rows = [row("eager", eager), row("plain Function", [0.5 * x for x in eager]), row(name, ours)]
    return made_table(*rows, side=side, mode=mode, plan=plan, small=True, candidates=4, T=20, V=100, **changes)


def test_the_page_shows_a_row_for_each_shape_and_side_and_ratios_of_the_best():
    tables = [
        small_table("logits", "train", [2e-3, 4e-3, 9e-3], [1e-3, 3e-3, 8e-3]),
        small_table("linear", "trainable", [2e-3, 2e-3, 3e-3], [4e-3, 5e-3, 5e-3]),
    ]
    names, *rows = by_shape(tables)
    shown = [dict(zip(dict.fromkeys(names), r, strict=False)) for r in rows]
    assert [r[:4] for r in rows] == [["4 x 5 x 100", "logits", "1 ms", "3 ms"], ["4 x 5 x 100", "hidden", "4 ms", "5 ms"]]
    assert [r[names.index("ours / eager")] for r in rows] == ["0.50", "2.00"], shown
    assert [r[names.index("ours / plain Function")] for r in rows] == ["1.00", "4.00"]


def test_a_page_of_small_calls_takes_them_and_nothing_else():
    first = [{"call": "ours", "import_s": [0.3, 0.1, 0.2], "first_s": [3, 1, 2], "second_s": [1e-3] * 3, "dynamo": True}]
    result = recorded(
        small_table("logits", "train", [2e-3], [1e-3]), made_table(row("eager", [1.0]), row("ours (torch)", [1.0]))
    )
    small = report.markdown("cpu/small", [result | {"first_calls": first}])
    assert "| ours | 200 ms | 2.00 s | 1 ms | yes |" in small and small.count("4 x 5 x 100") == 1
    assert "4 x 5 x 100" not in report.markdown("cpu/logits-train/*", [result])


def test_small_calls_are_drawn_once_for_all_shapes(tmp_path):
    plots = pytest.importorskip("benchmarks.reporting.plots", exc_type=ImportError)
    tables = [small_table("logits", "train", [2e-3], [1e-3]), small_table("linear", "trainable", [2e-3], [1e-3])]
    (picture,) = plots.draw([recorded(*tables)], tmp_path)
    assert picture.name == "cpu-small-calls.png" and picture.stat().st_size > 5000


def test_a_first_call_says_whether_it_imported_dynamo():
    found = first_call._child("ours, from hidden", "cpu")
    assert found.keys() == {"import_s", "first_s", "second_s", "dynamo"} and min(found["first_s"], found["second_s"]) > 0

"""The benchmark sees a wrong provider, and its report says what was recorded and nothing else."""

import json
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

import larpo_kernels as lk

pytest.importorskip("rich")
pytest.importorskip("typer")

from benchmarks import report
from benchmarks.core import measure, suites
from benchmarks.core.problem import BETA, IGNORE, OBJECTIVE, SIDES, WANTED, Problem
from benchmarks.core.truth import Truth
from benchmarks.providers import pytorch, registry
from benchmarks.providers.prefix import Shape
from benchmarks.providers.registry import Output, Provider
from benchmarks.providers.trainers import TrainerStep
from benchmarks.reporting import tables
from benchmarks.reporting.by_shape import by_shape
from tests.helpers import HANGS

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = measure.Settings(rounds=2, memory=False)
QUICK_TO_RUN = ("eager", "ours", "plain Function", "log_softmax a row", "torch linear_cross_entropy", "GEMMs only", "moving")


@dataclass
class TinyCase:
    """Two lists of two candidates, five tokens each, of which some are prompt or padding."""

    dtype: torch.dtype = torch.float32
    name: str = "tiny"
    note: str = "made up"
    list_sizes: int = 2
    hidden: torch.Tensor = field(init=False)

    def __post_init__(self):
        draw = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(4, 5, 16, generator=draw).to(self.dtype)
        self.weight = (torch.randn(37, 16, generator=draw) / 4).to(self.dtype)
        self.labels = torch.randint(0, 37, (4, 5), generator=draw)
        self.labels[:, 0] = IGNORE
        self.labels[1, 3:] = IGNORE
        self.relevance = torch.tensor([1.0, 0.0, 0.0, 2.0])
        self.ref_logps = torch.tensor([-9.0, -8.0, -10.0, -9.5])

    @property
    def logits(self):
        return self.hidden @ self.weight.T


def problem(side, mode, dtype=torch.float32):
    return Problem.from_case(TinyCase(dtype), side, mode)


def table(side, mode, entries=None):
    p = problem(side, mode)
    if entries is None:
        chosen = measure.all_providers(side, mode, small=True)
        entries = [e for e in chosen if any(n in e.name for n in QUICK_TO_RUN)]
    return measure.measure(p, entries, Truth(p), SETTINGS)


@pytest.mark.parametrize(("side", "mode"), [(side, mode) for side in ("logits", "linear") for mode in SIDES[side]])
def test_every_provider_that_runs_here_is_right_and_timed(side, mode):
    rows = table(side, mode)["rows"]
    ran = [r for r in rows if r["status"] != "not run"]
    assert {r["status"] for r in ran} == {"ok"}, [(r["provider"], r["message"]) for r in ran]
    assert all(len(r["seconds"]) == SETTINGS.rounds for r in ran)
    assert any(r["provider"].startswith("ours") for r in ran)
    for row in ran:
        if not row["floor"]:
            assert {k for k in row["errors"] if k.startswith("d_")} == {f"d_{name}" for name in WANTED[mode]}


def _eager_variant(change):
    """Eager from logits with its token log-probs put through `change`."""

    def forward(p):
        logps = pytorch.log_softmax_logps(p.rows, p.labels.flatten())
        return registry.list_loss(change(logps, p), p)

    return forward


def _shown_but_not_differentiated(logps, p):
    return logps.detach() + 0.5 * (logps - logps.detach())


WRONG = {
    "half the gradient": _eager_variant(_shown_but_not_differentiated),
    "log-probs shifted by a tenth of a nat": _eager_variant(lambda logps, p: logps - 0.1),
    "ignored tokens counted": _eager_variant(
        lambda logps, p: p.rows.log_softmax(-1).gather(1, p.labels.flatten().clamp(min=0)[:, None])[:, 0]
    ),
    "not a number": _eager_variant(lambda logps, p: logps * float("nan")),
    "the loss of another reference": lambda p: Output(
        *lk.reference.fused_listwise_loss(
            p.logits, p.labels, p.relevance, list_sizes=p.list_sizes, objective=OBJECTIVE, beta=BETA
        )[:2]
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_provider_is_flagged_not_timed_and_ranked_last(what):
    right = [p for p in measure.all_providers("logits", "train", ["eager"])]
    wrong = Provider(what, "logits", WRONG[what], ("train",))
    found = table("logits", "train", [wrong, *right])
    row = next(r for r in found["rows"] if r["provider"] == what)
    assert row["status"] == "WRONG" and row["message"] and not row["seconds"]
    assert tables.shown(found)[-1] is row
    assert tables.cells(found, row)["time"] == "WRONG"


def test_a_gradient_in_an_ignored_row_is_wrong_however_small():
    class Leak(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            return logits.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient + 1e-30

    def forward(p):
        logps = pytorch.log_softmax_logps(Leak.apply(p.rows), p.labels.flatten())
        return registry.list_loss(logps, p)

    rows = table("logits", "train", [Provider("leaks", "logits", forward, ("train",))])["rows"]
    assert rows[0]["status"] == "WRONG" and rows[0]["errors"]["d_logits"] is None


def test_a_provider_that_raises_becomes_a_row_and_the_others_go_on():
    def forward(p):
        raise RuntimeError("no such kernel")

    eager = measure.all_providers("logits", "train", ["eager"])
    rows = table("logits", "train", [Provider("broken", "logits", forward, ("train",)), *eager])["rows"]
    assert [r["status"] for r in rows] == ["error", "ok"]
    assert rows[0]["message"] == "RuntimeError: no such kernel"


@pytest.mark.parametrize("side", ["logits", "linear"])
@pytest.mark.parametrize("computes", ["list loss", "token logps", "sum of logps"])
def test_the_truth_is_autograd_of_the_specification_in_float64(side, computes):
    p = Problem.from_case(TinyCase(torch.float64), side, "train" if side == "logits" else "trainable").fresh()
    truth = Truth(p)
    ops = lk.reference
    head = (p.logits,) if side == "logits" else (p.hidden, p.weight)
    logps = (ops.token_logps if side == "logits" else ops.linear_token_logps)(*head, p.labels)
    if computes == "sum of logps":
        value = logps.sum()
        value.backward()
    else:
        scores = BETA * (logps.sum(-1) - p.ref_logps.double())
        value = ops.listwise_loss(scores, p.relevance.double(), list_sizes=p.list_sizes, objective=OBJECTIVE)
        value.backward()
    errors = truth.errors(computes, value, logps.sum(-1), p.gradients())
    assert len(errors) >= 2 and all(error < 1e-12 for error in errors.values()), errors


def test_gradients_compared_on_samples_see_the_same_error(monkeypatch):
    p = problem("linear", "trainable").fresh()
    out = pytorch.eager_from_hidden(p)
    out.value.backward()
    gradients = {name: gradient * 1.01 for name, gradient in p.gradients().items()}
    monkeypatch.setattr("benchmarks.core.truth.EXACT_MACS", {"cpu": 0})
    monkeypatch.setattr("benchmarks.core.truth.SAMPLED_TOKENS", 3)
    monkeypatch.setattr("benchmarks.core.truth.SAMPLED_VOCABULARY", 5)
    truth = Truth(p)
    errors = truth.errors("list loss", out.value, out.logps, gradients)
    assert errors["d_hidden"] == pytest.approx(0.01, rel=1e-3)
    assert errors["d_weight"] == pytest.approx(0.01, rel=1e-3)
    assert len(truth._gradients["hidden", "list loss"][1]) == 3


def test_the_limits_follow_the_dtype():
    loose, tight = (
        Truth(problem("logits", "train", dtype)).limits({}, "list loss")["d_logits"]
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert tight < 1e-4 < loose < 0.1


def test_what_rounding_costs_eager_is_known_where_eager_is_not_asked_for():
    given = problem("linear", "trainable", torch.bfloat16)
    truth = Truth(given)
    (eager,) = measure.all_providers("linear", "trainable", ["eager"])
    _, out, _ = measure.run_once(eager, given)
    off = truth.limits({}, "list loss")["logps"] + 2 * truth.errors("list loss", out.value, out.logps, {})["logps"]

    def forward(p):
        out = eager.forward(p)
        return Output(out.value, out.logps + off * torch.tensor([1.0, -1, 1, -1]))

    alone = measure.measure(given, [Provider("as wrong as eager", "linear", forward, ("trainable",))], truth, SETTINGS)
    assert [(row["provider"], row["status"]) for row in alone["rows"]] == [("as wrong as eager", "ok")]


def test_peak_memory_of_a_child_process_is_that_of_the_tensors_it_makes(tmp_path):
    """Eager keeps float32 copies of 8 MB of bfloat16 logits: at least 16 MB, and not the size of a process."""
    draw = torch.Generator().manual_seed(0)
    case = TinyCase()
    case.hidden = torch.randn(4, 32, 32, generator=draw).bfloat16()
    case.weight = torch.randn(32000, 32, generator=draw).bfloat16()
    case.labels = torch.randint(0, 32000, (4, 32), generator=draw)
    p = Problem.from_case(case, "logits", "train")
    p.save(tmp_path / "problem.pt")
    peak, _ = measure.peak_in_child(tmp_path / "problem.pt", "eager", timeout=HANGS)
    assert 2 * p.gradient_bytes < peak < 12 * p.gradient_bytes


def recorded(*tables):
    header = {
        "schema": 1,
        "date": "2026-01-01T00:00:00+00:00",
        "machine": {
            "cpu": {"model": "Some CPU", "cores": 2, "instruction_sets": ["avx2"]},
            "gpu": None,
            "system": "Linux x86_64",
        },
        "versions": {"torch": "2.0"},
        "git": {"commit": "0123456789abcdef", "dirty": False},
    }
    return json.loads(json.dumps({**header, "tables": list(tables)}))


def test_json_round_trips_through_the_report(tmp_path):
    found = table("linear", "trainable")
    file = tmp_path / "results.json"
    file.write_text(json.dumps(recorded(found)))
    (loaded,) = report.load([file])
    assert report.markdown_table(loaded["tables"][0]) == report.markdown_table(found)
    assert report.rich_table(loaded["tables"][0]).row_count > 2
    assert "Some CPU, 2 threads, avx2" in tables.machine_line(loaded)


def test_a_file_of_another_schema_is_refused(tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"schema": 0, "tables": []}))
    with pytest.raises(ValueError, match="schema 0, expected 1"):
        report.load([file])


README = """before
<!-- bench:cpu/logits-train -->
stale
<!-- /bench:cpu/logits-train -->
between
<!-- bench:cuda/linear-frozen -->
<!-- /bench:cuda/linear-frozen -->
after
"""


def test_readme_markers_are_filled_and_filling_twice_changes_nothing():
    results = [recorded(table("logits", "train"))]
    once = report.fill_markers(README, results)
    assert report.fill_markers(once, results) == once
    assert "stale" not in once and once.startswith("before\n") and once.endswith("after\n") and "\nbetween\n" in once
    measured, unmeasured = once.split("between")
    eager = measured.split("| eager |")[1].split("\n")[0]
    assert eager.count(report.UNMEASURED) == 1  # memory, which this test leaves out
    assert "| ours frozen_head (triton) | " + report.UNMEASURED in unmeasured
    assert "Some CPU" not in unmeasured


def row(name, seconds, **changes):
    base = {
        "provider": name,
        "group": None,
        "computes": "list loss",
        "floor": False,
        "gemms": None,
        "status": "ok",
        "message": "",
        "seconds": seconds,
        "kernel_seconds": None,
        "one_run": len(seconds) == 1,
        "errors": {"logps": 1e-3, "d_logits": 2e-3},
        "peak_bytes": 4_000_000,
        "peak_method": "test",
    }
    return {**base, **changes}


def made_table(*rows, **changes):
    return {**problem("logits", "train").describe(), "rows": list(rows), **changes}


def test_of_a_group_only_the_fastest_formulation_is_shown():
    group = {"group": "torch.compile"}
    found = made_table(row("eager", [2.0]), row("torch.compile a", [3.0], **group), row("torch.compile b", [1.0], **group))
    assert [tables.title_of(r) for r in tables.shown(found)] == ["torch.compile (b)", "eager"]


def test_cells_say_time_against_eager_memory_and_spread():
    found = made_table(
        row("eager", [2.0, 2.0, 2.0]), row("ours", [1.0, 0.9, 1.1], peak_bytes=1_000_000), gradient_bytes=400_000
    )
    text = tables.cells(found, found["rows"][1])
    assert text["time, eager = 1"] == "0.50" and text["peak, eager = 1"] == "0.25"
    assert text["spread"] == "± 5%" and text["beyond gradients"] == "0.6 MB"


def test_a_short_table_has_our_fastest_exact_row_and_the_others_but_pairs():
    found = made_table(
        row("ours, tail", [0.5], rows=0.2),
        row("ours a", [1.0]),
        row("ours b", [2.0]),
        row("eager", [3.0]),
        row("moving", [0.1], floor=True),
        row("a peer's pairs", [1.5], computes="pair loss"),
        row("a peer's tokens", [4.0], computes="token logps"),
        row("absent", [], status="not run", message="not installed"),
    )
    names, _, *body = report.short_table(found).splitlines()
    assert names == "| provider | computes | time | time, eager = 1 | beyond gradients | logps | d logits |"
    assert [line.split(" | ")[0] for line in body] == ["| ours a", "| eager", "| a peer's tokens"]
    failed = made_table(row("ours a", [], status="error"), row("eager", [3.0]))
    assert len(report.short_table(failed).splitlines()) == 3  # eager's row stays
    text = "<!-- short:cpu/logits-train/tiny -->\n<!-- /short:cpu/logits-train/tiny -->"
    assert "| ours a | list loss | 1.00 s (1 run) | 0.33 |" in report.fill_markers(text, [recorded(found)])


def test_a_schedule_stands_beside_its_gemms():
    head = {"T": 8, "ignored": 3, "H": 4, "V": 16, "schedule": "recompute", "seconds": 2e-3, "GEMMs alone": 1e-3}
    head |= {"time / GEMMs alone": 2.0, "TFLOP/s": 700.4, "peak bytes": 5_000_000}
    result = {**recorded(), "steps": [{"step": "head", "rows": [head]}, {"step": "tune", "rows": []}]}
    assert "| 8 - 3 x 4 x 16 | `recompute` | 2 ms | 1 ms | 2.000 | 700 | 5.0 MB |" in report.markdown("cuda/head", [result])
    assert report.markdown("cuda/head", [recorded()]) == "not yet measured\n"


def test_the_floor_is_the_faster_of_the_dtypes():
    floors = [row(n, [t], floor=True, gemms=3) for n, t in (("3 GEMMs only", 4.0), ("3 GEMMs only, float32", 1.0))]
    found = made_table(*floors, row("ours", [2.0], gemms=3), side="linear", mode="trainable", gemm_flops=10**9)
    assert tables.cells(found, found["rows"][-1])["GEMMs alone / time"] == "0.50"
    assert tables.cells(found, found["rows"][-1])["GFLOP/s"] == "2"


def test_plots_are_drawn_for_tables_and_for_sweeps(tmp_path):
    plots = pytest.importorskip("benchmarks.reporting.plots", exc_type=ImportError)
    tables = [
        made_table(row("eager", [2.0 * k, 2.1 * k]), row("ours", [1.0 * k, 1.1 * k]), V=1000 * k, case=f"V{k}") for k in (1, 2)
    ]
    names = {path.name for path in plots.draw([recorded(*tables)], tmp_path)}
    assert all((tmp_path / name).stat().st_size > 5000 for name in names)
    assert {n.rsplit("-", 1)[1] for n in names if "against" not in n} == {"time.png", "cost.png"}
    assert sum("against-V" in n for n in names) == 1


def test_a_peak_that_was_not_measured_is_not_drawn_as_nothing(tmp_path, monkeypatch):
    plots = pytest.importorskip("benchmarks.reporting.plots", exc_type=ImportError)
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    plots.cost_bars(made_table(row("eager", [2.0], peak_bytes=None), row("ours", [1.0], peak_bytes=5_000_000)), tmp_path)
    memory, time = ([text.get_text() for text in axis.texts] for axis in figures[0].axes)
    assert memory == ["not measured", "5.0 MB"] and len(time) == 2 and "not measured" not in time
    assert [bar.get_width() for bar in figures[0].axes[0].patches] == [0, 5_000_000]


@pytest.mark.parametrize("suite", suites.SUITES)
def test_every_suite_names_cases_that_can_be_built_and_providers_that_exist(suite):
    import re

    from benchmarks.core import cases

    for job in suites.jobs(suite, "cpu"):
        named = {"prefix": Shape.NAME, "trainer": TrainerStep.NAME}.get(job.side, cases.MADE_UP)
        assert job.case in cases.REAL or re.fullmatch(named, job.case), job.case
        assert getattr(torch, job.dtype).is_floating_point
        for mode in job.modes:
            assert any(p.name.startswith("ours") for p in measure.all_providers(job.side, mode))


def test_shapes_and_dtypes_replace_the_suites():
    found = suites.jobs("logits", "cpu", ["T64-H16-V100-m4"], ["float32", "bfloat16"])
    assert [(j.case, j.side, j.dtype) for j in found] == [
        ("T64-H16-V100-m4", "logits", "float32"),
        ("T64-H16-V100-m4", "logits", "bfloat16"),
    ]
    with pytest.raises(ValueError, match=r"suite: got 'no', expected one of quick"):
        suites.jobs("no", "cpu")


def test_providers_are_chosen_by_pattern_or_by_group():
    names = [p.name for p in registry.select("linear", "frozen", ["OURS*", "torch.compile"])]
    assert "ours frozen_head (torch)" in names and "eager" not in names
    assert sum(n.startswith("torch.compile") for n in names) == 3


def test_past_the_deadline_eager_and_ours_are_still_measured_and_the_others_say_why_not(monkeypatch):
    monkeypatch.setattr(measure, "peak_in_child", lambda file, name, timeout: (len(name), "letters"))
    p = problem("logits", "train")
    late = measure.Settings(rounds=3, deadline=0.0)
    found = measure.measure(p, measure.all_providers("logits", "train", ["eager", "ours (torch)", "log_*"]), Truth(p), late)
    by_name = {r["provider"]: r for r in found["rows"]}
    assert [len(by_name[n]["seconds"]) for n in ("eager", "ours (torch)", "log_softmax a row")] == [1, 1, 0]
    assert [by_name[n]["peak_bytes"] for n in ("eager", "ours (torch)", "log_softmax a row")] == [5, 12, None]
    assert by_name["log_softmax a row"]["status"] == "not run" and "time limit" in by_name["log_softmax a row"]["message"]


def test_an_overwriting_provider_gets_its_own_copy_and_its_gradient_is_not_copied():
    p = problem("logits", "train")
    before = p.logits.clone()
    inplace = measure.all_providers("logits", "train", ["ours (torch), in place"])[0]
    fresh = p.fresh(copy=True)
    measure.run_once(inplace, fresh, ready=True)
    assert torch.equal(p.logits, before)
    assert fresh.gradients()["logits"].data_ptr() == fresh.logits.data_ptr()


def test_a_star_puts_all_cases_of_a_mode_in_one_table_a_row_for_each_of_our_schedules():
    def provider(name, seconds, peak, **changes):
        return row(name, [seconds], peak_bytes=peak * 10**6, gemms=3, **changes)

    first = made_table(
        provider("eager", 4.0, 700),
        provider("ours list_hold (torch)", 2.0, 300),
        {**provider("ours recompute (torch)", 3.0, 110), "gemms": 4},
        provider("torch.compile a", 1.0, 500, group="torch.compile"),
        {**provider("3 GEMMs only", 1.5, 0), "floor": True},
        gradient_bytes=10**8,
    )
    first |= {"side": "linear", "mode": "trainable"}
    names, hold, recompute, *others = by_shape([first, {**first, "case": "another"}])
    assert names[:2] == ["case", "schedule"] and [x[:2] for x in others] == [["another", "list_hold"], ["another", "recompute"]]
    assert hold[1:3] == ["list_hold", "2.00 s (1 run)"] and hold[4:8] == ["0.75", "0.50", "2.00", ""]
    assert hold[8:11] == ["200.0 MB", "400.0 MB", "600.0 MB"]
    assert recompute[1:3] == ["recompute", "3.00 s (1 run)"] and recompute[4:8] == ["", "0.33", "1.33", ""]
    text = report.markdown("cpu/linear-trainable/*/float32", [recorded(first, {**first, "dtype": "bfloat16"})])
    assert text.count("| list_hold |") == text.count("| recompute |") == 1


def test_a_slow_first_run_with_its_imports_is_no_sample_and_one_run_says_so():
    (eager,) = registry.select("logits", "score", ["eager"])
    runs = []

    def forward(p):
        time.sleep(0.2 if runs else 1.0)
        runs.append(p)
        return eager.forward(p)

    p = problem("logits", "score")
    (only,) = measure.measure(p, [replace(eager, forward=forward)], Truth(p), replace(SETTINGS, guard_s=0.1))["rows"]
    assert len(runs) == 2 and len(only["seconds"]) == 1 and 0.2 <= only["seconds"][0] < 1
    assert "(1 run)" in report.markdown_table(made_table(only))


def test_log_probs_of_tokens_that_were_rounded_are_wrong_unless_that_is_said():
    given = problem("logits", "train", torch.bfloat16)
    forward = _eager_variant(lambda logps, p: logps.bfloat16().float())
    found = [Provider(name, "logits", forward, ("train",), rounds_tokens=name == "said") for name in ("said", "unsaid")]
    rows = measure.measure(given, found, Truth(given), SETTINGS)["rows"]
    assert [row["status"] for row in rows] == ["ok", "WRONG"]


@pytest.mark.parametrize(
    ("mode", "count", "use"),
    [("score", 1, {}), ("frozen", 2, {"fuse_hidden_grad": True}), ("trainable", 3, {"in_place": True}), ("trainable", 4, {})],
)
def test_a_floor_walks_the_tiles_of_its_schedule(monkeypatch, mode, count, use):
    asked = []

    def tile_shape(tokens, width, vocabulary, dtype, device, *, casts, **use):
        asked.append((casts, use))
        return 7, 8

    monkeypatch.setattr("benchmarks.providers.floors.tile_shape", tile_shape)
    given = problem("linear", mode)
    (floor,) = registry.select("linear", mode, [f"{count} GEMMs only"])
    measure.run_once(floor, floor.prepare(given))
    assert asked == [(False, use)]


def test_recorded_rows_would_pass_the_checks_of_today():
    flags = {p.name: p for p in registry.REGISTRY}
    checked = 0
    for file in (ROOT / "benchmarks/results").glob("*/*.json"):
        for table in json.loads(file.read_text()).get("tables", ()):
            rows = {row["provider"]: row for row in table["rows"] if row["status"] == "ok" and not row["floor"]}
            eager, eps = rows.get("eager"), torch.finfo(getattr(torch, table["dtype"])).eps
            nats = table["scored_tokens"] / table["candidates"] * math.log(table["V"])  # of a candidate, about
            for name, row in rows.items() if eager else ():
                for kind, error in row["errors"].items():
                    extra = {"logps": 1e-6 * nats}.get(kind, max(eps, 1e-5) + flags[name].merges)
                    if kind != "loss" and not (kind == "logps" and flags[name].rounds_tokens):
                        assert error <= 4 * eager["errors"][kind] + extra, (file.name, table["case"], name, kind)
                        checked += 1
    assert checked > 100

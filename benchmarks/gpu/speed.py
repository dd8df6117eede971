"""How fast the kernels are against what the card can do and against others, with shipped and with tuned launches.

Each step yields rows of numbers; benchmarks/gpu_check.py runs them and prints the tables.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from statistics import median

import torch

import larpo_kernels as lk
from benchmarks import tune as tuning
from benchmarks.core import cases
from benchmarks.core.measure import Settings, all_providers, auto_plan, measure
from benchmarks.core.problem import IGNORE, SCHEDULES, Problem
from benchmarks.core.truth import Truth
from benchmarks.gpu import calls, device
from benchmarks.gpu.plan import shapes
from benchmarks.gpu.steps import read_rows
from benchmarks.gpu.timing import Times, interleaved
from benchmarks.providers.floors import products

TINY_SHARE = 30  # of the layers and the vocabulary one in so many, in a dry run
TUNE_LAST_S = 8  # a problem whose measuring has begun may end so late
EVERYBODYS = ("eager", "*GEMMs only", "moving the same bytes")
COMPARED = {"train": "ours ({})", "frozen": "ours frozen_head ({})", "trainable": "ours list_hold ({})"}  # with others, by mode


# --- launches ------------------------------------------------------------------------------------------------------


def tune(context) -> Iterator[dict]:
    """Measures the candidates that the step "ahead: launches" compiled; each group's winners are on disk at once."""
    ahead = defaultdict(list)
    for row in read_rows(context.rows, "ahead: launches"):
        ahead[row["group"]].append(row["values"])
    yield from tuning.tuned(context.seconds - TUNE_LAST_S, context.launch, ahead.__getitem__)


def _launches(context) -> dict[str, dict[str, int]]:
    """Names of launches -> values: the shipped ones, and the tuned ones where they differ."""
    arch = tuning.arch_here()
    own, tuned = tuning.shipped(arch), tuning.read(context.launch, arch)
    return {"shipped": own, **({"tuned": own | tuned} if any(own.get(name) != tuned[name] for name in tuned) else {})}


# --- rows ----------------------------------------------------------------------------------------------------------


def rows(context) -> Iterator[dict]:
    """token_logps, forward and backward, against copy_ of as many bytes as must cross memory."""
    launches = _launches(context)
    yield from _each(shapes().rows, lambda n, v, dtype: _row(n, v, getattr(torch, dtype), launches))


def _each(found: tuple, rows_of: Callable) -> Iterator[dict]:
    """The rows of every shape; one that raises is a row that says so."""
    for shape in found:
        try:
            yield from rows_of(*shape)
        except Exception as error:
            what = " x ".join(map(str, shape))
            yield {"what": what, "ok": False, "error": f"{type(error).__name__}: {error}"[:200]}
        device.release()


def _row(n: int, v: int, dtype: torch.dtype, launches: dict) -> Iterator[dict]:
    logits, passes = calls.of_rows(n, v, dtype)
    flat, other = logits.view(-1), torch.empty(n * v, dtype=dtype, device=device.name())
    half, arch = n * v // 2, tuning.arch_here()
    functions = {"copy of half": lambda: other[:half].copy_(flat[:half])}  # reads and writes: the bytes of one read
    functions["copy"] = lambda: other.copy_(flat)
    for name, values in launches.items():
        functions |= {f"{name} {which}": tuning.under(values, arch, run) for which, run in passes.items()}
    times = interleaved(functions, rounds=15, budget_s=1.0)
    host = interleaved(passes, rounds=15, budget_s=0.3)
    found = {name: median(x.device) for name, x in times.items()}
    size = n * v * logits.element_size()
    for name in launches:
        yield {
            "T": n,
            "V": v,
            "dtype": str(dtype).removeprefix("torch."),
            "launch": name,
            "forward": found[f"{name} forward"],
            "backward": found[f"{name} backward"],
            "copy": found["copy"],
            "copy of half": found["copy of half"],
            "forward on the host": median(host["forward"].host),
            "backward on the host": median(host["backward"].host),
            "forward GB/s": size / found[f"{name} forward"] / 1e9,
            "backward GB/s": 2 * size / found[f"{name} backward"] / 1e9,
            "copy GB/s": 2 * size / found["copy"] / 1e9,
            "forward of copy": found["copy of half"] / found[f"{name} forward"],
            "backward of copy": found["copy"] / found[f"{name} backward"],
        }


# --- the head ------------------------------------------------------------------------------------------------------


def head(context) -> Iterator[dict]:
    """Each schedule, forward and backward, against whole GEMMs without tiles, accumulation or a softmax; peak memory."""
    launches = _launches(context)
    yield from _each(shapes().heads, lambda *shape: _head(*shape, launches))


def _head(n: int, ignored: int, h: int, v: int, launches: dict) -> Iterator[dict]:
    hidden, weight, labels, upstream = calls.head_inputs(n, h, v)
    labels[:ignored] = IGNORE
    steps = {s: calls.of_head(s, hidden, weight, labels, upstream, IGNORE if ignored else None) for s in SCHEDULES}
    arch = tuning.arch_here()
    ours = {(name, s): tuning.under(values, arch, run) for name, values in launches.items() for s, run in steps.items()}
    functions = {**products(hidden, weight), **{f"{name} {s}": run for (name, s), run in ours.items()}}
    times: dict[str, Times] = interleaved(functions, rounds=9, budget_s=5.0)
    found = {name: median(x.device) for name, x in times.items()}
    alone = {
        "score_only": found["logits"],
        "frozen_head": found["logits"] + found["d hidden"],
        "list_hold": found["logits"] + found["d hidden"] + found["d weight"],
        "recompute": 2 * found["logits"] + found["d hidden"] + found["d weight"],
    }
    for (name, schedule), run in ours.items():
        seconds, gemms = found[f"{name} {schedule}"], SCHEDULES[schedule][1]
        device.release()
        yield {
            "T": n,
            "ignored": ignored,
            "H": h,
            "V": v,
            "schedule": schedule,
            "launch": name,
            "seconds": seconds,
            "on the host": median(times[f"{name} {schedule}"].host),
            "TFLOP/s": gemms * 2 * (n - ignored) * h * v / seconds / 1e12,
            "GEMMs alone": alone[schedule],
            "GEMMs TFLOP/s": gemms * 2 * n * h * v / alone[schedule] / 1e12,
            "time / GEMMs alone": seconds / alone[schedule],
            "peak bytes": device.peak_bytes(run),
        }


# --- where the time goes -------------------------------------------------------------------------------------------


def profile(context) -> Iterator[dict]:
    """Kernels by time, of one forward and backward of each schedule and of the loss from logits."""
    n, h, v = shapes().profile
    given = calls.head_inputs(n, h, v)
    for schedule in ("list_hold", "frozen_head", "recompute", "score_only"):
        yield {"what": schedule, "kernels": _kernels(calls.of_head(schedule, *given))}
    logits = torch.empty(n // 64, 64, v, dtype=torch.bfloat16, device=device.name()).normal_().requires_grad_()
    relevance = torch.randn(n // 64, device=device.name())

    def loss():
        out = lk.fused_listwise_loss(logits, given[2].view(-1, 64), relevance, list_sizes=min(8, len(relevance)))
        torch.autograd.grad(out.loss, logits)

    yield {"what": "loss from logits", "kernels": _kernels(loss)}


def _kernels(run, most: int = 12) -> list[dict]:
    """Name, milliseconds and launches of the kernels that take the most time."""
    run()
    device.synchronize()
    activity = torch.profiler.ProfilerActivity.CPU if device.dry() else torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as seen:
        run()
        device.synchronize()
    clock = "self_cpu_time_total" if device.dry() else "self_device_time_total"
    events = sorted(((getattr(event, clock), event) for event in seen.key_averages()), key=lambda found: -found[0])[:most]
    return [{"kernel": event.key[:90], "ms": time / 1e3, "launches": event.count} for time, event in events]


# --- everybody else ------------------------------------------------------------------------------------------------


def case(context, name: str, side: str, mode: str) -> Iterator[dict]:
    """Ours, eager and floors, then torch.compile, as benchmarks/run.py measures them: a row is a table."""
    problem = _problem(name, side, mode)
    truth = Truth(problem)
    yield _measured(problem, truth, [f"ours*({device.backend()})*", *EVERYBODYS])
    if not device.dry():
        yield _in_turns(problem, truth, "torch.compile cross_entropy")


def peer(context, name: str, sides: tuple[tuple[str, str], ...]) -> Iterator[dict]:
    for side, mode in sides:
        problem = _problem(shapes().peer_case, side, mode)
        yield _in_turns(problem, Truth(problem), name)
        device.release()


def _in_turns(problem: Problem, truth: Truth, name: str) -> dict:
    """One of the others, eager and ours."""
    return _measured(problem, truth, [name, "eager", COMPARED[problem.mode].format(device.backend())], turns_with=name)


def _problem(name: str, side: str, mode: str) -> Problem:
    return Problem.from_case(cases.build(name, torch.bfloat16, device.name(), 0), side, mode)


def _measured(problem: Problem, truth: Truth, names: list[str], turns_with: str | None = None) -> dict:
    settings = Settings(rounds=9, budget_s=3.0, guard_s=3.0, memory=not device.dry())
    found = measure(problem, all_providers(problem.side, problem.mode, names), truth, settings)
    return _row_of(found, auto_plan(problem), turns_with)


def _row_of(table: dict, plan: str | None, turns_with: str | None = None) -> dict:
    """A table as a step's result: it fails if ours is wrong; the failures of others are in the table.

    turns_with: another library. After an error of its kernels all that runs on the device raises, ours too.
    """
    broken = any(row["provider"] == turns_with and row["status"] == "error" for row in table["rows"])
    failures = ("WRONG",) if broken else ("WRONG", "error")
    ours = [row for row in table["rows"] if row["provider"].startswith("ours")]
    wrong = [f"{row['provider']} {row['status']} {row['message']}" for row in ours if row["status"] in failures]
    what = f"{table['side']} {table['mode']} {table['case']}"
    failed = {"error": "; ".join(wrong)} if wrong else {}
    return {"what": what, "ok": not wrong, **failed, "table": {**table, "plan": plan, "small": False}}


def model(context) -> Iterator[dict]:
    """A model's training step with the prompt of a list run once (FlexAttention), against a row for every candidate."""
    from benchmarks.providers.prefix import ModelStep, SeparateRows

    share = TINY_SHARE if device.dry() else None
    step = ModelStep.build(shapes().model, torch.bfloat16, device.name(), 0, share)
    settings = Settings(rounds=5, budget_s=6, guard_s=10, memory=not device.dry())
    yield _row_of(measure(step, all_providers("prefix", "step"), SeparateRows(step), settings), None)

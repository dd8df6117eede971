"""Makes one table: each provider of a problem is checked against float64 and timed once, then memory, then all in turns."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

import larpo_kernels as lk
from benchmarks.core.memory import peak_in_child, peak_on_gpu
from benchmarks.core.problem import Problem
from benchmarks.core.truth import Truth
from benchmarks.providers.registry import Output, Provider
from benchmarks.providers.registry import select as all_providers

__all__ = ["Settings", "all_providers", "auto_plan", "measure", "run_once"]


@dataclass(frozen=True)
class Settings:
    rounds: int = 7  # timed runs of each provider at most
    budget_s: float = 20.0  # time for the rounds of one table
    guard_s: float = 5.0  # a provider whose run takes longer is timed once
    sample_s: float = 0.0  # calls that are queued for one sample: as many as take so long; 0: one call
    memory: bool = True
    memory_from: int = 0  # bytes of gradients below which peak memory is pages and no figure
    memory_guard_s: float = 30.0  # a provider whose run takes longer is not run again for its memory
    deadline: float | None = None  # time.monotonic() after which only what matters most is run, once

    @property
    def late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline


def run_once(provider: Provider, problem: Problem, *, ready: bool = False, upstream=None):
    """One forward, and backward where the mode asks for it -> (seconds, Output, gradients by input name)."""
    if not ready:
        problem = problem.fresh(copy=provider.overwrites_input)
    if provider.computes == "token logps" and upstream is None:
        upstream = torch.ones_like(problem.labels, dtype=torch.float32)
    _wait(problem)
    start = time.perf_counter()
    out = _call(provider, problem, upstream)
    _wait(problem)
    seconds = time.perf_counter() - start
    return seconds, out, problem.gradients()


def run_queued(provider: Provider, problem: Problem, calls: int, upstream) -> float:
    """Seconds of one of `calls` calls, forward and backward, none of which waits for the device.

    On a CPU it is CPU time, which other work on the machine does not lengthen; with one thread that is the time."""
    clock = time.process_time if problem.device.type == "cpu" else time.perf_counter
    inputs = [problem.fresh(copy=provider.overwrites_input) for _ in range(calls)]
    _wait(problem)
    start = clock()
    while inputs:
        _call(provider, inputs.pop(), upstream)
    _wait(problem)
    return (clock() - start) / calls


def _call(provider: Provider, problem: Problem, upstream) -> Output:
    with torch.set_grad_enabled(problem.mode != "score"):
        out = provider.forward(problem)
    if out.value is not None and out.value.requires_grad:  # a trainer's step has had its backward
        out.value.backward(upstream.to(out.value.dtype) if provider.computes == "token logps" else None)
    return out


def kernel_seconds(run: Callable[[], object]) -> float:
    """The sum over the kernels of run()."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in seen.key_averages()) / 1e6


def _wait(problem: Problem) -> None:
    if problem.device.type == "cuda":
        torch.cuda.synchronize()


def measure(
    problem: Problem,
    providers: list[Provider],
    truth: Truth,
    settings: Settings = Settings(),
    progress: Callable[[str], None] = lambda step: None,
) -> dict:
    """A table as it is recorded: the problem's description and one row a provider, every sample kept."""
    entries = [Entry(p, problem, truth) for p in providers]
    _check(entries, settings, progress)
    _time(entries, settings, progress, range(1))
    settings = replace(settings, memory=settings.memory and problem.describe()["gradient_bytes"] >= settings.memory_from)
    kept = [entry for entry in entries if entry.provider.finish]  # from run to run: a child process would find no memory
    holding = bool(kept) and problem.device.type == "cpu"
    if settings.memory and not holding:  # before the other rounds: if time runs out, a sample is missed less than a figure
        _peaks(entries, problem, settings, progress)
    _time(entries, settings, progress, range(1, settings.rounds))
    if settings.sample_s and problem.device.type == "cuda":
        for entry in entries:
            entry.time_kernels()
    if holding:
        _finish(kept)
    if settings.memory and not settings.late:  # of a group whose fastest formulation is another one after more rounds
        _peaks(entries, problem, settings, progress)
    if not holding:
        _finish(kept)
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()  # the next problem has other shapes
    return {**problem.describe(), "rows": [entry.row for entry in entries]}


def _finish(entries: list[Entry]) -> None:
    for entry in entries:
        entry.provider.finish(entry.problem)


def auto_plan(problem: Problem) -> str | None:
    """Which schedule "auto" takes here, and why."""
    if problem.side != "linear":
        return None
    p = problem.fresh()
    with torch.set_grad_enabled(problem.mode != "score"):
        plan = lk.plan(p.hidden, p.weight, p.labels)
    return f"{plan.schedule}, {plan.reason}"


class Entry:
    """A provider on a problem, and the row that grows as it is measured."""

    def __init__(self, provider: Provider, problem: Problem, truth: Truth):
        self.provider, self.truth = provider, truth
        self.upstream = truth.target(provider.computes).upstream
        gemms = (provider.gemms or {}).get(problem.mode)
        self.row = {
            "provider": provider.name,
            "group": provider.group,
            "computes": provider.computes,
            "floor": provider.floor,
            "gemms": gemms,
            "status": "ok",
            "message": "",
            "seconds": [],
            "kernel_seconds": None,
            "one_run": False,
            "loss": None,
            "errors": {},
            "rows": None,  # share of the vocabulary's rows that gradients were formed of, where that is not all
            "peak_bytes": None,
            "peak_method": None,
        }
        self.problem = problem
        missing = provider.missing(problem, problem.device.type)
        if missing:
            self.row.update(status="not run", message=missing)
        else:
            self.problem = self._guarded(lambda: provider.prepare(problem)) or problem

    @property
    def alive(self) -> bool:
        return self.row["status"] == "ok"

    def run(self) -> tuple[float, Output, dict] | None:
        return self._guarded(lambda: run_once(self.provider, self.problem, upstream=self.upstream))

    def sample(self, settings: Settings) -> float | None:
        """Seconds of a call. The first sample is one call, and its time decides how many calls the others take."""
        if not settings.sample_s:
            done = self.run()
            return done and done[0]
        first = self.row["seconds"][:1]
        calls = max(1, min(MOST_QUEUED, int(settings.sample_s / first[0]))) if first else 1
        return self._guarded(lambda: run_queued(self.provider, self.problem, calls, self.upstream))

    def time_kernels(self) -> None:
        """The time of the kernels alone on a GPU, however long the host takes to launch them."""
        if self.alive:
            inputs = self.problem.fresh(copy=self.provider.overwrites_input)
            self.row["kernel_seconds"] = self._guarded(
                lambda: kernel_seconds(lambda: _call(self.provider, inputs, self.upstream))
            )

    def _guarded(self, measured: Callable):
        try:
            return measured()
        except torch.OutOfMemoryError:
            self.row.update(status="out of memory")
        except Exception as error:  # a failure of another library is a result, not the end of the run
            text = str(error).strip().splitlines() or [""]
            memory = "can't allocate memory" in str(error)
            self.row.update(
                status="out of memory" if memory else "error",
                message=f"{type(error).__name__}: {text[0]}"[:300],
            )
        if self.problem.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def check(self, allowed: dict[str, float]) -> None:
        """The first run: imports, warms up, compares, and is never a sample."""
        with lk.TailShares() as shares:
            done = self.run()
        if done is None or self.provider.floor:
            return
        self.row["rows"] = shares.rows if shares.tokens else None
        allowed = {name: limit + self.provider.merges * name.startswith("d_") for name, limit in allowed.items()}
        _, out, gradients = done
        self.row["message"] = out.note
        self.row["loss"] = float(out.value.detach()) if out.value.dim() == 0 else None
        errors = self.truth.errors(self.provider.computes, out.value, out.logps, gradients)
        self.row["errors"] = {name: error if math.isfinite(error) else None for name, error in errors.items()}
        over = [name for name, error in errors.items() if not error <= allowed[name]]
        if over:
            said = ", ".join(f"{name} {errors[name]:.1e} > {allowed[name]:.1e}" for name in over)
            self.row.update(status="WRONG", message=said)


MOST_QUEUED = 100
LATE = "the time limit of this run was reached"


def _importance(entry: Entry) -> int:
    p = entry.provider
    return 0 if p.name == "eager" else 1 if p.name.startswith("ours") else 2 if p.floor else 3 if p.group else 4


def _check(entries: list[Entry], settings: Settings, progress) -> None:
    """Eager first, even where it is not timed: its errors show what rounding costs in this dtype. Then by importance."""
    eager = {}
    if entries and not any(entry.provider.name == "eager" for entry in entries):
        entries = [*_only_to_compare(entries[0]), *entries]
    for entry in sorted(entries, key=_importance):
        progress(f"check {entry.provider.name}")
        if not entry.alive:
            continue
        if settings.late and _importance(entry) > 2:
            entry.row.update(status="not run", message=LATE)
            continue
        allowed = entry.truth.limits(eager, entry.provider.computes, rounds_tokens=entry.provider.rounds_tokens)
        entry.check(allowed if entry.provider.name != "eager" else dict.fromkeys(allowed, math.inf))
        if entry.provider.name == "eager":
            eager = {name: error for name, error in entry.row["errors"].items() if error is not None}
        gc.collect()


def _only_to_compare(entry: Entry) -> list[Entry]:
    """Eager on the same problem, where it has one."""
    problem = entry.truth.problem
    return [Entry(p, problem, entry.truth) for p in all_providers(problem.side, problem.mode, ["eager"])]


def _time(entries: list[Entry], settings: Settings, progress, rounds: range) -> None:
    """Rounds over all providers, so that a slow minute of the machine hits everybody."""
    start = time.perf_counter()
    for i in rounds:
        if i and (settings.late or time.perf_counter() - start > settings.budget_s):
            break
        progress(f"time, round {i + 1} of {settings.rounds}")
        for entry in entries:
            if not entry.alive or entry.row["one_run"]:
                continue
            seconds = entry.sample(settings)
            if seconds is None:
                continue
            entry.row["seconds"].append(round(seconds, 8))
            entry.row["one_run"] = seconds > settings.guard_s


def _peaks(entries: list[Entry], problem: Problem, settings: Settings, progress) -> None:
    """Of a group only the fastest: the one the report shows."""
    wanted = [e for e in entries if e.alive and not e.provider.floor and e.row["seconds"] and _leads(e, entries)]
    wanted = sorted((e for e in wanted if e.row["peak_bytes"] is None), key=_importance)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "problem.pt"
        if problem.device.type == "cpu":
            problem.save(file)
        for entry in wanted:
            progress(f"memory of {entry.provider.name}")
            slow = median(entry.row["seconds"]) > settings.memory_guard_s
            if slow or (settings.late and _importance(entry) > 1):
                entry.row["message"] = f"memory not measured: {'a run takes too long' if slow else LATE}"
                continue
            if problem.device.type == "cuda":
                inputs = entry.problem.fresh(copy=entry.provider.overwrites_input)
                peak = peak_on_gpu(lambda e=entry, p=inputs: run_once(e.provider, p, ready=True))
                entry.row.update(peak_bytes=peak, peak_method="torch.cuda.max_memory_allocated")
                continue
            try:
                timeout = 180 + 20 * median(entry.row["seconds"])
                peak, method = peak_in_child(file, entry.provider.name, timeout)
                entry.row.update(peak_bytes=peak, peak_method=method)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                entry.row["message"] = f"memory not measured: {error}"[:300]


def _leads(entry: Entry, entries: list[Entry]) -> bool:
    if entry.provider.group is None:
        return True
    rivals = [e for e in entries if e.provider.group == entry.provider.group and e.row["seconds"] and e.alive]
    return entry is min(rivals, key=lambda e: median(e.row["seconds"]))

"""How fast the kernels are against what the card can do: rows against copying, the head against its GEMMs alone.

Each function yields rows of numbers; benchmarks/gpu_check.py runs them and prints the tables.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

import larpo_kernels as lk
from benchmarks.core import cases
from benchmarks.core.measure import Settings, all_providers, measure
from benchmarks.core.problem import IGNORE, Problem
from benchmarks.core.truth import Truth
from benchmarks.gpu.timing import medians
from benchmarks.providers.prefix import ModelStep, SeparateRows

VOCABULARIES = (128256, 32000, 262144, 151936)
TOKENS = (8192, 1024, 4096, 16384)
HEAD = {"H": 4096, "V": 128256}
HEAD_TOKENS = (4096, 8192, 16384)
SCHEDULES = {  # schedule -> which inputs require grad, GEMMs
    "score_only": ((), 1),
    "frozen_head": (("hidden",), 2),
    "list_hold": (("hidden", "weight"), 3),
    "recompute": (("hidden", "weight"), 4),
}


# --- rows ----------------------------------------------------------------------------------------------------------


def rows() -> Iterator[dict]:
    """token_logps, forward and backward, against copy_ of as many bytes as must cross memory."""
    for v in VOCABULARIES:
        for n in TOKENS:
            yield _row(n, v, torch.bfloat16)
            torch.cuda.empty_cache()
    for n, v, dtype in ((8192, 50257, torch.bfloat16), (64, 128256, torch.bfloat16), (8192, 128256, torch.float32)):
        yield _row(n, v, dtype)


def _row(n: int, v: int, dtype: torch.dtype) -> dict:
    logits = torch.empty(n, v, dtype=dtype, device="cuda").normal_().requires_grad_()
    labels, upstream = torch.randint(v, (n,), device="cuda"), torch.randn(n, device="cuda")
    logps = lk.token_logps(logits, labels)
    flat, other = logits.detach().view(-1), torch.empty(n * v, dtype=dtype, device="cuda")
    half = n * v // 2

    def forward():
        with torch.no_grad():
            lk.token_logps(logits, labels)

    found = medians(
        {
            "forward": forward,
            "copy of half": lambda: other[:half].copy_(flat[:half]),  # reads and writes: the bytes of one read
            "backward": lambda: torch.autograd.grad(logps, logits, upstream, retain_graph=True),
            "copy": lambda: other.copy_(flat),
        },
        budget_s=1.0,
    )
    size = n * v * logits.element_size()
    return {
        "T": n,
        "V": v,
        "dtype": str(dtype).removeprefix("torch."),
        **found,
        "forward GB/s": size / found["forward"] / 1e9,
        "backward GB/s": 2 * size / found["backward"] / 1e9,
        "copy GB/s": 2 * size / found["copy"] / 1e9,
        "forward of copy": found["copy of half"] / found["forward"],
        "backward of copy": found["copy"] / found["backward"],
    }


# --- the head ------------------------------------------------------------------------------------------------------


def linear() -> Iterator[dict]:
    """Each schedule, forward and backward, against whole GEMMs without tiles, accumulation or a softmax; peak memory."""
    for n in HEAD_TOKENS:
        yield from _head(n, 0)
    yield from _head(4096, 3)  # tokens that count are rarely a multiple of 8


def _head(n: int, ignored: int) -> Iterator[dict]:
    torch.manual_seed(0)
    h, v = HEAD["H"], HEAD["V"]
    hidden = torch.randn(n, h, device="cuda").bfloat16()
    weight = (torch.randn(v, h, device="cuda") / h**0.5).bfloat16()
    labels = torch.randint(v, (n,), device="cuda")
    labels[:ignored] = IGNORE
    upstream = torch.randn(n, device="cuda")

    def step(schedule: str):
        wanted, _ = SCHEDULES[schedule]
        x, w = hidden.detach().requires_grad_("hidden" in wanted), weight.detach().requires_grad_("weight" in wanted)

        def run():
            logps = lk.linear_token_logps(x, w, labels, schedule=schedule)
            return torch.autograd.grad(logps, [t for t in (x, w) if t.requires_grad], upstream) if wanted else logps

        return run

    ours = {schedule: step(schedule) for schedule in SCHEDULES}
    found = medians({**_gemms(hidden, weight), **ours}, rounds=8, budget_s=8.0)
    alone = {
        "score_only": found["logits"],
        "frozen_head": found["logits"] + found["d hidden"],
        "list_hold": found["logits"] + found["d hidden"] + found["d weight"],
        "recompute": 2 * found["logits"] + found["d hidden"] + found["d weight"],
    }
    for schedule, run in ours.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        flops = SCHEDULES[schedule][1] * 2 * (n - ignored) * h * v
        yield {
            "T": n,
            "ignored": ignored,
            **HEAD,
            "schedule": schedule,
            "seconds": found[schedule],
            "TFLOP/s": flops / found[schedule] / 1e12,
            "GEMMs alone": alone[schedule],
            "GEMMs TFLOP/s": SCHEDULES[schedule][1] * 2 * n * h * v / alone[schedule] / 1e12,
            "GEMMs alone / time": alone[schedule] / found[schedule],
            "peak bytes": torch.cuda.max_memory_allocated() - before,
        }


def _gemms(hidden, weight) -> dict:
    """The products of the head, each as one GEMM."""
    tile = weight.new_empty(len(weight), len(hidden))
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)
    return {
        "logits": lambda: torch.mm(weight, hidden.t(), out=tile),
        "d hidden": lambda: torch.mm(tile.t(), weight, out=d_hidden),
        "d weight": lambda: torch.mm(tile, hidden, out=d_weight),
    }


# --- where the time goes -------------------------------------------------------------------------------------------


def profile() -> Iterator[dict]:
    """Kernels by time, of one forward and backward of each schedule and of the loss from logits."""
    n, h, v = 8192, HEAD["H"], HEAD["V"]
    hidden = torch.randn(n, h, device="cuda").bfloat16()
    weight = (torch.randn(v, h, device="cuda") / h**0.5).bfloat16()
    labels, upstream = torch.randint(v, (n,), device="cuda"), torch.randn(n, device="cuda")
    for schedule, (wanted, _) in SCHEDULES.items():
        x, w = hidden.detach().requires_grad_("hidden" in wanted), weight.detach().requires_grad_("weight" in wanted)

        def run(x=x, w=w, schedule=schedule, wanted=wanted):
            logps = lk.linear_token_logps(x, w, labels, schedule=schedule)
            if wanted:
                torch.autograd.grad(logps, [t for t in (x, w) if t.requires_grad], upstream)

        yield {"what": schedule, "kernels": _kernels(run)}
    logits = torch.empty(64, n // 64, v, dtype=torch.bfloat16, device="cuda").normal_().requires_grad_()
    relevance = torch.randn(64, device="cuda")

    def loss():
        out = lk.fused_listwise_loss(logits, labels.view(64, -1), relevance, list_sizes=8)
        torch.autograd.grad(out.loss, logits)

    yield {"what": "loss from logits", "kernels": _kernels(loss)}


def _kernels(run, most: int = 12) -> list[dict]:
    """Name, milliseconds and launches of the kernels that take the most time."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    events = sorted(seen.key_averages(), key=lambda e: -e.self_device_time_total)[:most]
    return [{"kernel": e.key[:90], "ms": e.self_device_time_total / 1e3, "launches": e.count} for e in events]


# --- everybody else ------------------------------------------------------------------------------------------------

SUITE = (  # case, side, modes; what matters most first
    ("T8192-H4096-V128256-m8", "logits", ("train",)),
    ("T8192-H4096-V128256-m8", "linear", ("frozen", "trainable")),
    ("T8192-H4096-V128256-m8-peaked", "linear", ("trainable",)),
    ("T4096-H4096-V262144-m8", "logits", ("train",)),
    ("T16384-H4096-V32000-m8", "logits", ("train",)),
    ("T4096-H4096-V128256-m8", "linear", ("frozen", "trainable")),
    ("T16384-H4096-V151936-m8", "linear", ("frozen", "trainable")),
)


def suites() -> Iterator[dict]:
    """Ours, eager, torch.compile and every installed peer, as benchmarks/run.py measures them: a row is its table."""
    for name, side, modes in SUITE:
        case = cases.build(name, torch.bfloat16, "cuda", 0)
        truth = None
        for mode in modes:
            start = time.perf_counter()
            problem = Problem.from_case(case, side, mode)
            truth = truth or Truth(problem)
            table = measure(problem, all_providers(side, mode), truth, Settings(rounds=9, budget_s=8, guard_s=3))
            wrong = [f"{r['provider']} {r['status']}" for r in table["rows"] if _failed(r)]
            what = f"{side} {mode} {name}" + (f": {', '.join(wrong)}" if wrong else "")
            yield {"what": what, "ok": not wrong, "seconds": time.perf_counter() - start, "table": table}
        del case, truth, problem
        torch.cuda.empty_cache()


def prefix() -> Iterator[dict]:
    """A model's training step with the prompt of a list run once (FlexAttention), against a row for every candidate."""
    for name in ("P1024-R1024-m8", "P2048-R512-m8"):
        start = time.perf_counter()
        step = ModelStep.build(name, torch.bfloat16, "cuda", 0)
        table = measure(step, all_providers("prefix", "step"), SeparateRows(step), Settings(rounds=5, budget_s=8, guard_s=10))
        wrong = [f"{r['provider']} {r['status']}" for r in table["rows"] if _failed(r)]
        yield {"what": name, "ok": not wrong, "seconds": time.perf_counter() - start, "table": table}
        del step
        torch.cuda.empty_cache()


def _failed(row: dict) -> bool:
    return row["provider"].startswith("ours") and row["status"] in ("WRONG", "error")

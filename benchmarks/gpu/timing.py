"""Times on a GPU: functions in turns, each between two events, medians over rounds."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

FLUSH_BYTES = 256 << 20  # several times any L2 cache
AHEAD_CYCLES = 1_000_000  # the GPU sleeps about half a millisecond, so that the host has queued what is timed


def interleaved(functions: dict[str, Callable], *, rounds: int = 15, budget_s: float = 5.0) -> dict[str, list[float]]:
    """Seconds of each function on the GPU, one sample a round, the cache emptied before each.

    Every function runs twice beforehand, so that nothing compiles or allocates for the first time while it is timed.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for function in functions.values():
        function()
        function()
    torch.cuda.synchronize()
    samples = {name: [] for name in functions}
    start = time.perf_counter()
    for _ in range(rounds):
        events = {}
        for name, function in functions.items():
            flush.zero_()
            torch.cuda._sleep(AHEAD_CYCLES)
            events[name] = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[name][0].record()
            function()
            events[name][1].record()
        torch.cuda.synchronize()
        for name, (begin, end) in events.items():
            samples[name].append(begin.elapsed_time(end) / 1e3)
        if time.perf_counter() - start > budget_s:
            break
    return samples


def medians(functions: dict[str, Callable], **options) -> dict[str, float]:
    return {name: median(samples) for name, samples in interleaved(functions, **options).items()}

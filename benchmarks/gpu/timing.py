"""Times on a GPU: functions in turns, each between two events, medians over rounds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch

from benchmarks.gpu import device

FLUSH_BYTES = 256 << 20  # several times any L2 cache


@dataclass
class Times:
    """Of one function, a sample a round."""

    device: list[float] = field(default_factory=list)  # seconds between two events
    host: list[float] = field(default_factory=list)  # seconds until the call returned, the device asleep


def interleaved(
    functions: dict[str, Callable],
    *,
    rounds: int = 15,
    budget_s: float = 5.0,
    warm_s: float = float("inf"),
    failed: dict[str, str] | None = None,
) -> dict[str, Times]:
    """Every function in turn, the cache emptied before each.

    Each runs twice beforehand, so that nothing compiles or allocates for the first time while it is timed; what has not
    been reached after warm_s seconds is left out. failed: receives the messages of functions that raise, which are left out
    too; without it they raise here.
    """
    flush = torch.empty(1 if device.dry() else FLUSH_BYTES, dtype=torch.int8, device=device.name())
    samples = {name: Times() for name in _warm(functions, warm_s, failed)}
    start = time.perf_counter()
    for _ in range(rounds):
        stamps = {}
        for name, times in samples.items():
            flush.zero_()
            device.sleep_ahead()
            begin = device.Stamp()
            called = time.perf_counter()
            functions[name]()
            times.host.append(time.perf_counter() - called)
            stamps[name] = begin, device.Stamp()
        device.synchronize()
        for name, (begin, end) in stamps.items():
            samples[name].device.append(begin.seconds_to(end))
        if time.perf_counter() - start > budget_s:
            break
    return samples


def _warm(functions: dict[str, Callable], seconds: float, failed: dict[str, str] | None) -> list[str]:
    """The functions that can be timed."""
    good, start = [], time.perf_counter()
    for name, function in functions.items():
        if good and time.perf_counter() - start > seconds:
            break
        try:
            function()
            function()
            device.synchronize()
        except Exception as error:
            if failed is None:
                raise
            failed[name] = f"{type(error).__name__}: {error}"[:200]
        else:
            good.append(name)
    return good


def medians(functions: dict[str, Callable], **options) -> dict[str, float]:
    return {name: median(times.device) for name, times in interleaved(functions, **options).items()}

"""What the steps of gpu_check run on: a GPU; in a dry run a CPU, with stand-ins for what only CUDA has."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import contextmanager

import torch

DRY_RUN = "GPU_CHECK_DRY_RUN"  # an environment variable that gpu_check sets for its steps
AHEAD_CYCLES = 2_000_000  # the GPU sleeps about a millisecond, so that the host has queued what is timed


def dry() -> bool:
    return os.environ.get(DRY_RUN) == "1"


def name() -> str:
    return "cpu" if dry() else "cuda"


def backend() -> str:
    """The kernels; on a CPU what stands in for them."""
    return "torch" if dry() else "triton"


def card() -> str:
    return "no GPU, a dry run" if dry() else torch.cuda.get_device_name()


def synchronize() -> None:
    if not dry():
        torch.cuda.synchronize()


def release() -> None:
    """Memory that nothing uses goes back to the device."""
    if not dry():
        torch.cuda.empty_cache()


def sleep_ahead() -> None:
    if not dry():
        torch.cuda._sleep(AHEAD_CYCLES)


class Stamp:
    """A moment on the device."""

    def __init__(self):
        if dry():
            self.at = time.perf_counter()
        else:
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()

    def seconds_to(self, later: Stamp) -> float:
        """Once the device has reached both."""
        return later.at - self.at if dry() else self.event.elapsed_time(later.event) / 1e3


def peak_bytes(run: Callable[[], object]) -> int:
    """What run() held at most above what was held before."""
    if dry():
        run()
        return 0
    from benchmarks.core.memory import peak_on_gpu

    return peak_on_gpu(run)


def captured(step: Callable[[], tuple]) -> tuple[tuple, Callable[[], None]]:
    """-> the tensors that a CUDA graph of step() fills, and its replay. In a dry run replay is another call."""
    if dry():
        found = tuple(x.clone() for x in step())

        def again():
            for old, new in zip(found, step(), strict=True):
                old.copy_(new)

        return found, again
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and opens the libraries' handles
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    return found, graph.replay


@contextmanager
def waiting_is_an_error():
    """Whatever waits for the device raises inside."""
    if dry():
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")

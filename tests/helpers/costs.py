"""What a call costs on a CPU, counted and not timed: bytes allocated at a time, and GEMMs."""

import gc
from dataclasses import dataclass
from math import prod

import torch

GEMMS = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}  # name: place of the left factor among the arguments


@dataclass(frozen=True)
class Costs:
    peak: int  # the most bytes that were allocated at a time, beyond what was before the call
    allocated: tuple[int, ...]  # bytes of every allocation, in order
    gemms: tuple[tuple[int, int, int], ...]  # rows, inner size, columns of each

    @property
    def largest(self):
        return max(self.allocated, default=0)

    @property
    def flops(self):
        return 2 * sum(prod(sizes) for sizes in self.gemms)


def costs(call):
    """Costs of `call()`; its result is kept until the end."""
    gc.collect()  # what is freed now is not freed during the call
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, record_shapes=True) as profile:
        kept = call()
    del kept
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    live = peak = 0
    for change in changes:
        live += change
        peak = max(peak, live)
    gemms = []
    for event in events:
        if event.name() in GEMMS:
            left, right = event.shapes()[GEMMS[event.name()] :][:2]
            gemms.append((left[0], left[1], right[1]))
    return Costs(peak, tuple(change for change in changes if change > 0), tuple(gemms))

"""Compiles what later steps run, beside steps that are not timed: the compilers' caches on disk hand it over."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from benchmarks import tune as tuning
from benchmarks.core.measure import all_providers, run_once
from benchmarks.gpu import device
from benchmarks.gpu.plan import shapes


def launches(context) -> Iterator[dict]:
    """The launches that tune may measure: those that compile without spilling registers."""
    arch = tuning.arch_here()
    for group, values in tuning.compiled(tuning.GROUPS, arch, time.monotonic() + context.seconds - 2):
        yield {"group": group, "values": values}


def inductor(context, name: str, side: str, mode: str) -> Iterator[dict]:
    """torch.compile's code for a case, by running it once."""
    from benchmarks.gpu.speed import _problem

    start = time.perf_counter()
    for provider in [] if device.dry() else all_providers(side, mode, ["torch.compile cross_entropy"]):
        run_once(provider, _problem(name, side, mode))
    yield {"what": name, "seconds": time.perf_counter() - start}


def model(context) -> Iterator[dict]:
    """FlexAttention's code, by a step of a model with a few layers of the same shapes."""
    from benchmarks.providers.prefix import ModelStep

    start = time.perf_counter()
    step = ModelStep.build(shapes().model, torch.bfloat16, device.name(), 0, share=30 if device.dry() else 8)
    for provider in all_providers("prefix", "step"):
        run_once(provider, provider.prepare(step))
        step.model.zero_grad(set_to_none=True)
    yield {"what": shapes().model, "seconds": time.perf_counter() - start}

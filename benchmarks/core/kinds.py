"""What is measured on each side, and what its providers are compared with: tensors of a case, or a step of a whole model."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.core import cases
from benchmarks.core.problem import Problem
from benchmarks.core.truth import Truth
from benchmarks.providers.prefix import ModelStep, SeparateRows
from benchmarks.providers.trainers import InFloat64, TrainerStep

STEPS = {ModelStep.side: (ModelStep, SeparateRows), TrainerStep.side: (TrainerStep, InFloat64)}


def build(name: str, side: str, dtype: torch.dtype, device: str, seed: int = 0):
    """A step, or the case that the problems of all modes are made of."""
    return STEPS[side][0].build(name, dtype, device, seed) if side in STEPS else cases.build(name, dtype, device, seed)


def problem(built, side: str, mode: str):
    return built if side in STEPS else Problem.from_case(built, side, mode)


def truth(problem):
    return STEPS[problem.side][1](problem) if problem.side in STEPS else Truth(problem)


def load(path: Path):
    """What a problem's `save` wrote."""
    saved = torch.load(path)
    if saved["side"] in STEPS:
        return STEPS[saved.pop("side")][0].build(**saved)
    return Problem(**saved)

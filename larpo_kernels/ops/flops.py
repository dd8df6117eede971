"""What `torch.utils.flop_counter.FlopCounterMode` counts for the ops: their GEMMs, by schedule; nothing else counts there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

COUNTER = "torch.utils.flop_counter"
FORMULAS: dict[Any, Callable[..., int]] = {}  # registered op -> shapes of its arguments and of its results -> operations


def known_to_counters() -> None:
    """Registers the formulas once there is a counter: to import its module is to import Triton, which takes long."""
    if torch.compiler.is_compiling() or COUNTER not in sys.modules:
        return
    registry = sys.modules[COUNTER].flop_registry
    if registry.keys() >= FORMULAS.keys():
        return
    for op, formula in FORMULAS.items():
        sys.modules[COUNTER].register_flop_formula(op)(formula)
    for mode in _get_current_dispatch_mode_stack():  # a counter copies the registry when it is made
        if hasattr(mode, "counter"):
            mode.counter.flop_registry.update({op: registry[op] for op in FORMULAS})


def gemm(tokens, weight) -> int:
    """Of shapes tokens [n, ...] and weight [V, H]; a multiply-add is two operations."""
    return 2 * tokens[0] * weight[0] * weight[1]

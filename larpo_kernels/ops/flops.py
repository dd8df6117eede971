"""What `torch.utils.flop_counter.FlopCounterMode` counts for the ops: their GEMMs, by schedule; nothing else counts there."""

from __future__ import annotations

import sys

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

COUNTER = "torch.utils.flop_counter"


def known_to_counters() -> None:
    """Registers the formulas once there is a counter: importing its module imports Triton, which nobody may have asked for."""
    if torch.compiler.is_compiling() or COUNTER not in sys.modules:
        return
    registry = sys.modules[COUNTER].flop_registry
    if torch.ops.larpo_kernels.linear_logps in registry:
        return
    formulas = {
        torch.ops.larpo_kernels.linear_logps: linear_logps_flops,
        torch.ops.larpo_kernels.linear_logps_backward: linear_logps_backward_flops,
        torch.ops.larpo_kernels.small_linear_logps: small_linear_logps_flops,
        torch.ops.larpo_kernels.small_linear_logps_backward: small_linear_logps_backward_flops,
    }
    for op, formula in formulas.items():
        sys.modules[COUNTER].register_flop_formula(op)(formula)
    for mode in _get_current_dispatch_mode_stack():  # a counter copies the registry when it is made
        if hasattr(mode, "counter"):
            mode.counter.flop_registry.update({op: registry[op] for op in formulas})


def linear_logps_flops(hidden, weight, *args, out_shape, **options) -> int:
    """Shapes instead of tensors. One GEMM, and E^T W where d hidden is summed up at once."""
    _, _, _, walked, _, _, unit_grad, _ = out_shape
    return (2 if unit_grad[0] else 1) * _gemm(walked, weight)


def linear_logps_backward_flops(
    grad, hidden, weight, bias, labels, keep, logps, total, centre, level, unit_grad, held, checked,
    ignore_index, logit_scale, softcap, compute, needs_hidden, needs_weight, *args, out_shape, **options,
) -> int:  # fmt: skip
    """One GEMM for each gradient, and one for the rows of the vocabulary whose E is formed again."""
    if unit_grad[0]:
        return 0
    again = _gemm(total, (weight[0] - held[0], weight[1]))
    return (int(needs_hidden) + int(needs_weight)) * _gemm(total, weight) + again


def small_linear_logps_flops(hidden, weight, *args, out_shape, **options) -> int:
    return _gemm(out_shape[-1], weight)


def small_linear_logps_backward_flops(
    grad, hidden, weight, bias, labels, keep, logps, logits, ignore_index, logit_scale, softcap, needs_hidden, needs_weight,
    *args, out_shape, **options,
) -> int:  # fmt: skip
    return (int(needs_hidden) + int(needs_weight)) * _gemm(logits, weight)


def _gemm(tokens, weight) -> int:
    """tokens [n] times weight [V, H]; a multiply-add is two operations."""
    return 2 * tokens[0] * weight[0] * weight[1]

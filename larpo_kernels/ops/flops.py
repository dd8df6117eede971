"""What `torch.utils.flop_counter.FlopCounterMode` counts for the ops: their GEMMs, by schedule; nothing else counts there."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from . import linear  # noqa: F401  torch.ops has its ops from here on


@register_flop_formula(torch.ops.larpo_kernels.linear_logps)
def _linear_logps(hidden, weight, *args, out_shape, **options) -> int:
    """Shapes instead of tensors. One GEMM, and E^T W where d hidden is summed up at once."""
    _, _, _, walked, _, _, unit_grad, _ = out_shape
    return (2 if unit_grad[0] else 1) * _gemm(walked, weight)


@register_flop_formula(torch.ops.larpo_kernels.linear_logps_backward)
def _linear_logps_backward(
    grad, hidden, weight, bias, labels, keep, logps, total, centre, level, unit_grad, held,
    ignore_index, logit_scale, softcap, compute, needs_hidden, needs_weight, *args, out_shape, **options,
) -> int:  # fmt: skip
    """One GEMM for each gradient, and one for the rows of the vocabulary whose E is formed again."""
    if unit_grad[0]:
        return 0
    again = _gemm(total, (weight[0] - held[0], weight[1]))
    return (int(needs_hidden) + int(needs_weight)) * _gemm(total, weight) + again


def _gemm(tokens, weight) -> int:
    """tokens [n] times weight [V, H]; a multiply-add is two operations."""
    return 2 * tokens[0] * weight[0] * weight[1]

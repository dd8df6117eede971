"""Launches of kernels/rows.py."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .kernels import rows
from .launch import for_tensor, on_device, options


def _shape(logits: Tensor, labels: Tensor) -> tuple:
    s, t, v = logits.shape
    return s * t, (t, v), (*logits.stride()[:2], *labels.stride())


def _transform(logit_scale: float, softcap: float | None) -> tuple[tuple, dict]:
    return (logit_scale, softcap or 1.0), {"SCALE": logit_scale != 1, "SOFTCAP": softcap is not None}


def token_logps(
    logits: Tensor, labels: Tensor, ignore_index: int, logit_scale: float, softcap: float | None, stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n, sizes, strides = _shape(logits, labels)
    logps = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    entropy = torch.empty_like(logps) if stats else logps.new_empty(0)
    top1 = torch.empty_like(entropy)
    if n == 0:
        return logps, entropy, top1
    launch = for_tensor(logits)
    block = min(launch.row_block, triton.next_power_of_2(logits.shape[2]))
    splits = triton.next_power_of_2(triton.cdiv(logits.shape[2], launch.split_columns))
    partial = logps.new_empty(n * splits * 4 if splits > 1 else 0)
    floats, flags = _transform(logit_scale, softcap)
    args = (logits, labels, logps, entropy, top1, partial, *sizes, *strides, ignore_index, *floats)
    flags |= {"STATS": stats, "SPLITS": splits}
    with on_device(logits):
        rows.token_logps_forward[(n, splits)](*args, **flags, BLOCK=block, **options(logits, launch.row_warps, registers=128))
        if splits > 1:
            rows.merge_splits[(n,)](*args, **flags, **options(logits, 1))
    return logps, entropy, top1


def token_logps_backward(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    logps: Tensor,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    out: Tensor,
    whole: bool = True,
) -> None:
    n, sizes, (*logit_strides, label_stride_s, label_stride_t) = _shape(logits, labels)
    if n == 0:
        return
    launch = for_tensor(logits)
    block = min(launch.row_block, triton.next_power_of_2(logits.shape[2]))
    floats, flags = _transform(logit_scale, softcap)
    strides = (*grad.stride(), *logit_strides, label_stride_s, label_stride_t, *out.stride()[:2])
    with on_device(logits):
        rows.token_logps_backward[(n,)](
            grad, logits, labels, logps, out, *sizes, *strides, ignore_index, *floats, **flags,
            WHOLE=whole, BLOCK=block, **options(logits, launch.row_warps, registers=128),
        )  # fmt: skip

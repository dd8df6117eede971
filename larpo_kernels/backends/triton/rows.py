"""Launches of kernels/rows.py."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..arguments import LogitRows
from .kernels import rows
from .launch import Launch, for_tensor, on_device, options


def _shape(logits: Tensor, labels: Tensor) -> tuple:
    """Packed logits are those of one long sequence."""
    t, v = logits.shape[-2:]
    return labels.numel(), (t, v), (*_strides(logits, 3)[:2], *_strides(labels, 2))


def _strides(x: Tensor, dims: int) -> tuple:
    return (0,) * (dims - x.dim()) + x.stride()


def _transform(given: LogitRows) -> tuple[tuple, dict]:
    scale, softcap = given.logit_scale, given.softcap
    return (scale, softcap or 1.0), {"SCALE": scale != 1, "SOFTCAP": softcap is not None}


def _share(parts: int, rows: int, launch: Launch) -> int:
    """How many of a row's parts a program takes: as few as fill the GPU. No result depends on it."""
    return triton.cdiv(parts, triton.cdiv(launch.row_programs, rows))


def token_logps(given: LogitRows, stats: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    logits, labels = given.logits, given.labels
    n, sizes, strides = _shape(logits, labels)
    logps = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    entropy, top1 = (torch.empty_like(logps), torch.empty_like(logps)) if stats else (None, None)
    if n == 0:
        return logps, entropy, top1
    launch = for_tensor(logits)
    block = min(launch.row_block, triton.next_power_of_2(logits.shape[-1]))
    parts = triton.cdiv(logits.shape[-1], launch.split_columns)
    splits = triton.next_power_of_2(parts) if parts > 2 else 1  # for two, adding them up costs what is saved
    partial = logps if splits == 1 else logps.new_empty(n, 5, splits)
    floats, flags = _transform(given)
    results = *((logps, entropy, top1) if stats else (logps,) * 3), partial
    own = _share(splits, n, launch)
    vectors = logits.element_size() == 2 and logits.shape[-1] % 16 == 0  # else a load takes a register for each element
    registers = launch.row_registers if vectors and not stats else 128
    with on_device(logits):
        arguments = (labels, *results, *sizes)
        rows.token_logps_forward[(n, triton.cdiv(splits, own))](
            *(logits, *arguments, *strides, given.ignore_index, *floats, own),
            **flags,
            STATS=stats,
            SPLITS=splits,
            BLOCK=block,
            **options(logits, launch.row_warps, registers),
        )
        if splits > 1:
            how = options(logits, 1)
            rows.merge_splits[(n,)](*arguments, *strides[2:], given.ignore_index, STATS=stats, SPLITS=splits, **how)
    return logps, entropy, top1


def token_logps_backward(given: LogitRows, grad: Tensor, logps: Tensor, out: Tensor, *, whole: bool = True) -> None:
    logits, labels = given.logits, given.labels
    n, sizes, (*logit_strides, label_stride_s, label_stride_t) = _shape(logits, labels)
    if n == 0:
        return
    launch = for_tensor(logits)
    block = min(launch.row_block, triton.next_power_of_2(logits.shape[-1]))
    floats, flags = _transform(given)
    strides = (*_strides(grad, 2), *logit_strides, label_stride_s, label_stride_t, *_strides(out, 3)[:2])
    blocks = triton.cdiv(logits.shape[-1], block)
    own = blocks if out is logits else _share(blocks, n, launch)
    with on_device(logits):
        rows.token_logps_backward[(n, triton.cdiv(blocks, own))](
            *(grad, logits, labels, logps, out, *sizes, *strides, given.ignore_index, *floats, own * block),
            **flags,
            SHARED=own < blocks,
            WHOLE=whole,
            BLOCK=block,
            **options(logits, launch.row_warps, registers=128),
        )

"""Launches of kernels/states.py."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..arguments import TargetTerm
from .kernels import states
from .launch import on_device, options

COLUMNS = 2048  # per step of a program: 32 bytes of bfloat16 a thread


def target_dots(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, sums: torch.dtype) -> Tensor:
    out = torch.empty(labels.shape[0], dtype=sums, device=hidden.device)
    if out.numel():
        with on_device(hidden):
            states.target_dots[out.shape](
                *(hidden, weight, out if bias is None else bias, labels, out),
                *(*weight.shape, *hidden.stride(), *weight.stride(), 0 if bias is None else bias.stride(0)),
                BIAS=bias is not None,
                N=_columns(hidden),
                **options(hidden),
            )
    return out


def scale_rows(x: Tensor, factor: Tensor, out: Tensor, targets: TargetTerm | None = None) -> None:
    if x.numel():
        weight_shape, weight_stride = (0, 0), (0, 0)
        if targets is not None:
            weight_shape, weight_stride = targets.weight.shape, targets.weight.stride()
        with on_device(x):
            states.scale_rows[x.shape[:1]](
                *(x, factor, *((factor,) * 3 if targets is None else targets), out),
                *(weight_shape[0], x.shape[1], *x.stride(), factor.stride(0), *weight_stride, out.stride(0)),
                TARGETS=targets is not None,
                N=_columns(x),
                **options(x),
            )


def _columns(x: Tensor) -> int:
    return min(COLUMNS, triton.next_power_of_2(x.shape[1]))

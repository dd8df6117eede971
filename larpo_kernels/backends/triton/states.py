"""Launches of kernels/states.py."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .kernels import states
from .launch import on_device, options

COLUMNS = 2048  # per step of a program: 32 bytes of bfloat16 a thread


def target_dots(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, sums: torch.dtype) -> Tensor:
    out = torch.empty(labels.shape[0], dtype=sums, device=hidden.device)
    if out.numel():
        with on_device(hidden):
            states.target_dots[out.shape](
                hidden, weight, out if bias is None else bias, labels, out,
                *weight.shape, *hidden.stride(), *weight.stride(), 0 if bias is None else bias.stride(0),
                BIAS=bias is not None, N=_columns(hidden), **options(hidden),
            )  # fmt: skip
    return out


def scale_rows(
    x: Tensor,
    factor: Tensor,
    out: Tensor,
    value: Tensor | None = None,
    weight: Tensor | None = None,
    labels: Tensor | None = None,
) -> None:
    if x.numel():
        targets = value is not None
        with on_device(x):
            states.scale_rows[x.shape[:1]](
                x, factor, *((value, weight, labels) if targets else (factor,) * 3), out,
                len(weight) if targets else 0, x.shape[1], *x.stride(), factor.stride(0),
                *(weight.stride() if targets else (0, 0)), out.stride(0),
                TARGETS=targets, N=_columns(x), **options(x),
            )  # fmt: skip


def _columns(x: Tensor) -> int:
    return min(COLUMNS, triton.next_power_of_2(x.shape[1]))

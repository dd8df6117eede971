"""Hidden states x weight whose logits all fit one tile of a CPU's cache: formed, and then rows like any others.

A walk (linear.py) of one tile would do the same in three times as many steps, which a short call cannot hide.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends.arguments import LogitRows
from .flops import gemm
from .operator import Differentiable, Operator


class Arguments(NamedTuple):
    hidden: Tensor  # [S, T, H] or [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    labels: Tensor  # [S, T] or [N]; they have been read: each lies in the vocabulary or is ignored
    token_indices: Tensor | None  # [n] positions of the tokens that count; None: all do
    ignore_index: int | None
    logit_scale: float
    softcap: float | None
    compute: torch.dtype
    stats: bool
    backend: str


class BackwardArguments(NamedTuple):
    grad: Tensor  # of the labels' shape, any strides
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    token_indices: Tensor | None
    logps: Tensor  # of the labels' shape
    logits: Tensor  # [n, V]
    ignore_index: int | None
    logit_scale: float
    softcap: float | None
    needs_hidden: bool
    needs_weight: bool
    needs_bias: bool
    backend: str


def small_linear_logps(a: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logps, entropy, top1 of the labels' shape; the logits [n, V]."""
    with _own_dtypes(a.hidden):
        x, w = _counted(a.hidden.reshape(-1, a.hidden.shape[-1]), a.token_indices).to(a.compute), a.weight.to(a.compute)
        z = torch.mm(x, w.t()) if a.bias is None else torch.addmm(a.bias.to(a.compute), x, w.t())
        y = _counted(a.labels.reshape(-1), a.token_indices)
        rows = LogitRows(z, y, None, True, a.ignore_index, a.logit_scale, a.softcap)
        found = backends.get(a.backend).token_logps(rows, a.stats)
    found = (None if x is None else _of_all(x, a.token_indices, a.labels.numel()).view(a.labels.shape) for x in found)
    return *found, z


def _counted(x: Tensor, token_indices: Tensor | None) -> Tensor:
    """x [N, ...] of the tokens that count."""
    return x if token_indices is None else x.index_select(0, token_indices)


def _of_all(x: Tensor, token_indices: Tensor | None, num_tokens: int) -> Tensor:
    """x of the tokens that count -> of all, 0 where ignored."""
    return x if token_indices is None else x.new_zeros(num_tokens, *x.shape[1:]).index_copy_(0, token_indices, x)


def _own_dtypes(x: Tensor) -> AbstractContextManager:
    """Autocast would round products that are chosen to be in float32."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _fake(a: Arguments):
    logps = a.hidden.new_empty(a.labels.shape, dtype=a.compute)
    stats = (torch.empty_like(logps), torch.empty_like(logps)) if a.stats else (None, None)
    n = a.labels.numel() if a.token_indices is None else a.token_indices.shape[0]
    return logps, *stats, a.hidden.new_empty((n, a.weight.shape[0]), dtype=a.compute)


def small_linear_logps_backward(a: BackwardArguments) -> tuple[Tensor, Tensor, Tensor]:
    """d hidden, d weight, d bias; none where not needed."""
    with _own_dtypes(a.hidden):
        indices = a.token_indices
        grad, labels, logps = (_counted(x.reshape(-1), indices) for x in (a.grad, a.labels, a.logps))
        d = torch.empty_like(a.logits)
        rows = LogitRows(a.logits, labels, None, True, a.ignore_index, a.logit_scale, a.softcap)
        backends.get(a.backend).token_logps_backward(rows, grad, logps, d)
        d_hidden = d_weight = d_bias = None
        if a.needs_hidden:
            d_hidden = torch.mm(d, a.weight.to(d.dtype)).to(a.hidden.dtype)
            d_hidden = _of_all(d_hidden, indices, a.labels.numel()).view(a.hidden.shape)
        if a.needs_weight:
            x = _counted(a.hidden.reshape(-1, a.hidden.shape[-1]), indices).to(d.dtype)
            d_weight = torch.mm(d.t(), x).to(a.weight.dtype)
        if a.needs_bias:
            d_bias = d.sum(0).to(a.bias.dtype)
    return d_hidden, d_weight, d_bias


def fake_gradients(a) -> tuple[Tensor | None, ...]:
    """Of hidden, weight and bias, as the backward of any op with these arguments returns them."""
    needs = (a.hidden, a.needs_hidden), (a.weight, a.needs_weight), (a.bias, a.needs_bias)
    return tuple(x.new_empty(x.shape) if needed else None for x, needed in needs)


def _save(a: Arguments, out):
    tensors = (a.hidden, a.weight, a.bias, a.labels, a.token_indices, out[0], out[3])
    return tensors, ((a.ignore_index, a.logit_scale, a.softcap), a.backend)


def _gradient(tensors, rest, grad, needs):
    options, backend = rest
    grads = _backward(grad, *tensors, *options, *needs, backend)
    return tuple(g if needed else None for g, needed in zip(grads, needs, strict=True))


def _flops(a: Arguments, out) -> int:
    return gemm(out[-1], a.weight)


def _backward_flops(a: BackwardArguments, out) -> int:
    return (int(a.needs_hidden) + int(a.needs_weight)) * gemm(a.logits, a.weight)


_backward = Operator(small_linear_logps_backward, BackwardArguments, fake=fake_gradients, flops=_backward_flops)
SMALL_LINEAR_LOGPS = Differentiable(
    small_linear_logps, Arguments, fake=_fake, flops=_flops, inputs=3, outputs=3, save=_save, backward=_gradient
)

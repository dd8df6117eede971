"""Hidden states x weight whose logits all fit one tile of a CPU's cache: formed, and then rows like any others.

A walk (linear.py) of one tile would do the same in three times as many steps, and a short call feels every one.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .. import backends
from .operator import Differentiable, Operator, Step


def small_linear_logps(
    hidden: Tensor,  # [S, T, H] or [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [S, T] or [N]; they have been read: each lies in the vocabulary or is ignored
    keep: Tensor | None,  # [n] positions of the tokens that count; None: all do
    ignore_index: int | None,
    logit_scale: float,
    softcap: float | None,
    compute: torch.dtype,
    stats: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # logps, entropy, top1 of the labels' shape; the logits [n, V]
    with _own_dtypes(hidden):
        x, w = _kept(hidden.reshape(-1, hidden.shape[-1]), keep).to(compute), weight.to(compute)
        z = torch.mm(x, w.t()) if bias is None else torch.addmm(bias.to(compute), x, w.t())
        y = _kept(labels.reshape(-1), keep)
        found = backends.get(backend).token_logps(z, y, ignore_index, logit_scale, softcap, stats, checked=True)
    found = (None if x is None else _of_all(x, keep, labels.numel()).view(labels.shape) for x in found)
    return *found, z


def _kept(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x.index_select(0, keep)


def _of_all(x: Tensor, keep: Tensor | None, num_tokens: int) -> Tensor:
    """x of the tokens that count -> of all, 0 where ignored."""
    return x if keep is None else x.new_zeros(num_tokens, *x.shape[1:]).index_copy_(0, keep, x)


def _own_dtypes(x: Tensor) -> AbstractContextManager:
    """Autocast would round products that are chosen to be in float32."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _fake(hidden, weight, bias, labels, keep, ignore_index, logit_scale, softcap, compute, stats, backend):
    logps = hidden.new_empty(labels.shape, dtype=compute)
    stats = (torch.empty_like(logps), torch.empty_like(logps)) if stats else (None, None)
    n = labels.numel() if keep is None else keep.shape[0]
    return logps, *stats, hidden.new_empty((n, weight.shape[0]), dtype=compute)


def small_linear_logps_backward(
    grad: Tensor,  # of the labels' shape, any strides
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    keep: Tensor | None,
    logps: Tensor,  # of the labels' shape
    logits: Tensor,  # [n, V]
    ignore_index: int | None,
    logit_scale: float,
    softcap: float | None,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # d hidden, d weight, d bias; none where not needed
    with _own_dtypes(hidden):
        num_tokens = labels.numel()
        grad, labels, logps = (_kept(x.reshape(-1), keep) for x in (grad, labels, logps))
        d = torch.empty_like(logits)
        backends.get(backend).token_logps_backward(
            grad, logits, labels, logps, ignore_index, logit_scale, softcap, d, checked=True
        )
        d_hidden = d_weight = d_bias = None
        if needs_hidden:
            d_hidden = torch.mm(d, weight.to(d.dtype)).to(hidden.dtype)
            d_hidden = _of_all(d_hidden, keep, num_tokens).view(hidden.shape)
        if needs_weight:
            x = _kept(hidden.reshape(-1, hidden.shape[-1]), keep).to(d.dtype)
            d_weight = torch.mm(d.t(), x).to(weight.dtype)
        if needs_bias:
            d_bias = d.sum(0).to(bias.dtype)
    return d_hidden, d_weight, d_bias


def _fake_backward(
    grad, hidden, weight, bias, labels, keep, logps, logits, ignore_index, logit_scale, softcap, needs_hidden, needs_weight,
    needs_bias, backend,
):  # fmt: skip
    return tuple(
        x.new_empty(x.shape) if needed else None
        for x, needed in ((hidden, needs_hidden), (weight, needs_weight), (bias, needs_bias))
    )


def _save(args, out):
    hidden, weight, bias, labels, keep, ignore_index, logit_scale, softcap, _, _, backend = args
    return (hidden, weight, bias, labels, keep, out[0], out[3]), ((ignore_index, logit_scale, softcap), backend)


def _gradient(tensors, rest, grad, needs):
    options, backend = rest
    grads = _backward(grad, *tensors, *options, *needs, backend)
    return tuple(g if needed else None for g, needed in zip(grads, needs, strict=True))


_backward = Operator(small_linear_logps_backward, _fake_backward)
_small_linear_logps = Differentiable(small_linear_logps, _fake, inputs=3, outputs=3, save=_save, backward=_gradient)


def small_linear_step(
    hidden, weight, bias, labels, keep, *, ignore_index, logit_scale, softcap, compute, stats, backend
) -> Step:
    """logps, entropy, top1."""
    return _small_linear_logps, (
        hidden, weight, bias, labels, keep, ignore_index, float(logit_scale), softcap, compute, stats, backend
    )  # fmt: skip

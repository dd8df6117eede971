"""Logits -> token log-probs; backward is one pass over the rows of the logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends.arguments import LogitRows
from .operator import Differentiable, Operator, Step


def logps_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Arguments(NamedTuple):
    """The first ones are those of `LogitRows`."""

    logits: Tensor
    labels: Tensor
    token_indices: Tensor | None
    checked: bool
    ignore_index: int | None
    logit_scale: float
    softcap: float | None
    stats: bool
    inplace_backward: bool
    backend: str


class BackwardArguments(NamedTuple):
    grad: Tensor  # the labels' shape, any strides
    logits: Tensor
    labels: Tensor
    token_indices: Tensor | None
    logps: Tensor
    checked: bool
    ignore_index: int | None
    logit_scale: float
    softcap: float | None
    backend: str


def _rows(a: Arguments | BackwardArguments) -> LogitRows:
    return LogitRows(a.logits, a.labels, a.token_indices, a.checked, a.ignore_index, a.logit_scale, a.softcap)


def token_logps(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """logps, entropy, top1 of the labels' shape; no last two without stats."""
    return backends.get(a.backend).token_logps(_rows(a), a.stats)


def _fake(a: Arguments):
    out = a.logits.new_empty(a.labels.shape, dtype=logps_dtype(a.logits))
    return out, *((torch.empty_like(out), torch.empty_like(out)) if a.stats else (None, None))


def token_logps_backward(a: BackwardArguments) -> Tensor:
    """d logits, contiguous."""
    out = torch.empty(a.logits.shape, dtype=a.logits.dtype, device=a.logits.device)
    backends.get(a.backend).token_logps_backward(_rows(a), a.grad, a.logps, out)
    return out


def token_logps_backward_(a: BackwardArguments) -> None:
    """The same, written over the logits."""
    backends.get(a.backend).token_logps_backward(_rows(a), a.grad, a.logps, a.logits)
    torch.autograd.graph.increment_version(a.logits)


_backward = Operator(token_logps_backward, BackwardArguments, fake=lambda a: a.logits.new_empty(a.logits.shape))
_backward_ = Operator(token_logps_backward_, BackwardArguments, fake=lambda a: None, mutates=("logits",))


def _save(a: Arguments, out):
    rest = (a.checked, a.ignore_index, a.logit_scale, a.softcap, a.backend)
    return (a.logits, a.labels, a.token_indices, out[0]), (a.inplace_backward, rest)


def _gradient(tensors, rest, grad, needs):
    inplace, options = rest
    # A traced backward may not write to a saved input; there the option has nothing to save anyway. A second derivative
    # would need the logits, and of logits that share memory (expand) each would overwrite others.
    if inplace and not (torch.compiler.is_compiling() or torch.is_grad_enabled() or _overlaps(tensors[0])):
        _backward_(grad, *tensors, *options)
        return (tensors[0],)
    return (_backward(grad, *tensors, *options),)


def _overlaps(x: Tensor) -> bool:
    """Whether two of its elements may lie at one address."""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


_token_logps = Differentiable(token_logps, Arguments, fake=_fake, inputs=1, outputs=3, save=_save, backward=_gradient)


def token_step(tokens, transform: tuple, stats: bool, inplace_backward: bool, backend: str) -> Step:
    """logps, entropy, top1 of `validation.Tokens`; transform: (ignore_index, logit_scale, softcap)."""
    logits, (ignore_index, logit_scale, softcap) = tokens.values, transform
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    given = (logits, tokens.labels, tokens.token_indices, tokens.checked, ignore_index, float(logit_scale), softcap)
    return _token_logps, Arguments(*given, stats, inplace_backward, backend)

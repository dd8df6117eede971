"""Logits -> token log-probs; backward is one pass over the rows of the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from .operator import Differentiable, Operator, Step


def logps_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def token_logps_backward(
    grad: Tensor,  # the labels' shape, any strides
    logits: Tensor,
    labels: Tensor,
    keep: Tensor | None,
    logps: Tensor,
    checked: bool,
    ignore_index: int | None,
    logit_scale: float,
    softcap: float | None,
    backend: str,
) -> Tensor:  # d logits, contiguous
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    backends.get(backend).token_logps_backward(
        grad, logits, labels, logps, ignore_index, logit_scale, softcap, out, keep=keep, checked=checked
    )
    return out


def token_logps_backward_(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    keep: Tensor | None,
    logps: Tensor,
    checked: bool,
    ignore_index: int | None,
    logit_scale: float,
    softcap: float | None,
    backend: str,
) -> None:
    """The same, written over the logits."""
    backends.get(backend).token_logps_backward(
        grad, logits, labels, logps, ignore_index, logit_scale, softcap, logits, keep=keep, checked=checked
    )
    torch.autograd.graph.increment_version(logits)


def _fake_backward(grad, logits, labels, keep, logps, checked, ignore_index, logit_scale, softcap, backend):
    return logits.new_empty(logits.shape)


def _fake_backward_(grad, logits, labels, keep, logps, checked, ignore_index, logit_scale, softcap, backend):
    pass


_backward = Operator(token_logps_backward, _fake_backward)
_backward_ = Operator(token_logps_backward_, _fake_backward_, mutates=("logits",))


def token_logps(
    logits: Tensor,  # [S, T, V] or [N, V], unit stride on V
    labels: Tensor,  # [S, T] or [N]
    keep: Tensor | None,  # [n] positions on the flat token axis of those that count; None: not known, or all if checked
    checked: bool,  # the labels have been read: each lies in the vocabulary or is ignored
    ignore_index: int | None,
    logit_scale: float,
    softcap: float | None,
    stats: bool,
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # logps, entropy, top1 of the labels' shape; no last two without stats
    return backends.get(backend).token_logps(
        logits, labels, ignore_index, logit_scale, softcap, stats, keep=keep, checked=checked
    )


def _fake(logits, labels, keep, checked, ignore_index, logit_scale, softcap, stats, inplace_backward, backend):
    out = logits.new_empty(labels.shape, dtype=logps_dtype(logits))
    return out, *((torch.empty_like(out), torch.empty_like(out)) if stats else (None, None))


def _save(args, out):
    logits, labels, keep, checked, ignore_index, logit_scale, softcap, _, inplace, backend = args
    return (logits, labels, keep, out[0]), (inplace, (checked, ignore_index, logit_scale, softcap, backend))


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


_token_logps = Differentiable(token_logps, _fake, inputs=1, outputs=3, save=_save, backward=_gradient)


def token_step(tokens, *, ignore_index, logit_scale, softcap, stats=False, inplace_backward=False, backend) -> Step:
    """logps, entropy, top1 of validation.Tokens holding logits."""
    logits = tokens.values if tokens.values.stride(-1) == 1 else tokens.values.contiguous()
    return _token_logps, (
        logits, tokens.labels, tokens.keep, tokens.checked, ignore_index, float(logit_scale), softcap, stats,
        inplace_backward, backend,
    )  # fmt: skip

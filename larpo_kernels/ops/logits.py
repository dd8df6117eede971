"""Logits -> token log-probs; backward is one pass over the rows of the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends


def logps_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.custom_op("larpo_kernels::token_logps", mutates_args=())
def _token_logps(
    logits: Tensor,  # [S, T, V], unit stride on V
    labels: Tensor,  # [S, T]
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    stats: bool,
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # logps, entropy, top1: [S, T]; the last two are empty without stats
    return backends.get(backend).token_logps(logits, labels, ignore_index, logit_scale, softcap, stats)


@_token_logps.register_fake
def _(logits, labels, ignore_index, logit_scale, softcap, stats, inplace_backward, backend):
    out = logits.new_empty(labels.shape, dtype=logps_dtype(logits))
    stat = torch.empty_like(out) if stats else out.new_empty(0)
    return out, stat, torch.empty_like(stat)


@torch.library.custom_op("larpo_kernels::token_logps_backward", mutates_args=())
def _token_logps_backward(
    grad: Tensor,  # [S, T], any strides
    logits: Tensor,
    labels: Tensor,
    logps: Tensor,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    backend: str,
) -> Tensor:  # d logits [S, T, V], contiguous
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    backends.get(backend).token_logps_backward(grad, logits, labels, logps, ignore_index, logit_scale, softcap, out)
    return out


@_token_logps_backward.register_fake
def _(grad, logits, labels, logps, ignore_index, logit_scale, softcap, backend):
    return logits.new_empty(logits.shape)


@torch.library.custom_op("larpo_kernels::token_logps_backward_", mutates_args=("logits",))
def _token_logps_backward_(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    logps: Tensor,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    backend: str,
) -> None:
    backends.get(backend).token_logps_backward(grad, logits, labels, logps, ignore_index, logit_scale, softcap, logits)


def _token_logps_setup(ctx, inputs, output):
    logits, labels, ignore_index, logit_scale, softcap, _, ctx.inplace, backend = inputs
    ctx.options = (ignore_index, logit_scale, softcap, backend)
    ctx.save_for_backward(logits, labels, output[0])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _token_logps_autograd(ctx, grad, *_):
    if grad is None:
        return (None,) * 8
    logits, labels, logps = ctx.saved_tensors
    # A traced backward may not write to a saved input; there the option has nothing to save anyway. A second derivative
    # would need the logits, and of logits that share memory (expand) each would overwrite others.
    if ctx.inplace and not (torch.compiler.is_compiling() or torch.is_grad_enabled() or _overlaps(logits)):
        _token_logps_backward_(grad, logits, labels, logps, *ctx.options)
        return (logits,) + (None,) * 7
    return (_token_logps_backward(grad, logits, labels, logps, *ctx.options),) + (None,) * 7


def _overlaps(x: Tensor) -> bool:
    """Whether two of its elements may lie at one address."""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


_token_logps.register_autograd(_token_logps_autograd, setup_context=_token_logps_setup)


def token_logps(tokens, *, ignore_index, logit_scale, softcap, stats=False, inplace_backward=False, backend=None):
    """-> logps, entropy, top1 of layout.Tokens holding logits."""
    logits = tokens.values if tokens.values.stride(-1) == 1 else tokens.values.contiguous()
    backend = backends.pick(backend, logits)
    return _token_logps(logits, tokens.labels, ignore_index, float(logit_scale), softcap, stats, inplace_backward, backend)

"""The autograd graph, once, as torch.library ops: opaque to torch.compile, the same on every backend.

    token_logps     logits, labels        -> l_t                      backward: one row pass over the logits
    linear_logps    hidden, weight        -> l_t                      backward: GEMMs (schedules.py)
    candidate_logps l_t                   -> L_s                      backward: a gather
    list_stage      l_t                   -> loss, L_s, g_s           backward: a gather of c_s, formed in the forward

The vocabulary side ends in l_t, one number per token; the list side starts there. Fused losses chain the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends
from .layout import owners

SUM, MEAN = "sum", "mean"


def _logps_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --- logits -> token log-probs ---------------------------------------------------------------------------------------


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
    out = logits.new_empty(labels.shape, dtype=_logps_dtype(logits))
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
    # A traced backward may not write to a saved input; there the option has nothing to save anyway.
    if ctx.inplace and not torch.compiler.is_compiling():
        _token_logps_backward_(grad, logits, labels, logps, *ctx.options)
        return (logits,) + (None,) * 7
    return (_token_logps_backward(grad, logits, labels, logps, *ctx.options),) + (None,) * 7


_token_logps.register_autograd(_token_logps_autograd, setup_context=_token_logps_setup)


def token_logps(tokens, *, ignore_index, logit_scale, softcap, stats=False, inplace_backward=False, backend=None):
    """-> logps, entropy, top1 of layout.Tokens holding logits."""
    logits = tokens.values if tokens.values.stride(-1) == 1 else tokens.values.contiguous()
    backend = backends.pick(backend, logits)
    return _token_logps(
        logits, tokens.labels, ignore_index, float(logit_scale), softcap, stats, inplace_backward, backend
    )


# --- token log-probs -> candidates -----------------------------------------------------------------------------------


@torch.library.custom_op("larpo_kernels::candidate_logps", mutates_args=())
def _candidate_logps(
    logps: Tensor,  # [N], 0 where ignored
    counted: Tensor | None,  # [N] bool: given, the mean over the tokens that count; None, the sum
    cu_tokens: Tensor,  # [S+1]
    backend: str,
) -> tuple[Tensor, Tensor]:  # L [S], dL/dl of each candidate's tokens [S]
    return backends.get(backend).candidate_logps(logps, counted, cu_tokens)


@_candidate_logps.register_fake
def _(logps, counted, cu_tokens, backend):
    out = logps.new_empty(cu_tokens.shape[0] - 1)
    return out, torch.empty_like(out)


def _candidate_setup(ctx, inputs, output):
    ctx.num_tokens = inputs[0].shape[0]
    ctx.save_for_backward(inputs[2], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _candidate_autograd(ctx, grad, _):
    if grad is None:
        return None, None, None, None
    cu_tokens, share = ctx.saved_tensors
    return _spread(grad * share, cu_tokens, ctx.num_tokens), None, None, None


_candidate_logps.register_autograd(_candidate_autograd, setup_context=_candidate_setup)


def _spread(per_segment: Tensor, cu: Tensor, n: int) -> Tensor:
    """The value of its segment for each of n items; no items, no segments: empty."""
    if n == 0 or per_segment.shape[0] == 0:
        return per_segment.new_zeros(n)
    return per_segment[owners(cu, n)]


def candidate_logps(logps, counted, cu_tokens, backend):
    backend = backends.pick(backend, logps)
    return _candidate_logps(logps.reshape(-1), counted, cu_tokens, backend)[0]


# --- token log-probs -> lists ----------------------------------------------------------------------------------------


@torch.library.custom_op("larpo_kernels::list_stage", mutates_args=())
def _list_stage(
    logps: Tensor,  # [N], 0 where ignored
    counted: Tensor | None,  # [N] bool: given, candidates average over the tokens that count; None, they sum
    cu_tokens: Tensor | None,  # [S+1]; None: every token is a candidate
    cu_lists: Tensor,  # [L+1]
    relevance: Tensor,  # [S]
    ref_logps: Tensor | None,  # [S]
    beta: float,
    objective: str,
    weighting: str,
    k: int,
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # loss [L], logps [S], scores [S], c = dloss/dl of the candidate's tokens [S]
    return backends.get(backend).list_stage(
        logps, counted, cu_tokens, cu_lists, relevance, ref_logps, beta, objective, weighting, k, temperature
    )


@_list_stage.register_fake
def _(logps, counted, cu_tokens, cu_lists, relevance, ref_logps, beta, objective, weighting, k, temperature, backend):
    out = logps.new_empty(relevance.shape, dtype=_logps_dtype(logps))
    return out.new_empty(cu_lists.shape[0] - 1), out, torch.empty_like(out), torch.empty_like(out)


def _list_setup(ctx, inputs, output):
    logps, _, cu_tokens, cu_lists, *_ = inputs
    ctx.num_tokens, ctx.dtype, ctx.per_token = logps.shape[0], logps.dtype, cu_tokens is None
    ctx.save_for_backward(output[3], cu_lists, *(() if ctx.per_token else (cu_tokens,)))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _list_autograd(ctx, grad, *_):
    if grad is None:
        return (None,) * 12
    c, cu_lists, *cu_tokens = ctx.saved_tensors
    c = c * _spread(grad, cu_lists, c.shape[0])
    if not ctx.per_token:
        c = _spread(c, cu_tokens[0], ctx.num_tokens)
    return (c.to(ctx.dtype),) + (None,) * 11


_list_stage.register_autograd(_list_autograd, setup_context=_list_setup)


def list_stage(logps, counted, cu_tokens, cu_lists, relevance, ref_logps, objective, *, beta, backend):
    """-> loss [L] (differentiable), logps [S], scores [S]."""
    backend = backends.pick(backend, logps)
    loss, logps, scores, _ = _list_stage(
        logps.reshape(-1),
        counted,
        cu_tokens,
        cu_lists,
        relevance,
        ref_logps,
        float(beta),
        objective.name,
        getattr(objective, "weighting", None) or "none",
        getattr(objective, "k", None) or 0,
        float(getattr(objective, "temperature", 1.0)),
        backend,
    )
    return loss, logps, scores


def reduce(loss: Tensor, reduction: str) -> Tensor:
    """[L] -> mean or sum over lists, or as it is; no lists: 0, still in the graph."""
    if reduction == "none":
        return loss
    total = loss.sum()
    return total / max(loss.shape[0], 1) if reduction == "mean" else total

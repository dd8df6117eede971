"""Token log-probs -> candidates -> lists; backward spreads one number per candidate over its tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..validation import owners
from .logits import logps_dtype


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
    ties: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # loss [L], logps [S], scores [S], c = dloss/dl of the candidate's tokens [S]
    return backends.get(backend).list_stage(
        logps, counted, cu_tokens, cu_lists, relevance, ref_logps, beta, objective, weighting, k, temperature, ties
    )


@_list_stage.register_fake
def _(logps, counted, cu_tokens, cu_lists, relevance, ref_logps, beta, objective, weighting, k, temperature, ties, backend):
    out = logps.new_empty(relevance.shape, dtype=logps_dtype(logps))
    return out.new_empty(cu_lists.shape[0] - 1), out, torch.empty_like(out), torch.empty_like(out)


@torch.library.custom_op("larpo_kernels::list_stage_backward", mutates_args=())
def _list_stage_backward(grad: Tensor, logps: Tensor, cu_tokens: Tensor | None, cu_lists: Tensor, c: Tensor) -> Tensor:
    """d logps [N]. An op of its own, with logps among its inputs: c depends on them, so that a second derivative must be
    refused (autograd knows no formula for this op), not be zero."""
    out = c * _spread(grad, cu_lists, c.shape[0])
    if cu_tokens is not None:
        out = _spread(out, cu_tokens, logps.shape[0])
    return out.to(logps.dtype)


@_list_stage_backward.register_fake
def _(grad, logps, cu_tokens, cu_lists, c):
    return torch.empty_like(logps)


def _list_setup(ctx, inputs, output):
    logps, _, cu_tokens, cu_lists, *_ = inputs
    ctx.save_for_backward(logps, cu_tokens, cu_lists, output[3])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _list_autograd(ctx, grad, *_):
    if grad is None:
        return (None,) * 13
    return (_list_stage_backward(grad, *ctx.saved_tensors),) + (None,) * 12


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
        getattr(objective, "ties", "order"),
        backend,
    )
    return loss, logps, scores


def reduce(loss: Tensor, reduction: str) -> Tensor:
    """[L] -> mean or sum over lists, or as it is; no lists: 0, still in the graph."""
    if reduction == "none":
        return loss
    total = loss.sum()
    return total / max(loss.shape[0], 1) if reduction == "mean" else total

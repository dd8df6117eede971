"""Token log-probs -> candidates -> lists; backward spreads one number per candidate over its tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..validation import owners
from .logits import logps_dtype


@torch.library.custom_op("larpo_kernels::candidate_logps", mutates_args=())
def _candidate_logps(
    logps: Tensor,  # [N], 0 where ignored; without cu_tokens [S, T]
    counted: Tensor | None,  # likewise, bool: given, the mean over the tokens that count; None, the sum
    cu_tokens: Tensor | None,  # [S+1]
    backend: str,
) -> tuple[Tensor, Tensor]:  # L [S], dL/dl of each candidate's tokens [S]
    return backends.get(backend).candidate_logps(logps, counted, cu_tokens)


@_candidate_logps.register_fake
def _(logps, counted, cu_tokens, backend):
    out = logps.new_empty(logps.shape[0] if cu_tokens is None else cu_tokens.shape[0] - 1)
    return out, torch.empty_like(out)


def _candidate_setup(ctx, inputs, output):
    ctx.shape = inputs[0].shape
    ctx.save_for_backward(inputs[2], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _candidate_autograd(ctx, grad, _):
    if grad is None:
        return None, None, None, None
    cu_tokens, share = ctx.saved_tensors
    return _to_tokens(grad * share, cu_tokens, ctx.shape), None, None, None


_candidate_logps.register_autograd(_candidate_autograd, setup_context=_candidate_setup)


def _to_tokens(per_candidate: Tensor, cu_tokens: Tensor | None, shape: torch.Size) -> Tensor:
    """The value of its candidate for every token, of the shape of the token log-probs."""
    if cu_tokens is not None:
        return _spread(per_candidate, cu_tokens, shape[0])
    return per_candidate.view(-1, *[1] * (len(shape) - 1)).expand(shape)


def _spread(per_segment: Tensor, cu: Tensor, n: int) -> Tensor:
    """The value of its segment for each of n items; no items, no segments: empty."""
    if n == 0 or per_segment.shape[0] == 0:
        return per_segment.new_zeros(n)
    return per_segment[owners(cu, n)]


def candidate_logps(logps, counted, cu_tokens, backend):
    backend = backends.pick(backend, logps)
    return _candidate_logps(logps, counted, cu_tokens, backend)[0]


@torch.library.custom_op("larpo_kernels::list_stage", mutates_args=())
def _list_stage(
    logps: Tensor,  # [N], 0 where ignored; without cu_tokens [S, T], or [S] where a token is a candidate
    counted: Tensor | None,  # likewise, bool: given, candidates average over the tokens that count; None, they sum
    cu_tokens: Tensor | None,  # [S+1]
    cu_lists: Tensor | None,  # [L+1]
    list_size: int,  # candidates of every list, without cu_lists
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
        logps, counted, cu_tokens, cu_lists, list_size, relevance, ref_logps, beta, objective, weighting, k, temperature, ties
    )


@_list_stage.register_fake
def _(
    logps, counted, cu_tokens, cu_lists, list_size, relevance, ref_logps, beta, objective, weighting, k, temperature, ties,
    backend,
):  # fmt: skip
    out = logps.new_empty(relevance.shape, dtype=logps_dtype(logps))
    num_lists = relevance.shape[0] // list_size if cu_lists is None else cu_lists.shape[0] - 1
    return out.new_empty(num_lists), out, torch.empty_like(out), torch.empty_like(out)


@torch.library.custom_op("larpo_kernels::list_stage_backward", mutates_args=())
def _list_stage_backward(
    grad: Tensor, logps: Tensor, cu_tokens: Tensor | None, cu_lists: Tensor | None, c: Tensor, list_size: int
) -> Tensor:
    """d logps. An op of its own, with logps among its inputs: c depends on them, so that a second derivative must be
    refused (autograd knows no formula for this op), not be zero."""
    of_list = grad.repeat_interleave(list_size) if cu_lists is None else _spread(grad, cu_lists, c.shape[0])
    return _to_tokens(c * of_list, cu_tokens, logps.shape).to(logps.dtype).contiguous()


@_list_stage_backward.register_fake
def _(grad, logps, cu_tokens, cu_lists, c, list_size):
    return torch.empty_like(logps)


def _list_setup(ctx, inputs, output):
    logps, _, cu_tokens, cu_lists, ctx.list_size, *_ = inputs
    ctx.save_for_backward(logps, cu_tokens, cu_lists, output[3])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _list_autograd(ctx, grad, *_):
    if grad is None:
        return (None,) * 14
    return (_list_stage_backward(grad, *ctx.saved_tensors, ctx.list_size),) + (None,) * 13


_list_stage.register_autograd(_list_autograd, setup_context=_list_setup)


def list_stage(logps, counted, cu_tokens, cu_lists, list_size, relevance, ref_logps, objective, *, beta, backend):
    """-> loss [L] (differentiable), logps [S], scores [S]."""
    backend = backends.pick(backend, logps)
    loss, logps, scores, _ = _list_stage(
        logps,
        counted,
        cu_tokens,
        cu_lists,
        list_size,
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

"""Token log-probs -> candidates -> lists; backward spreads one number per candidate over its tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..validation import owners
from .logits import logps_dtype
from .operator import Differentiable, Operator, Step


def candidate_logps(
    logps: Tensor,  # [N], 0 where ignored; without cu_tokens [S, T]
    counted: Tensor | None,  # likewise, bool: given, the mean over the tokens that count; None, the sum
    cu_tokens: Tensor | None,  # [S+1]
    backend: str,
) -> tuple[Tensor, Tensor]:  # L [S], dL/dl of each candidate's tokens [S]
    return backends.get(backend).candidate_logps(logps, counted, cu_tokens)


def _fake_candidates(logps, counted, cu_tokens, backend):
    out = logps.new_empty(logps.shape[0] if cu_tokens is None else cu_tokens.shape[0] - 1)
    return out, torch.empty_like(out)


def _save_candidates(args, out):
    logps, _, cu_tokens, _ = args
    return (cu_tokens, out[1]), logps.shape


def _candidates_gradient(tensors, shape, grad, needs):
    cu_tokens, share = tensors
    return (_to_tokens(grad * share, cu_tokens, shape),)


_candidate_logps = Differentiable(
    candidate_logps, _fake_candidates, inputs=1, outputs=1, save=_save_candidates, backward=_candidates_gradient
)


def _to_tokens(per_candidate: Tensor, cu_tokens: Tensor | None, shape: torch.Size) -> Tensor:
    """The value of its candidate for every token, of the shape of the token log-probs."""
    if cu_tokens is not None:
        return _spread(per_candidate, cu_tokens, shape[0])
    return per_candidate if len(shape) == 1 else per_candidate[:, None].expand(shape)


def _spread(per_segment: Tensor, cu: Tensor, n: int) -> Tensor:
    """The value of its segment for each of n items; no items, no segments: empty."""
    if n == 0 or per_segment.shape[0] == 0:
        return per_segment.new_zeros(n)
    return per_segment[owners(cu, n)]


def candidate_step(counted: Tensor | None, cu_tokens: Tensor | None, backend: str) -> Step:
    """L of token log-probs, the first argument, which is not here."""
    return _candidate_logps, (counted, cu_tokens, backend)


def list_stage(
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
    reduction: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # loss, logps [S], scores [S], c = d its list's loss / d a candidate's token [S]
    loss, *others = backends.get(backend).list_stage(
        logps, counted, cu_tokens, cu_lists, list_size, relevance, ref_logps, beta, objective, weighting, k, temperature, ties
    )
    if reduction != "none":  # no lists: 0
        loss = loss.mean() if reduction == "mean" and loss.shape[0] else loss.sum()
    return loss, *others


def _fake_lists(
    logps, counted, cu_tokens, cu_lists, list_size, relevance, ref_logps, beta, objective, weighting, k, temperature, ties,
    reduction, backend,
):  # fmt: skip
    out = logps.new_empty(relevance.shape, dtype=logps_dtype(logps))
    loss = out.new_empty(_num_lists(out, cu_lists, list_size) if reduction == "none" else ())
    return loss, out, torch.empty_like(out), torch.empty_like(out)


def _num_lists(candidates: Tensor, cu_lists: Tensor | None, list_size: int) -> int:
    return candidates.shape[0] // list_size if cu_lists is None else cu_lists.shape[0] - 1


def list_stage_backward(
    grad: Tensor,
    logps: Tensor,
    cu_tokens: Tensor | None,
    cu_lists: Tensor | None,
    c: Tensor,
    list_size: int,
    reduction: str,
) -> Tensor:
    """d logps. An op of its own, with logps among its inputs: c depends on them, so that a second derivative must be
    refused, not be zero."""
    if reduction == "none":
        grad = grad.repeat_interleave(list_size) if cu_lists is None else _spread(grad, cu_lists, c.shape[0])
    elif reduction == "mean":
        grad = grad / max(_num_lists(c, cu_lists, list_size), 1)
    return _to_tokens(c * grad, cu_tokens, logps.shape).to(logps.dtype)


def _fake_lists_backward(grad, logps, cu_tokens, cu_lists, c, list_size, reduction):
    return torch.empty_like(logps, memory_format=torch.contiguous_format)


def _save_lists(args, out):
    logps, _, cu_tokens, cu_lists, list_size, *_, reduction, _ = args
    return (logps, cu_tokens, cu_lists, out[3]), (list_size, reduction)


def _lists_gradient(tensors, rest, grad, needs):
    return (_list_stage_backward(grad, *tensors, *rest),)


_list_stage_backward = Operator(list_stage_backward, _fake_lists_backward)
_list_stage = Differentiable(list_stage, _fake_lists, inputs=1, outputs=3, save=_save_lists, backward=_lists_gradient)


def list_step(counted, cu_tokens, cu_lists, list_size, relevance, ref_logps, objective, *, beta, reduction, backend) -> Step:
    """loss (differentiable), logps [S], scores [S] of token log-probs, the first argument, which is not here."""
    return _list_stage, (
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
        reduction,
        backend,
    )

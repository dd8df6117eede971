"""Token log-probs -> candidates -> lists; backward spreads one number per candidate over its tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends.arguments import CandidateArguments, ListwiseArguments
from ..validation import owners
from .logits import logps_dtype
from .operator import Differentiable, Operator, Step


def candidate_logps(a: CandidateArguments) -> tuple[Tensor, Tensor]:
    """L [S], dL/dl of each candidate's tokens [S]."""
    return backends.get(a.backend).candidate_logps(a)


def _fake_candidates(a: CandidateArguments):
    out = a.logps.new_empty(a.logps.shape[0] if a.cu_tokens is None else a.cu_tokens.shape[0] - 1)
    return out, torch.empty_like(out)


def _save_candidates(a: CandidateArguments, out):
    return (a.cu_tokens, out[1]), a.logps.shape


def _candidates_gradient(tensors, shape, grad, needs):
    cu_tokens, share = tensors
    return (_to_tokens(grad * share, cu_tokens, shape),)


_candidate_logps = Differentiable(
    candidate_logps,
    CandidateArguments,
    fake=_fake_candidates,
    inputs=1,
    outputs=1,
    save=_save_candidates,
    backward=_candidates_gradient,
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


def candidate_step(mean_mask: Tensor | None, cu_tokens: Tensor | None, backend: str) -> Step:
    """L of the token log-probs of the step before."""
    return _candidate_logps, CandidateArguments(None, mean_mask, cu_tokens, backend)


def scores_and_listwise_loss(a: ListwiseArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, logps [S], scores [S], c = d its list's loss / d a candidate's token [S]."""
    loss, *others = backends.get(a.backend).scores_and_listwise_loss(a)
    if a.reduction != "none":  # no lists: 0
        loss = loss.mean() if a.reduction == "mean" and loss.shape[0] else loss.sum()
    return loss, *others


def _fake_lists(a: ListwiseArguments):
    out = a.logps.new_empty(a.relevance.shape, dtype=logps_dtype(a.logps))
    loss = out.new_empty(_num_lists(out, a.cu_lists, a.list_size) if a.reduction == "none" else ())
    return loss, out, torch.empty_like(out), torch.empty_like(out)


def _num_lists(candidates: Tensor, cu_lists: Tensor | None, list_size: int) -> int:
    return candidates.shape[0] // list_size if cu_lists is None else cu_lists.shape[0] - 1


class BackwardArguments(NamedTuple):
    grad: Tensor
    logps: Tensor
    cu_tokens: Tensor | None
    cu_lists: Tensor | None
    c: Tensor
    list_size: int
    reduction: str


def listwise_loss_backward(a: BackwardArguments) -> Tensor:
    """d logps. An op of its own, with logps among its inputs: c depends on them, so that a second derivative must be
    refused, not be zero."""
    grad = a.grad
    if a.reduction == "none":
        grad = grad.repeat_interleave(a.list_size) if a.cu_lists is None else _spread(grad, a.cu_lists, a.c.shape[0])
    elif a.reduction == "mean":
        grad = grad / max(_num_lists(a.c, a.cu_lists, a.list_size), 1)
    return _to_tokens(a.c * grad, a.cu_tokens, a.logps.shape).to(a.logps.dtype)


def _fake_lists_backward(a: BackwardArguments):
    return torch.empty_like(a.logps, memory_format=torch.contiguous_format)


def _save_lists(a: ListwiseArguments, out):
    return (a.logps, a.cu_tokens, a.cu_lists, out[3]), (a.list_size, a.reduction)


def _lists_gradient(tensors, rest, grad, needs):
    return (_listwise_loss_backward(grad, *tensors, *rest),)


_listwise_loss_backward = Operator(listwise_loss_backward, BackwardArguments, fake=_fake_lists_backward)
_scores_and_listwise_loss = Differentiable(
    scores_and_listwise_loss,
    ListwiseArguments,
    fake=_fake_lists,
    inputs=1,
    outputs=3,
    save=_save_lists,
    backward=_lists_gradient,
)


def list_step(mean_mask, cu_tokens, cu_lists, list_size, relevance, ref_logps, objective, *, beta, reduction, backend) -> Step:
    """loss (differentiable), logps [S], scores [S] of the token log-probs of the step before."""
    return _scores_and_listwise_loss, ListwiseArguments(
        None,
        mean_mask,
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

"""The list side: token log-probs -> candidates -> scores -> loss of each list and its gradient.

A few numbers per list, so everything is computed in float64: an answer cannot depend on how a sum was blocked. Lists of
one size are a view [lists, m] (nothing is padded, so results do not depend on the batch) and one pass; lists
of several sizes are brought into the order of their sizes first.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from ...validation import wide
from ..arguments import CandidateArguments, ListwiseArguments
from .list_losses import Terms, losses


def where_float64_exists(primitive: Callable) -> Callable:
    """A few numbers: computed on the CPU for a device without float64."""

    @functools.wraps(primitive)
    def computed(call: CandidateArguments | ListwiseArguments):
        device = call.logps.device
        if wide(device) == torch.float64:
            return primitive(call)
        results = primitive(call._make(x.cpu() if isinstance(x, Tensor) else x for x in call))
        return tuple(x.to(device) for x in results)

    return computed


@where_float64_exists
def candidate_logps(call: CandidateArguments) -> tuple[Tensor, Tensor]:
    total, share, wrong = _candidates(call)
    share = torch.ones_like(total) if share is None else share
    if wrong is not None:
        total, share = (x.masked_fill(wrong, torch.nan) for x in (total, share))
    return total.to(call.logps.dtype), share.to(call.logps.dtype)


def _candidates(call: CandidateArguments | ListwiseArguments) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """-> L [S] and dL/dl of each candidate's tokens [S], float64, None for 1; which candidates have wrong borders, if any."""
    logps, mean_mask, cu_tokens = call[:3]
    if cu_tokens is not None:
        starts, wrong = _inside(cu_tokens, logps.shape[0])
        total = _segment_sum(logps, starts)
        count = None if mean_mask is None else _segment_sum(mean_mask, starts)
    else:
        wrong = None
        padded = logps.dim() == 2
        total = logps.sum(1, dtype=torch.float64) if padded else logps.to(torch.float64, copy=True)  # no op returns its input
        count = mean_mask.sum(1, dtype=torch.float64) if padded and mean_mask is not None else None
    if count is None:
        return total, None, wrong
    share = count.clamp_(min=1).reciprocal_()
    return total.mul_(share), share, wrong


def _segment_sum(x: Tensor, starts: Tensor) -> Tensor:
    if starts.shape[0] == 1 or x.shape[0] == 0:
        return torch.zeros(starts.shape[0] - 1, dtype=torch.float64, device=x.device)
    return torch.segment_reduce(x.double(), "sum", offsets=starts, initial=0)


def _inside(cu: Tensor, n: int) -> tuple[Tensor, Tensor | None]:
    """-> The borders, clamped to 0..n, and which segments have wrong ones: not in order, or not from 0 to n over all. None if
    the host can see that none has."""
    inside = cu.clamp(0, n).cummax(0).values
    if cu.device.type == "cpu" and torch.equal(inside, cu) and int(cu[0]) == 0 and int(cu[-1]) == n:
        return cu, None
    start, stop = cu[:-1], cu[1:]
    wrong = (start > stop) | (start < 0) | (stop > n)
    wrong[:1] |= cu[:1] != 0
    wrong[-1:] |= cu[-1:] != n
    return inside, wrong


@where_float64_exists
def scores_and_listwise_loss(call: ListwiseArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total, share, wrong = _candidates(call)
    scores = (total if call.ref_logps is None else total - call.ref_logps) * call.beta
    relevance = call.relevance if wrong is None else call.relevance.masked_fill(wrong, torch.nan)
    finite = _are_finite(scores, relevance)
    terms = Terms(call.objective, call.weighting, call.k, call.temperature, call.ties, finite)
    if call.cu_lists is None:
        loss, c = losses(scores.view(-1, call.list_size), relevance.reshape(-1, call.list_size), terms)
    else:
        loss, c = _losses_of_any_size(scores, relevance, call.cu_lists, terms)
    c = c.mul_(call.beta).view(-1)
    if share is not None:
        c *= share
    results = (loss, total, scores, c)
    return results if call.logps.dtype == torch.float64 else tuple(x.float() for x in results)


def _are_finite(scores: Tensor, relevance: Tensor) -> bool:
    """Whether the host can see that all of these are finite numbers: it need not wait for them on a CPU."""
    return scores.device.type == "cpu" and math.isfinite(scores.dot(relevance))  # no product of inf or NaN is finite


def _losses_of_any_size(g: Tensor, r: Tensor, cu_lists: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """Scores g, relevance r [S] -> loss [lists], d loss / d g [S]."""
    if cu_lists.shape[0] == 1:
        return g.new_empty(0), torch.zeros_like(g)
    starts, wrong = _inside(cu_lists, g.shape[0])
    sizes = starts.diff()
    lists = sizes.argsort(stable=True)  # the shortest first, and their candidates in the same order
    candidates = starts[0] + sizes.repeat_interleave(sizes).argsort(stable=True)
    groups = sorted(Counter(sizes.tolist()).items())
    parts = (x[candidates].split([m * n for m, n in groups]) for x in (g, r))
    found = [losses(x.view(n, m), y.view(n, m), terms) for (m, n), x, y in zip(groups, *parts, strict=True)]
    loss, d = g.new_empty(sizes.shape), torch.zeros_like(g)
    loss[lists] = torch.cat([of_lists for of_lists, _ in found])
    d[candidates] = torch.cat([of_candidates.view(-1) for _, of_candidates in found])
    return loss if wrong is None else loss.masked_fill_(wrong, torch.nan), d

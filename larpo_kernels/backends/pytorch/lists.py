"""The list side: token log-probs -> candidates -> scores -> loss of each list and its gradient.

A few numbers per list, so everything is computed in float64: an answer cannot depend on how a sum was blocked. Lists of
one size are stacked [lists, m] (nothing is padded, so a list's numbers do not depend on its neighbours); pairs are
visited one column at a time, so nothing of size lists x m x m exists.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...validation import wide

FINITE = 1e300  # what infinite relevance counts as: its difference from another's is a number


def candidate_logps(logps: Tensor, counted: Tensor | None, cu_tokens: Tensor | None) -> tuple[Tensor, Tensor]:
    if wide(logps.device) != torch.float64:
        args = (x if x is None else x.cpu() for x in (logps, counted, cu_tokens))
        return tuple(x.to(logps.device) for x in candidate_logps(*args))
    total, share = _candidates(logps, counted, cu_tokens)
    return total.to(logps.dtype), share.to(logps.dtype)


def _candidates(logps: Tensor, counted: Tensor | None, cu_tokens: Tensor | None) -> tuple[Tensor, Tensor]:
    """-> L [S] and dL/dl of each candidate's tokens [S], float64."""
    if logps.dim() == 2:
        total = logps.sum(1, dtype=torch.float64)
        share = torch.ones_like(total) if counted is None else 1 / counted.sum(1, dtype=torch.float64).clamp_(min=1)
        return total * share, share
    if cu_tokens is None:
        return logps.to(torch.float64, copy=True), torch.ones_like(logps, dtype=torch.float64)  # an op may not return its input
    n = logps.shape[0]
    total, wrong = _segment_sum(logps, cu_tokens), wrong_segments(cu_tokens, n)
    share = torch.ones_like(total) if counted is None else 1 / _segment_sum(counted, cu_tokens).clamp_(min=1)
    return (total * share).masked_fill_(wrong, torch.nan), share.masked_fill_(wrong, torch.nan)


def _segment_sum(x: Tensor, cu: Tensor) -> Tensor:
    if cu.shape[0] == 1 or x.shape[0] == 0:
        return torch.zeros(cu.shape[0] - 1, dtype=torch.float64, device=x.device)
    return torch.segment_reduce(x.double(), "sum", offsets=_inside(cu, x.shape[0]), initial=0)


def _inside(cu: Tensor, n: int) -> Tensor:
    """Borders are data: none may lead outside, whatever it says."""
    return cu.clamp(0, n).cummax(0).values


def wrong_segments(cu: Tensor, n: int) -> Tensor:
    """Which segments have borders that are not in order, or not from 0 to n over all."""
    start, stop = cu[:-1], cu[1:]
    wrong = (start > stop) | (start < 0) | (stop > n)
    wrong[:1] |= cu[:1] != 0
    wrong[-1:] |= cu[-1:] != n
    return wrong


def list_stage(
    logps: Tensor,
    counted: Tensor | None,
    cu_tokens: Tensor | None,
    cu_lists: Tensor | None,
    list_size: int,
    relevance: Tensor,
    ref_logps: Tensor | None,
    beta: float,
    objective: str,
    weighting: str,
    k: int,
    temperature: float,
    ties: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if wide(logps.device) != torch.float64:  # a few numbers: compute them where float64 exists
        args = [x if x is None else x.cpu() for x in (logps, counted, cu_tokens, cu_lists, relevance, ref_logps)]
        args[4:4] = [list_size]
        return tuple(x.to(logps.device) for x in list_stage(*args, beta, objective, weighting, k, temperature, ties))
    total, share = _candidates(logps, counted, cu_tokens)
    scores = beta * (total if ref_logps is None else total - ref_logps)
    if cu_lists is None:
        cu_lists = torch.arange(0, scores.shape[0] + 1, list_size, device=logps.device)
    loss = torch.zeros(cu_lists.shape[0] - 1, dtype=torch.float64, device=logps.device)
    c = torch.zeros_like(scores)
    if cu_tokens is not None:
        relevance = relevance.masked_fill(wrong_segments(cu_tokens, logps.shape[0]), torch.nan)
    starts = _inside(cu_lists, scores.shape[0])
    sizes = starts.diff()
    for m in sizes.unique().tolist():
        which = (sizes == m).nonzero()[:, 0]
        at = starts[which][:, None] + torch.arange(m, device=logps.device)
        loss[which], c[at] = _lists_of_one_size(scores[at], relevance[at], objective, weighting, k, temperature, ties)
    loss[wrong_segments(cu_lists, scores.shape[0]) | (sizes == 0)] = torch.nan
    c *= beta * share
    out = torch.float64 if logps.dtype == torch.float64 else torch.float32
    return loss.to(out), total.to(out), scores.to(out), c.to(out)


def _lists_of_one_size(g, r, objective, weighting, k, temperature, ties):
    """Scores g, relevance r [lists, m] -> loss [lists], d loss / d g [lists, m]; NaN where relevance is."""
    if r.shape[1] == 0:
        return torch.zeros_like(g[:, :1].sum(1)), g
    order = r.argsort(dim=1, descending=True, stable=True)
    if ties == "efron":
        loss, d = _efron(g, r)
    elif ties == "mean":
        loss, d = _mean_over_best(g, r) if objective == "contrastive" else _mean_over_best_and_worst(g, r)
    elif objective in ("pairwise", "lambdarank"):
        loss, d = _pairs(g, r, order, objective, weighting, k)
    else:
        loss, d = _suffixes(g.gather(1, order), r.gather(1, order), objective, temperature)
        d = torch.empty_like(d).scatter_(1, order, d)
    if ties == "skip":
        unsettled = _is_unsettled(r.gather(1, order), objective)
        loss, d = loss.masked_fill(unsettled, 0), d.masked_fill(unsettled[:, None], 0)
    unknown = r.isnan().any(1)
    return loss.masked_fill_(unknown, torch.nan), d.masked_fill_(unknown[:, None], torch.nan)


def _suffixes(g, r, objective, temperature):
    """sum_i a_i [logsumexp_{j >= i} g_j - g_i], lists in order of relevance; no term where all of these g are -inf."""
    if objective == "listmle":
        lse = g.flip(1).logcumsumexp(1).flip(1)
        told = lse > -torch.inf
        told[:, -1] = False  # the last candidate's own term is 0
        told |= lse.isnan()
        d = (g + torch.where(told, -lse, -torch.inf).logcumsumexp(1)).exp()  # sum over i <= k of exp(g_k - lse_i)
        return torch.where(told, lse - g, 0).sum(1), d - told.to(d.dtype)
    lost = (g == -torch.inf).all(1)
    logp = g.log_softmax(1)
    p = logp.exp()
    if objective == "contrastive":
        a = torch.zeros_like(p)
        a[:, 0] = 1
    else:
        r = r.clamp(-FINITE, FINITE)
        a = ((r - r.amax(1, keepdim=True)) / temperature).softmax(1)
    loss = torch.where(a > 0, -a * logp, 0).sum(1)
    return loss.masked_fill_(lost, 0), (p - a).masked_fill_(lost[:, None], 0)


def _is_unsettled(r, objective):
    """[lists]: whether ties leave open what the objective asks of the order; lists in order of relevance."""
    tied = r[:, 1:] == r[:, :-1]
    if objective == "listmle":
        return tied.any(1)
    return (tied[:, :1] if objective == "contrastive" else torch.cat([tied[:, :1], tied[:, -1:]], 1)).any(1)


def _mean_over_best(g, r):
    """Contrastive's mean over the orders of tied candidates: logsumexp(g) less the mean score of the best."""
    best = r == r.amax(1, keepdim=True)
    target = best.to(g.dtype) / best.sum(1, keepdim=True)
    logp, lost = g.log_softmax(1), (g == -torch.inf).all(1)
    loss, d = -torch.where(best, target * logp, 0).sum(1), logp.exp() - target
    return loss.masked_fill_(lost, 0), d.masked_fill_(lost[:, None], 0)


def _mean_over_best_and_worst(g, r):
    """Pairwise's mean over the orders of tied candidates: over pairs of one of the best and another one of the worst."""
    best, worst = (r == x for x in (r.amax(1, keepdim=True), r.amin(1, keepdim=True)))
    pairs = best.sum(1) * worst.sum(1) - (best & worst).sum(1)
    lost = g == -torch.inf
    loss, d = torch.zeros_like(g[:, 0]), torch.zeros_like(g)
    for j in range(g.shape[1]):
        wins = best & worst[:, j : j + 1] & ~(lost & lost[:, j : j + 1])
        wins[:, j] = False
        gap = g[:, j : j + 1] - g
        push = torch.where(wins, gap.sigmoid(), 0)
        loss += torch.where(wins, F.softplus(gap), 0).sum(1)
        d -= push
        d[:, j] += push.sum(1)
    return loss / pairs.clamp(min=1), d / pairs.clamp(min=1)[:, None]


def _efron(g, r):
    """ListMLE with the l-th of k tied candidates among all below them and 1 - l / k of each of the k."""
    loss, d = torch.zeros_like(g[:, 0]), torch.zeros_like(g)
    for i in range(g.shape[1]):
        tied, below = r == r[:, i : i + 1], r < r[:, i : i + 1]
        size = tied.sum(1, keepdim=True)
        left = 1 - tied[:, :i].sum(1, keepdim=True).to(g.dtype) / size
        logits = torch.where(below, g, torch.where(tied, g + left.log(), -torch.inf))
        lse = logits.logsumexp(1, keepdim=True)
        told = ~((size == 1) & ~below.any(1, keepdim=True)) & ~(lse == -torch.inf)  # the last one's own term is 0
        loss += torch.where(told, lse - g[:, i : i + 1], 0)[:, 0]
        d += torch.where(told, (logits - lse).exp(), 0)
        d[:, i] -= told[:, 0].to(d.dtype)
    return loss, d


def _pairs(g, r, order, objective, weighting, k):
    """sum w_ij softplus(g_j - g_i) over the pairs whose first member is the more relevant one; none of two g at -inf."""
    m = g.shape[1]
    loss, d = torch.zeros_like(g[:, 0]), torch.zeros_like(g)
    lost = g == -torch.inf
    if objective == "pairwise":
        if m == 1:
            return loss, d
        best, worst = order[:, :1], order[:, -1:]
        told = ~(lost.gather(1, best) & lost.gather(1, worst))
        gap = g.gather(1, worst) - g.gather(1, best)
        push = torch.where(told, gap.sigmoid(), 0)
        return torch.where(told, F.softplus(gap), 0)[:, 0], d.scatter_(1, best, -push).scatter_(1, worst, push)
    weight = _PairWeights(g, r, weighting, k)
    for j in range(m):
        w, gap = weight(j), g[:, j : j + 1] - g
        mute = (lost & lost[:, j : j + 1]) | ((w == 0) & gap.isinf())
        told = (r > r[:, j : j + 1]) & ~mute
        push = torch.where(told, w * gap.sigmoid(), 0)
        loss += torch.where(told, w * F.softplus(gap), 0).sum(1)
        d -= push
        d[:, j] += push.sum(1)
    return loss, d


class _PairWeights:
    """LambdaRank's w_ij for all i and one j: the change in NDCG if i and j swapped their ranks by score."""

    def __init__(self, g, r, weighting, k):
        self.weighting, self.k = weighting, k or g.shape[1]
        self.one = torch.ones_like(g[:, :1])
        if weighting == "none":
            return
        position = torch.arange(1, g.shape[1] + 1, dtype=g.dtype, device=g.device)
        self.relevance = r.clamp(-FINITE, FINITE)
        self.top = self.relevance.amax(1, keepdim=True).clamp(min=0)
        gains = self._gain_difference(self.relevance.sort(dim=1, descending=True).values, torch.zeros_like(self.top))
        ideal = (gains * _discount(position))[:, : self.k].sum(1, keepdim=True).abs()
        self.ideal = torch.where(ideal == 0, 1, ideal)
        by_score = g.argsort(dim=1, descending=True, stable=True)
        self.rank = torch.empty_like(g).scatter_(1, by_score, position.expand_as(g))
        self.discount = torch.where(self.rank <= self.k, _discount(self.rank), 0)

    def _gain_difference(self, a, b):
        """(2^a - 2^b) / 2^top, with full relative accuracy however close or large a and b are."""
        size = -torch.exp2(torch.maximum(a, b) - self.top) * torch.expm1(-math.log(2) * (a - b).abs())
        return torch.where(a < b, -size, size)

    def __call__(self, j):
        if self.weighting == "none":
            return self.one
        gain = self._gain_difference(self.relevance, self.relevance[:, j : j + 1]).abs() / self.ideal
        if self.weighting == "dcg":
            return gain * (self.discount - self.discount[:, j : j + 1]).abs()
        apart = (self.rank - self.rank[:, j : j + 1]).abs()
        lower = torch.maximum(self.rank, self.rank[:, j : j + 1])
        change = torch.where(apart > 0, (_discount(apart) - _discount(apart + 1)).abs(), 0)
        return gain * change * torch.where(lower > self.k, 1 / (1 - _discount(lower)), 1)


def _discount(rank):
    return 1 / torch.log2(1 + rank)

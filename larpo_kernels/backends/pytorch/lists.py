"""The list side: token log-probs -> candidates -> scores -> loss of each list and its gradient.

A few numbers per list, so everything is computed in float64: an answer cannot depend on how a sum was blocked. Lists of
one size are stacked [lists, m] (nothing is padded, so a list's numbers do not depend on its neighbours); pairs are
visited one column at a time, so nothing of size lists x m x m exists.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...validation import wide


def candidate_logps(logps: Tensor, counted: Tensor | None, cu_tokens: Tensor) -> tuple[Tensor, Tensor]:
    if wide(logps.device) != torch.float64:
        args = (x if x is None else x.cpu() for x in (logps, counted, cu_tokens))
        return tuple(x.to(logps.device) for x in candidate_logps(*args))
    total, share = _candidates(logps, counted, cu_tokens)
    return total.to(logps.dtype), share.to(logps.dtype)


def _candidates(logps: Tensor, counted: Tensor | None, cu_tokens: Tensor | None) -> tuple[Tensor, Tensor]:
    """-> L [S] and dL/dl of each candidate's tokens [S], float64."""
    if cu_tokens is None:
        return logps.to(torch.float64, copy=True), torch.ones_like(logps, dtype=torch.float64)  # an op may not return its input
    total = _segment_sum(logps, cu_tokens)
    if counted is None:
        return total, torch.ones_like(total)
    share = 1 / _segment_sum(counted, cu_tokens).clamp_(min=1)
    return total * share, share


def _segment_sum(x: Tensor, cu: Tensor) -> Tensor:
    if cu.shape[0] == 1 or x.shape[0] == 0:
        return torch.zeros(cu.shape[0] - 1, dtype=torch.float64, device=x.device)
    return torch.segment_reduce(x.double(), "sum", offsets=cu, initial=0)


def list_stage(
    logps: Tensor,
    counted: Tensor | None,
    cu_tokens: Tensor | None,
    cu_lists: Tensor,
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
        args = (x if x is None else x.cpu() for x in (logps, counted, cu_tokens, cu_lists, relevance, ref_logps))
        return tuple(x.to(logps.device) for x in list_stage(*args, beta, objective, weighting, k, temperature, ties))
    total, share = _candidates(logps, counted, cu_tokens)
    scores = beta * (total if ref_logps is None else total - ref_logps)
    loss = torch.zeros(cu_lists.shape[0] - 1, dtype=torch.float64, device=logps.device)
    c = torch.zeros_like(scores)
    sizes = cu_lists.diff()
    for m in sizes.unique().tolist():
        which = (sizes == m).nonzero()[:, 0]
        at = cu_lists[which][:, None] + torch.arange(m, device=logps.device)
        loss[which], c[at] = _lists_of_one_size(scores[at], relevance[at], objective, weighting, k, temperature, ties)
    c *= beta * share
    out = torch.float64 if logps.dtype == torch.float64 else torch.float32
    return loss.to(out), total.to(out), scores.to(out), c.to(out)


def _lists_of_one_size(g, r, objective, weighting, k, temperature, ties):
    """Scores g, relevance r [lists, m] -> loss [lists], d loss / d g [lists, m]."""
    order = r.argsort(dim=1, descending=True, stable=True)
    if ties == "skip":
        loss, d = _lists_of_one_size(g, r, objective, weighting, k, temperature, "order")
        unsettled = _is_unsettled(r.gather(1, order), objective)
        return loss.masked_fill(unsettled, 0), d.masked_fill(unsettled[:, None], 0)
    if ties == "efron":
        return _efron(g, r)
    if ties == "mean":
        return _mean_over_best(g, r) if objective == "contrastive" else _mean_over_best_and_worst(g, r)
    if objective in ("pairwise", "lambdarank"):
        return _pairs(g, r, order, objective, weighting, k)
    loss, d = _suffixes(g.gather(1, order), r.gather(1, order), objective, temperature)
    return loss, torch.empty_like(d).scatter_(1, order, d)


def _suffixes(g, r, objective, temperature):
    """sum_i a_i [logsumexp_{j >= i} g_j - g_i], lists in order of relevance."""
    if objective == "listmle":
        # the last candidate's own term is 0 and left out: at a score of -inf it would be inf - inf
        lse = g.flip(1).logcumsumexp(1).flip(1)
        inverse = -lse
        inverse[:, -1] = -torch.inf
        d = (g + inverse.logcumsumexp(1)).exp()  # sum over i <= k of exp(g_k - lse_i)
        d[:, :-1] -= 1
        return (lse - g)[:, :-1].sum(1), d
    logp = g.log_softmax(1)
    p = logp.exp()
    if objective == "contrastive":
        p[:, 0] -= 1
        return -logp[:, 0], p
    a = (r / temperature).softmax(1)
    return -(a * logp).sum(1), p - a


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
    logp = g.log_softmax(1)
    return -torch.where(best, target * logp, 0).sum(1), logp.exp() - target


def _mean_over_best_and_worst(g, r):
    """Pairwise's mean over the orders of tied candidates: over pairs of one of the best and another one of the worst."""
    best, worst = (r == x for x in (r.amax(1, keepdim=True), r.amin(1, keepdim=True)))
    pairs = best.sum(1) * worst.sum(1) - (best & worst).sum(1)
    loss, d = torch.zeros_like(g[:, 0]), torch.zeros_like(g)
    for j in range(g.shape[1]):
        wins = best & worst[:, j : j + 1]
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
        alone = (size == 1)[:, 0] & ~below.any(1)  # the last one's own term is 0, at a score of -inf too
        lse = logits.logsumexp(1, keepdim=True)
        loss += torch.where(alone, 0, lse[:, 0] - g[:, i])
        d += torch.where(alone[:, None], 0, (logits - lse).exp())
        d[:, i] -= (~alone).to(d.dtype)
    return loss, d


def _pairs(g, r, order, objective, weighting, k):
    """sum w_ij softplus(g_j - g_i) over the pairs whose first member is the more relevant one."""
    m = g.shape[1]
    loss, d = torch.zeros_like(g[:, 0]), torch.zeros_like(g)
    if objective == "pairwise":
        if m == 1:
            return loss, d
        best, worst = order[:, :1], order[:, -1:]
        gap = g.gather(1, worst) - g.gather(1, best)
        push = gap.sigmoid()
        return F.softplus(gap)[:, 0], d.scatter_(1, best, -push).scatter_(1, worst, push)
    weight = _PairWeights(g, r, weighting, k)
    for j in range(m):
        wins, gap = r > r[:, j : j + 1], g[:, j : j + 1] - g
        push = torch.where(wins, weight(j) * gap.sigmoid(), 0)
        loss += torch.where(wins, weight(j) * F.softplus(gap), 0).sum(1)
        d -= push
        d[:, j] += push.sum(1)
    return loss, d


class _PairWeights:
    """LambdaRank's w_ij for all i and one j: the change in NDCG if i and j swapped their ranks by score."""

    def __init__(self, g, r, weighting, k):
        self.weighting, self.k = weighting, k or g.shape[1]
        if weighting == "none":
            return
        position = torch.arange(1, g.shape[1] + 1, dtype=g.dtype, device=g.device)
        gain = torch.exp2(r) - 1
        ideal = (gain.sort(dim=1, descending=True).values * _discount(position))[:, : self.k].sum(1, keepdim=True)
        self.gain = gain / torch.where(ideal == 0, 1, ideal)
        by_score = g.argsort(dim=1, descending=True, stable=True)
        self.rank = torch.empty_like(g).scatter_(1, by_score, position.expand_as(g))
        self.discount = torch.where(self.rank <= self.k, _discount(self.rank), 0)

    def __call__(self, j):
        if self.weighting == "none":
            return 1.0
        gain = (self.gain - self.gain[:, j : j + 1]).abs()
        if self.weighting == "dcg":
            return gain * (self.discount - self.discount[:, j : j + 1]).abs()
        apart = (self.rank - self.rank[:, j : j + 1]).abs()
        lower = torch.maximum(self.rank, self.rank[:, j : j + 1])
        change = torch.where(apart > 0, (_discount(apart) - _discount(apart + 1)).abs(), 0)
        return gain * change * torch.where(lower > self.k, 1 / (1 - _discount(lower)), 1)


def _discount(rank):
    return 1 / torch.log2(1 + rank)

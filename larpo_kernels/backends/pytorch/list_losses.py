"""The objectives over lists of one size: scores g and relevance r [lists, m] -> the loss of each list and its gradient.

Pairs are formed in blocks of at most PAIRS: nothing of size lists x m x m exists. How a list is cut depends on m only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FINITE = 1e300  # what infinite relevance counts as: its difference from another's is a number
PAIRS = 2**15  # at a time: 256 KB for each number of a pair
SAME = 40.0  # softplus(x) = x in float64 from here on

Losses = tuple[Tensor, Tensor]  # loss [lists], d loss / d g [lists, m]


class Terms(NamedTuple):
    """What is summed up."""

    objective: str
    weighting: str
    k: int
    temperature: float
    ties: str
    finite: bool  # the host knows that all scores and relevance are: no term is to be left out


def losses(g: Tensor, r: Tensor, terms: Terms) -> Losses:
    """NaN where some relevance is, and for lists of nothing."""
    m = g.shape[1]
    if m == 0:
        return torch.full_like(g.sum(1), torch.nan), g
    compute = _family(terms)
    at_a_time = max(1, PAIRS // (m * m))
    if compute in (_all_pairs, _best_worst_pairs, _efron) and g.shape[0] > at_a_time:
        blocks = zip(g.split(at_a_time), r.split(at_a_time), strict=True)
        loss, d = (torch.cat(parts) for parts in zip(*(compute(*block, terms) for block in blocks), strict=True))
    else:
        loss, d = compute(g, r, terms)
    if terms.ties == "skip":
        _fill(loss, d, _is_unsettled(r, terms.objective), 0)
    if not terms.finite:
        _fill(loss, d, r.isnan().any(1), torch.nan)
    return loss, d


def _family(terms: Terms) -> Callable[[Tensor, Tensor, Terms], Losses]:
    match terms.objective, terms.ties:
        case "pairwise", "mean":
            return _best_worst_pairs
        case "pairwise", _:
            return _best_worst_pair
        case "listmle", "efron":
            return _efron
        case "listmle", _:
            return _suffixes
        case "lambdarank", _:
            return _all_pairs
        case _:
            return _cross_entropy


def _fill(loss: Tensor, d: Tensor, lists: Tensor, value: float) -> None:
    loss.masked_fill_(lists, value)
    d.masked_fill_(lists[:, None], value)


def _is_unsettled(r: Tensor, objective: str) -> Tensor:
    """[lists]: whether ties leave open what the objective asks of the order."""
    r = r.sort(dim=1).values
    tied = r[:, 1:] == r[:, :-1]
    if objective == "listmle":
        return tied.any(1)
    return (tied[:, -1:] if objective == "contrastive" else torch.cat([tied[:, :1], tied[:, -1:]], 1)).any(1)


def _cross_entropy(g: Tensor, r: Tensor, terms: Terms) -> Losses:
    """- sum_i a_i log softmax(g)_i; nothing where all g are -inf."""
    logp = g.log_softmax(1)
    if terms.objective == "contrastive" and terms.ties != "mean":
        best = r.argmax(1)  # the first of several
        loss = F.nll_loss(logp, best, reduction="none")
        d = logp.exp().scatter_(1, best[:, None], -1, reduce="add")
    else:
        a = _target(r, terms)
        loss = -(a * logp if terms.finite else torch.where(a > 0, a * logp, 0)).sum(1)
        d = logp.exp().sub_(a)
    if not terms.finite:
        _fill(loss, d, (g == -torch.inf).all(1), 0)
    return loss, d


def _target(r: Tensor, terms: Terms) -> Tensor:
    """The distribution over a list that softmax(g) is held against."""
    top = r.amax(1, keepdim=True)
    if terms.objective == "contrastive":  # any of the tied best
        best = r == top
        return best / best.sum(1, keepdim=True, dtype=r.dtype)
    return ((r.clamp(-FINITE, FINITE) - top.clamp(-FINITE, FINITE)) / terms.temperature).softmax(1)


def _suffixes(g: Tensor, r: Tensor, terms: Terms) -> Losses:
    """sum_i [logsumexp_{j >= i} g_j - g_i] in order of falling relevance; no term where all of these g are -inf."""
    rising = r.argsort(dim=1, descending=True, stable=True).flip(1)  # a suffix of the falling order is a prefix here
    g = g.gather(1, rising)
    lse = g.logcumsumexp(1)
    counts = lse > -torch.inf
    counts[:, 0] = False  # the last candidate's own term is 0
    if not terms.finite:
        counts |= lse.isnan()
    turns = torch.where(counts, -lse, -torch.inf).flip(1).logcumsumexp(1).flip(1)
    d = (g + turns).exp_() - counts.to(g.dtype)  # sum over turns i of exp(g - lse_i), less its own
    return torch.where(counts, lse - g, 0).sum(1), torch.empty_like(d).scatter_(1, rising, d)


def _efron(g: Tensor, r: Tensor, terms: Terms) -> Losses:
    """ListMLE with the l-th of k tied candidates among all below them and 1 - l / k of each of the k."""
    loss, d = 0, 0
    position = torch.arange(g.shape[1], device=g.device)
    for turns in _columns(g.shape[1]):  # [lists, m, turns]: who is in the draw at each of these turns
        tied, below = (compare(r[:, :, None], r[:, None, turns]) for compare in (torch.eq, torch.lt))
        size = tied.sum(1, dtype=g.dtype)
        drawn = (tied & (position[:, None] < position[turns])).sum(1, dtype=g.dtype)
        left = torch.where(tied, torch.log1p(-drawn / size)[:, None], 0)
        logits = torch.where(tied | below, g[:, :, None] + left, -torch.inf)
        lse = logits.logsumexp(1)
        counts = ((size > 1) | below.any(1)) & ~(lse == -torch.inf)  # the last one's own term is 0
        loss = loss + torch.where(counts, lse - g[:, turns], 0).sum(1)
        d = d + torch.where(counts[:, None], (logits - lse[:, None]).exp_(), 0).sum(2)
        d[:, turns] -= counts.to(d.dtype)
    return loss, d


def _best_worst_pair(g: Tensor, r: Tensor, terms: Terms) -> Losses:
    """- log sigmoid(g_best - g_worst)."""
    m = g.shape[1]
    if m == 1:
        return torch.zeros_like(g[:, 0]), torch.zeros_like(g)
    ends = r.argsort(dim=1, descending=True, stable=True)[:, :: m - 1]  # the first of the best, the last of the worst
    best, worst = g.gather(1, ends).split(1, 1)
    behind = worst - best
    push = behind.sigmoid()
    loss, d = F.softplus(behind.view(-1), threshold=SAME), torch.zeros_like(g).scatter_(1, ends, torch.cat([-push, push], 1))
    if not terms.finite:
        _fill(loss, d, ((best == -torch.inf) & (worst == -torch.inf)).view(-1), 0)
    return loss, d


def _best_worst_pairs(g: Tensor, r: Tensor, terms: Terms) -> Losses:
    """The mean of that over the orders of tied candidates: over pairs of one of the best and another one of the worst."""
    best, worst = (r == x(1, keepdim=True) for x in (r.amax, r.amin))
    position = torch.arange(g.shape[1], device=g.device)
    loss, d = _pairs(
        g, terms, lambda columns: best[:, :, None] & worst[:, None, columns] & (position[:, None] != position[columns])
    )
    pairs = (best.sum(1) * worst.sum(1) - (best & worst).sum(1)).clamp_(min=1)
    return loss / pairs, d / pairs[:, None]


def _all_pairs(g: Tensor, r: Tensor, terms: Terms) -> Losses:
    """LambdaRank's pairs, whose first member is the more relevant one."""
    if terms.weighting == "none":
        return _pairs(g, terms, lambda columns: r[:, :, None] > r[:, None, columns])
    by_score = g.argsort(dim=1, descending=True, stable=True)
    g, r = g.gather(1, by_score), r.gather(1, by_score).clamp_(-FINITE, FINITE)
    loss, d = _pairs(g, terms, _NDCGChange(r, terms))
    return loss, torch.empty_like(d).scatter_(1, by_score, d)


def _pairs(g: Tensor, terms: Terms, weights: Callable[[slice], Tensor]) -> Losses:
    """sum w_ij softplus(g_j - g_i), w [lists, i, j] for some j at a time; no term of two g at -inf."""
    loss, up, down = 0, 0, []
    for columns in _columns(g.shape[1]):
        w = weights(columns).to(g.dtype)
        behind = g[:, None, columns] - g[:, :, None]
        if not terms.finite:
            lost = g == -torch.inf
            w = w.masked_fill(lost[:, :, None] & lost[:, None, columns], 0)
            behind = behind.masked_fill(w == 0, 0)
        loss = loss + (w * F.softplus(behind, threshold=SAME)).sum((1, 2))
        push = w * behind.sigmoid()
        up = up + push.sum(2)
        down.append(push.sum(1))
    return loss, torch.cat(down, 1) - up


def _columns(m: int) -> Iterator[slice]:
    step = max(1, PAIRS // m)
    return (slice(j, j + step) for j in range(0, m, step))


class _NDCGChange:
    """The change in NDCG if i and j swapped their ranks, where i is the more relevant one; 0 elsewhere. Lists are in order of
    score: what ranks weigh is the same for all of them then."""

    def __init__(self, r: Tensor, terms: Terms):
        self.r, self.k, self.weighting = r, terms.k or r.shape[1], terms.weighting
        self.rank = torch.arange(1, r.shape[1] + 1, dtype=r.dtype, device=r.device)
        self.discount = _discount(self.rank)
        self.discount[self.k :] = 0
        top = r.amax(1, keepdim=True).clamp_(min=0)  # gains are taken relative to 2^top, or they would overflow
        best = r.sort(dim=1, descending=True).values
        gains = torch.exp2(best.clamp(min=0) - top) * _less_than_one(best.abs()) * best.sign()
        ideal = (gains * self.discount).sum(1, keepdim=True).abs_()
        self.gain = (torch.exp2(r - top) / ideal.masked_fill_(ideal == 0, 1))[:, :, None]

    def __call__(self, columns: slice) -> Tensor:
        lead = (self.r[:, :, None] - self.r[:, None, columns]).clamp_(min=0)
        return self.gain * _less_than_one(lead) * self._of_ranks(columns)

    def _of_ranks(self, columns: slice) -> Tensor:
        if self.weighting == "dcg":
            return (self.discount[:, None] - self.discount[columns]).abs_()
        i, j = self.rank[:, None], self.rank[columns]
        apart, lower = (i - j).abs_().clamp_(min=1), torch.maximum(i, j)  # only i = j is 0 apart, and that is no pair
        return (_discount(apart) - _discount(apart + 1)) * torch.where(lower > self.k, 1 / (1 - _discount(lower)), 1)


def _less_than_one(x: Tensor) -> Tensor:
    """1 - 2^-x for x >= 0, with full relative accuracy however small x is."""
    return torch.expm1(-math.log(2) * x).neg_()


def _discount(rank: Tensor) -> Tensor:
    return 1 / torch.log2(1 + rank)

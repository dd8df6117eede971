"""The specification: each op in a few lines of eager PyTorch, in any dtype, float64 included.

Nothing here is fast or lean; tests and benchmarks hold everything else against it. Half-precision logits are raised to
float32 before the softmax, as careful trainers do; the GEMM of the linear ops runs in the dtype of its operands.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from . import validation
from .objectives import Contrastive, LambdaRank, ListMLE, ListNet, Pairwise, resolve
from .outputs import ListwiseLossOutput, TokenLogps


def token_logps(logits, labels, *, ignore_index=-100, logit_scale=1.0, softcap=None, return_stats=False):
    """l_t = z[t, y_t] - logsumexp(z[t]), z = scale * logits, soft-capped; 0 where ignored. Shape of labels."""
    mask = validation.token_mask(labels, ignore_index)
    z = logits[mask]
    z = (z if z.dtype == torch.float64 else z.float()) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    y = labels[mask].long()[:, None]
    logps = z.log_softmax(-1).gather(1, y)[:, 0]
    if not return_stats:
        return _of_all_tokens(logps, mask)
    z = z.detach()
    entropy = torch.special.entr(z.softmax(-1)).sum(-1)
    top1 = (z.gather(1, y)[:, 0] >= z.amax(-1)).to(logps.dtype)
    return TokenLogps(*(_of_all_tokens(x, mask) for x in (logps, entropy, top1)))


def _of_all_tokens(x, mask):
    """x of the tokens that count -> of the mask's shape, 0 where ignored."""
    return torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_scatter(mask, x)


def sequence_logps(logits, labels, *, cu_seqlens=None, length_normalized=False, ignore_index=-100, **options):
    """L_s = sum of l_t over the tokens of candidate s (their mean if length_normalized; 0 if it has none). [S]"""
    logps = token_logps(logits, labels, ignore_index=ignore_index, **options)
    return _per_candidate(logps, validation.token_mask(labels, ignore_index), cu_seqlens, length_normalized)


def _per_candidate(logps, mask, cu_seqlens, length_normalized):
    if cu_seqlens is None:
        total, count = logps.sum(1), mask.sum(1)
    else:
        lengths = cu_seqlens.diff().tolist()
        total = torch.stack([x.sum() for x in logps.split(lengths)] or [logps.sum()])[: len(lengths)]
        count = torch.tensor([int(x.sum()) for x in mask.split(lengths)], device=logps.device)
    return total / count.clamp(min=1) if length_normalized else total


def listwise_loss(scores, relevance, *, list_sizes, objective="contrastive", reduction="mean"):
    """One loss per list, then mean / sum / none over lists."""
    objective = resolve(objective)
    if isinstance(list_sizes, int):
        list_sizes = [list_sizes] * (scores.shape[0] // list_sizes)
    sizes = [int(m) for m in list_sizes]
    losses = [list_loss(objective, g, r) for g, r in zip(scores.split(sizes), relevance.split(sizes), strict=True)]
    loss = torch.stack(losses) if losses else scores[:0]
    if reduction == "none":
        return loss
    return loss.sum() / (max(len(losses), 1) if reduction == "mean" else 1)


def list_loss(objective, g, r):
    """The loss of one list: scores g [m], relevance r [m]. A term that only compares scores at -inf is left out."""
    if isinstance(objective, LambdaRank):
        weight = lambda_weights(objective, g.detach(), r)
        mute = _both_lost(g[:, None], g[None, :]) | (weight == 0)
        pairs = (r[:, None] > r[None, :]) & ~mute
        i, j = pairs.nonzero(as_tuple=True)
        return (weight[i, j] * -F.logsigmoid(g[i] - g[j])).sum()
    order = r.argsort(descending=True, stable=True)
    g, r = g[order], r[order]
    match objective:
        case Pairwise(ties="skip") if (r == r[0]).sum() > 1 or (r == r[-1]).sum() > 1:
            return g[:0].sum()
        case Contrastive(ties="skip") if (r == r[0]).sum() > 1:
            return g[:0].sum()
        case ListMLE(ties="skip") if (r[1:] == r[:-1]).any():
            return g[:0].sum()
        case Pairwise(ties="mean") if len(g) > 1:
            pairs = (r == r[0])[:, None] & (r == r[-1]) & ~torch.eye(len(g), dtype=torch.bool, device=g.device)
            i, j = (pairs & ~_both_lost(g[:, None], g)).nonzero(as_tuple=True)
            return -F.logsigmoid(g[i] - g[j]).sum() / pairs.sum()
        case Contrastive(ties="mean"):
            best = (r == r[0]).nonzero()[:, 0]
            return sum(_suffix(g, i) for i in best) / len(best)
        case ListMLE(ties="efron"):
            return sum((_efron_term(g, r, i) for i in range(len(g))), g[:0].sum())
        case Pairwise():
            return -F.logsigmoid(g[0] - g[-1]) if len(g) > 1 and not _both_lost(g[0], g[-1]) else g[:0].sum()
        case Contrastive():
            return _suffix(g)
        case ListMLE():
            return sum((_suffix(g[i:]) for i in range(len(g) - 1)), g[:0].sum())
        case ListNet(temperature=temperature):
            r = r.to(g.dtype).clamp(*_range(g))
            p = ((r - r.max()) / temperature).softmax(0)
            return sum((p[i] * _suffix(g, i) for i in range(len(g)) if p[i] > 0), g[:0].sum())


def _both_lost(a, b):
    return (a == -torch.inf) & (b == -torch.inf)


def _suffix(g, i=0):
    return g.logsumexp(0) - g[i] if (g != -torch.inf).any() else g[:0].sum()


def _efron_term(g, r, i):
    """The i-th of a list in falling order: among all below it and what is left, on average, of those it is tied with."""
    tied = r == r[i]
    left = 1 - tied[:i].sum().to(g.dtype) / tied.sum()
    weight = torch.where(tied, left, (r < r[i]).to(g.dtype))
    rest = g[weight > 0] + weight[weight > 0].log()
    return rest.logsumexp(0) - g[i] if (rest != -torch.inf).any() else g[:0].sum()


def lambda_weights(objective, g, r):
    """w_ij of LambdaRank: |gain_i - gain_j| / |ideal DCG|, times what the ranks by score (from 1) are apart in discount."""
    m, k = len(g), objective.k or len(g)
    if objective.weighting is None:
        return torch.ones(m, m, dtype=g.dtype, device=g.device)
    position = torch.arange(1, m + 1, dtype=g.dtype, device=g.device)
    r = r.to(g.dtype).clamp(*_range(g))
    top = r.max().clamp(min=0)  # gains are divided by 2^top, as the ideal is: they have no largest number then

    def gain_difference(a, b):  # 2^a - 2^b, without cancellation
        return (a - b).sign() * torch.exp2(torch.maximum(a, b) - top) * -torch.expm1(-math.log(2) * (a - b).abs())

    ideal = (gain_difference(r, torch.zeros_like(r)).sort(descending=True).values * _discount(position))[:k].sum().abs()
    rank = torch.empty_like(g).index_copy(0, g.argsort(descending=True, stable=True), position)
    if objective.weighting == "dcg":
        d = torch.where(rank <= k, _discount(rank), 0)
        change = (d[:, None] - d[None, :]).abs()
    else:
        apart = (rank[:, None] - rank[None, :]).abs()
        lower = torch.maximum(rank[:, None], rank[None, :])
        change = torch.where(apart > 0, (_discount(apart) - _discount(apart + 1)).abs(), 0)
        change = change * torch.where(lower > k, 1 / (1 - _discount(lower)), 1)
    return gain_difference(r[:, None], r[None, :]).abs() / torch.where(ideal == 0, 1, ideal) * change


def _discount(rank):
    return 1 / torch.log2(1 + rank)


def _range(x):
    """Numbers whose differences are finite: infinite relevance counts as the ends."""
    most = torch.finfo(x.dtype).max / 4
    return -most, most


def fused_listwise_loss(
    logits,
    labels,
    relevance,
    *,
    list_sizes,
    cu_seqlens=None,
    objective="contrastive",
    ref_logps=None,
    beta=0.1,
    length_normalized=False,
    ignore_index=-100,
    logit_scale=1.0,
    softcap=None,
    reduction="mean",
    return_stats=False,
):
    """objective( beta * (L_s - Lref_s) ; relevance ), the LarPO loss from logits."""
    options = dict(ignore_index=ignore_index, logit_scale=logit_scale, softcap=softcap)
    tokens = token_logps(logits, labels, return_stats=return_stats, **options)
    logps = tokens.logps if return_stats else tokens
    logps = _per_candidate(logps, validation.token_mask(labels, ignore_index), cu_seqlens, length_normalized)
    scores = beta * (logps if ref_logps is None else logps - ref_logps.detach())
    loss = listwise_loss(scores, relevance, list_sizes=list_sizes, objective=objective, reduction=reduction)
    stats = (tokens.entropy, tokens.top1) if return_stats else (None, None)
    return ListwiseLossOutput(loss, logps.detach(), scores.detach(), *stats)


def linear_token_logps(hidden, weight, labels, *, bias=None, **options):
    return token_logps(F.linear(hidden, weight, bias), labels, **options)


def linear_sequence_logps(hidden, weight, labels, *, bias=None, **options):
    return sequence_logps(F.linear(hidden, weight, bias), labels, **options)


def fused_linear_listwise_loss(hidden, weight, labels, relevance, *, bias=None, **options):
    return fused_listwise_loss(F.linear(hidden, weight, bias), labels, relevance, **options)

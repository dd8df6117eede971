"""What each op means, as loops over tokens, candidates and lists, independent of the package under test.

`compute` is the dtype of the arithmetic: float64 gives the truth, float32 what a trainer's eager code does
with float32, bfloat16 or float16 logits. Everything is differentiable.
"""

import math
from itertools import pairwise, permutations

import torch
import torch.nn.functional as F


def final_logits(row, logit_scale=1.0, softcap=None, compute=torch.float64):
    """[V] model logits -> [V] logits of the softmax: scaled, then capped."""
    z = logit_scale * row.to(compute)
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def token_logps(logits, labels, *, ignore_index=-100, compute=torch.float64, **transform):
    """logits [..., V], labels [...] -> log-probability of each label, 0 where ignored."""
    rows = logits.reshape(-1, logits.shape[-1])
    logps = []
    for row, label in zip(rows, labels.reshape(-1).tolist(), strict=True):
        if label == ignore_index:
            logps.append(torch.zeros((), dtype=compute, device=row.device))
            continue
        z = final_logits(row, compute=compute, **transform)
        if z[label] == -math.inf:
            logps.append(torch.full((), -math.inf, dtype=compute, device=row.device))
        else:
            logps.append(F.log_softmax(z, -1)[label])
    logps = torch.stack(logps) if logps else rows.new_zeros(0, dtype=compute)
    return (logps + 0 * rows[:0].sum()).reshape(labels.shape)  # the empty sum ties the result to the logits' graph


def entropies(logits, labels, *, ignore_index=-100, **transform):
    """-sum p log p of each token's distribution, 0 where ignored; labels' shape, float64."""
    values = []
    for row, label in zip(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).tolist(), strict=True):
        p = final_logits(row, **transform).softmax(-1)
        values.append(0.0 if label == ignore_index else torch.special.entr(p).sum().item())
    return torch.tensor(values, dtype=torch.float64).reshape(labels.shape)


def top1_hits(logits, labels, *, ignore_index=-100):
    """Is the label the token of the largest logit? False where ignored; labels' shape, bool."""
    rows = logits.reshape(-1, logits.shape[-1])
    hits = [
        label != ignore_index and row.argmax().item() == label
        for row, label in zip(rows, labels.reshape(-1).tolist(), strict=True)
    ]
    return torch.tensor(hits).reshape(labels.shape)


def sequence_logps(logits, labels, *, cu_seqlens=None, length_normalized=False, ignore_index=-100, **options):
    """Sum (or mean) of each candidate's token logps: [S]."""
    tokens = token_logps(logits, labels, ignore_index=ignore_index, **options)
    if cu_seqlens is None:
        spans = list(zip(tokens, labels, strict=True))
    else:
        ends = cu_seqlens.tolist()
        spans = [(tokens[a:b], labels[a:b]) for a, b in pairwise(ends)]
    sums = []
    for logps, candidate_labels in spans:
        count = int((candidate_labels != ignore_index).sum())
        sums.append(logps.sum() / (max(count, 1) if length_normalized else 1))
    return torch.stack(sums) if sums else tokens.reshape(-1)[:0]


def dcg_pair_weight(gains, ranks, i, j, weighting, k):
    """What exchanging candidates i and j changes in NDCG, rax's way: `gains` normalised, `ranks` from 1."""
    if weighting == "dcg":
        discounts = [1 / math.log2(1 + ranks[c]) if k is None or ranks[c] <= k else 0.0 for c in (i, j)]
        return abs(gains[i] - gains[j]) * abs(discounts[0] - discounts[1])
    apart, lowest = abs(ranks[i] - ranks[j]), max(ranks[i], ranks[j])
    discount = abs(1 / math.log2(1 + apart) - 1 / math.log2(2 + apart))
    if k is not None and lowest > k:
        discount /= 1 - 1 / math.log2(1 + lowest)
    return abs(gains[i] - gains[j]) * discount


def lambdarank(scores, relevance, weighting=None, k=None):
    loss = 0 * scores.sum()
    by_score = sorted(range(len(relevance)), key=lambda c: -scores[c].item())
    ranks = {c: rank for rank, c in enumerate(by_score, 1)}
    gains = [2.0**r - 1 for r in relevance]
    ideal = sum(g / math.log2(1 + rank) for rank, g in enumerate(sorted(gains, reverse=True)[:k], 1)) or 1.0
    gains = [g / ideal for g in gains]
    for i, better in enumerate(relevance):
        for j, worse in enumerate(relevance):
            if better > worse:
                weight = 1.0 if weighting is None else dcg_pair_weight(gains, ranks, i, j, weighting, k)
                loss = loss - weight * F.logsigmoid(scores[i] - scores[j])
    return loss


def mean_over_orders(scores, relevance, objective):
    """The loss of a list, averaged over every order in which its candidates of equal relevance can stand."""
    orders = [o for o in permutations(range(len(relevance))) if all(relevance[a] >= relevance[b] for a, b in pairwise(o))]
    losses = [list_loss(scores[list(order)], [relevance[c] for c in order], objective) for order in orders]
    return torch.stack(losses).mean()


def efron(scores, relevance):
    """ListMLE with Efron's denominators: block by block of tied candidates, the best block first."""
    loss = 0 * scores.sum()
    for grade in sorted(set(relevance), reverse=True):
        block = [c for c, r in enumerate(relevance) if r == grade]
        below = [c for c, r in enumerate(relevance) if r < grade]
        for step in range(len(block)):
            rest = scores[below].exp().sum() + (1 - step / len(block)) * scores[block].exp().sum()
            loss = loss + rest.log()
        loss = loss - scores[block].sum()
    return loss


def is_settled(relevance, objective):
    """Whether ties leave the order open where the objective asks for it."""
    unique = {r for r in relevance if relevance.count(r) == 1}
    asked = {"contrastive": [max(relevance)], "pairwise": [max(relevance), min(relevance)], "listmle": relevance}
    return unique.issuperset(asked[objective])


def list_loss(scores, relevance, objective, temperature=1.0, ties="order", **options):
    """scores [m] and m floats -> loss of one list."""
    relevance = [float(r) for r in relevance]
    best_first = sorted(range(len(relevance)), key=lambda c: -relevance[c])  # stable: input order breaks ties
    if len(relevance) == 1:
        return 0 * scores.sum()
    if ties == "mean":
        return mean_over_orders(scores, relevance, objective)
    if ties == "efron":
        return efron(scores, relevance)
    if ties == "skip" and not is_settled(relevance, objective):
        return 0 * scores.sum()
    if objective == "pairwise":
        return -F.logsigmoid(scores[best_first[0]] - scores[best_first[-1]])
    if objective == "contrastive":
        return torch.logsumexp(scores, 0) - scores[best_first[0]]
    if objective == "listmle":
        s = scores[best_first]
        return sum(torch.logsumexp(s[i:], 0) - s[i] for i in range(len(relevance)))
    if objective == "lambdarank":
        return lambdarank(scores, relevance, **options)
    if objective == "listnet":
        target = (torch.tensor(relevance, dtype=scores.dtype, device=scores.device) / temperature).softmax(0)
        return -(target * F.log_softmax(scores, 0)).sum()
    raise AssertionError(objective)


def listwise_losses(scores, relevance, list_sizes, objective):
    """scores [S] -> [lists]. objective: a name, or an object that has one and the keywords of `list_loss` as its fields."""
    name, options = (objective, {}) if isinstance(objective, str) else (objective.name, vars(objective))
    losses, start = [], 0
    for size in list_sizes:
        span = slice(start, start + size)
        losses.append(list_loss(scores[span], relevance[span].tolist(), name, **options))
        start += size
    assert start == scores.shape[0]
    return torch.stack(losses) if losses else scores[:0]


def fused_listwise_loss(logits, labels, relevance, *, list_sizes, objective="contrastive", ref_logps=None, beta=0.1, **rest):
    """-> (loss [lists], logps [S], scores [S])."""
    logps = sequence_logps(logits, labels, **rest)
    scores = beta * (logps if ref_logps is None else logps - ref_logps.to(logps.dtype))
    return listwise_losses(scores, relevance, list_sizes, objective), logps, scores

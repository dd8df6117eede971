"""How well implicit rewards order lists of candidates: the numbers that training logs.

Each is worked out for every list and then averaged over the lists where it is defined: an order needs two candidates
that differ in relevance. A metric that no list defines is absent. Names under rewards/ and logps/ are TRL's.

| metric | of a list |
|---|---|
| rewards/chosen | score of the best candidate by relevance (of several, their mean) |
| rewards/rejected | mean score of the others: the candidates of lower relevance than the best |
| rewards/margins | the difference of the two |
| rewards/accuracies | share of the others that score lower than the best (of several best, the mean) |
| logps/chosen, logps/rejected | the same of log-likelihoods, nats |
| ndcg, ndcg@k | discounted gain of the order by score over that of the order by relevance |
| mrr | 1 / rank by score of the best candidate (of the first to come, if several are equally good) |
| kendall_tau | tau-b of scores against relevance; 0 if all scores are equal |
| list/size | candidates |
| list/frac_tied | share of pairs that are equal in relevance; for two candidates or more |

Candidates with equal scores have no order. ndcg and mrr are then the mean over all orders of these, so that a policy
that still equals its reference (every score 0) gets what random order gets, however the data is sorted; so does
kendall_tau, which is 0 for it.

The gain of a candidate in ndcg is the number of candidates in its list that are worse, divided by m - 1; the discount at
rank r is 1 / log2(r + 1) (Järvelin and Kekäläinen 2002). Raw rewards have no zero and no unit, so gains of 2^reward, or
linear ones, would change with a constant added by the reward model; these gains only know the order, as the losses do.
With relevance 0 or 1 they give the usual ndcg.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from larpo_kernels import validation

from ..runs.checks import check_count

Sums = dict[str, tuple[float, int]]
PAIRS = 2**21  # pairs of candidates that are compared at a time: 16 MB of float64


def list_metrics(
    scores: Tensor,
    relevance: Tensor,
    list_sizes: int | Sequence[int] | Tensor,
    logps: Tensor | None = None,
    ndcg_k: int | None = None,
) -> dict[str, float]:
    """Means over lists of the metrics that training logs: rewards/*, logps/*, ndcg, mrr, kendall_tau and list/*.

    Args:
        scores: [S] implicit rewards, any floating dtype, lists one after the other.
        relevance: [S] rewards, higher is better, any real dtype.
        list_sizes: candidates per list: an int m (S = lists * m), or sizes (sequence or int tensor) that sum to S.
        logps: [S] log-likelihoods, nats, for logps/chosen and logps/rejected.
        ndcg_k: rank of the cut of "ndcg@k" (named after it, "ndcg@3"), >= 1; without it only "ndcg".

    Returns:
        A dict by name; a metric that no list defines is absent. All tensors reach the CPU in one copy, the only wait for a GPU.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it should be.

    >>> metrics = list_metrics(torch.tensor([0.3, -0.1, 0.2]), torch.tensor([2.0, 0.0, 5.0]), list_sizes=3)
    >>> round(metrics["rewards/margins"], 4), metrics["rewards/accuracies"], metrics["mrr"]
    (0.1, 0.5, 0.5)
    """
    sums = list_metric_sums(scores, relevance, list_sizes, logps, ndcg_k)
    return {name: total / lists for name, (total, lists) in sums.items()}


class MetricMeans:
    """Means of metrics over steps, weighted by the number of lists.

    >>> means = MetricMeans()
    >>> means.add({"mrr": 1.0}, lists=3)
    >>> means.add({"mrr": 0.5, "ndcg": 0.8}, lists=1)
    >>> means.pop()
    {'mrr': 0.875, 'ndcg': 0.8}
    >>> means.pop()
    {}
    """

    def __init__(self) -> None:
        self.sums: Sums = {}

    def add(self, metrics: Mapping[str, float], lists: int = 1) -> None:
        """Means over `lists` lists."""
        self.add_sums({name: (value * lists, lists) for name, value in metrics.items()})

    def add_sums(self, sums: Mapping[str, tuple[float, int]]) -> None:
        """What `list_metric_sums` returns, or the `sums` of another rank: exact where a metric is undefined in some lists."""
        for name, (total, lists) in sums.items():
            old_total, old_lists = self.sums.get(name, (0.0, 0))
            self.sums[name] = (old_total + total, old_lists + lists)

    def pop(self) -> dict[str, float]:
        """The means since the last call, and starts anew."""
        means = {name: total / lists for name, (total, lists) in self.sums.items() if lists}
        self.sums = {}
        return means


def list_metric_sums(
    scores: Tensor,
    relevance: Tensor,
    list_sizes: int | Sequence[int] | Tensor,
    logps: Tensor | None = None,
    ndcg_k: int | None = None,
) -> Sums:
    """As `list_metrics`, but of each metric its sum over lists and the number of lists that define it."""
    check_count("ndcg_k", ndcg_k, 1)
    sizes, columns = _on_cpu(list_sizes, scores, relevance, logps)
    found = MetricMeans()
    for lists, candidates in _parts(sizes.tolist()):
        with np.errstate(divide="ignore", invalid="ignore"):  # where a list does not define a metric
            found.add_sums(_sums(sizes[lists], [x[candidates] for x in columns], ndcg_k))
    return found.sums


def _parts(sizes: list[int]) -> Iterator[tuple[slice, slice]]:
    """Lists, and their candidates, whose [L, M, M] have at most PAIRS entries, or one list that has more."""
    first = begin = end = largest = 0
    for i, m in enumerate(sizes):
        largest = max(largest, m)
        if i > first and (i + 1 - first) * largest**2 > PAIRS:
            yield slice(first, i), slice(begin, end)
            first, begin, largest = i, end, m
        end += m
    if sizes:
        yield slice(first, len(sizes)), slice(begin, end)


def _sums(sizes: np.ndarray, columns: Sequence[np.ndarray], ndcg_k: int | None) -> Sums:
    """Of sizes [L], at least one, and float64 columns [S]: scores, relevance and perhaps logps.

    In numpy, whose calls cost a fraction of torch's where arrays are this small."""
    there = np.arange(sizes.max()) < sizes[:, None]  # [L, M]
    g, r, *rest = (_padded(x, there) for x in columns)
    pairs = there[:, :, None] & there[:, None, :]  # [L, M, M]
    m = sizes.astype(float)
    g_above, r_above = (pairs & (x[:, None, :] > x[:, :, None]) for x in (g, r))  # of i, j: whether j is above i
    g_below, r_below = (x.transpose(0, 2, 1) for x in (g_above, r_above))

    best_r = np.where(there, r, -np.inf).max(1, keepdims=True)
    equally_good = there & (r == best_r)
    others = there & (r < best_r)
    ordered = others.any(1)  # [L]
    everywhere = np.ones_like(ordered)

    per_list: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # values [L], where they are defined [L]

    def against_others(prefix: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        chosen, rejected = _mean(x, equally_good), _mean(x, others)
        per_list[f"{prefix}/chosen"] = chosen, ordered
        per_list[f"{prefix}/rejected"] = rejected, ordered
        return chosen, rejected

    chosen, rejected = against_others("rewards", g)
    per_list["rewards/margins"] = chosen - rejected, ordered
    best_to_others = equally_good[:, :, None] & others[:, None, :]
    per_list["rewards/accuracies"] = (best_to_others & g_below).sum((1, 2)) / best_to_others.sum((1, 2)), ordered
    if rest:
        against_others("logps", rest[0])

    above = g_above.sum(2)  # [L, M] candidates that score higher than this one
    level = (pairs & (g[:, None, :] == g[:, :, None])).sum(2)  # that score the same, itself included
    gains = r_below.sum(2) / np.maximum(m[:, None] - 1, 1)
    per_list["ndcg"] = _ndcg(gains, above, level, None), ordered
    if ndcg_k is not None:
        per_list[f"ndcg@{ndcg_k}"] = _ndcg(gains, above, level, ndcg_k), ordered
    per_list["mrr"] = _reciprocal_rank(g, there, equally_good), ordered

    untied_g, untied_r = above.sum(1), r_above.sum((1, 2))  # pairs
    agree = (g_above & r_above).sum((1, 2)) - (g_above & r_below).sum((1, 2))
    per_list["kendall_tau"] = np.where(untied_g > 0, agree / np.sqrt(untied_g * untied_r), 0.0), ordered

    per_list["list/size"] = m, everywhere
    per_list["list/frac_tied"] = 1 - 2 * untied_r / (m * (m - 1)), sizes > 1

    names = list(per_list)
    values, defined = (np.stack(both) for both in zip(*per_list.values(), strict=True))
    totals, lists = np.where(defined, values, 0.0).sum(1).tolist(), defined.sum(1).tolist()
    return {name: (total, n) for name, total, n in zip(names, totals, lists, strict=True) if n}


def _padded(x: np.ndarray, there: np.ndarray) -> np.ndarray:
    """[S] -> [L, M], 0 where no candidate is."""
    out = np.zeros(there.shape)
    out[there] = x
    return out


def _mean(x: np.ndarray, where: np.ndarray) -> np.ndarray:
    """[L, M] -> [L]: the mean of the entries of each row in `where`; NaN where there are none."""
    return np.where(where, x, 0.0).sum(1) / where.sum(1)


def _ndcg(gains: np.ndarray, above: np.ndarray, level: np.ndarray, k: int | None) -> np.ndarray:
    """[L] from gains, and how many candidates score above and level with each [L, M]; NaN where all gains are 0.

    Equal scores share the ranks above + 1 .. above + level: each gets the mean of their discounts.
    """
    size = gains.shape[1]
    discounts, summed = _discounts(size, k)
    last = np.minimum(above + level, size)
    mean_discounts = (summed[last] - summed[above]) / np.maximum(level, 1)  # padding has level 0, and gain 0
    ideal = np.sort(gains)[:, ::-1] @ discounts
    return (gains * mean_discounts).sum(1) / ideal


@functools.lru_cache(64)
def _discounts(size: int, k: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Of ranks 1 to size, 0 behind rank k; and their sums over the first 0 to size ranks."""
    discounts = 1 / np.log2(np.arange(2, size + 2))
    if k is not None:
        discounts[k:] = 0
    return discounts, np.concatenate([[0.0], discounts.cumsum()])


def _reciprocal_rank(g: np.ndarray, there: np.ndarray, good: np.ndarray) -> np.ndarray:
    """[L]: the mean of 1 / rank of the first good candidate over all orders of candidates with equal scores."""
    top = np.where(good, g, -np.inf).max(1, keepdims=True)  # the best score of a good one: the first comes here
    above = (there & (g > top)).sum(1)
    tied = (there & (g == top)).sum(1)
    good_tied = (good & (g == top)).sum(1)
    not_yet = np.ones(len(g))  # the chance that the first ranks of the tie hold no good one
    total = np.zeros_like(not_yet)
    for place in range(tied.max()):
        found = not_yet * np.minimum(good_tied / np.maximum(tied - place, 1), 1) * (place < tied)
        total += found / (above + place + 1)
        not_yet = not_yet - found
    return total


def _on_cpu(list_sizes: int | Sequence[int] | Tensor, *columns: Tensor | None) -> tuple[np.ndarray, list[np.ndarray]]:
    """Sizes [L] int64 and the columns [S] float64 on the CPU, in one copy; a column that is None is left out."""
    named = [(name, x) for name, x in zip(("scores", "relevance", "logps"), columns, strict=True) if x is not None]
    for name, x in named:
        if not isinstance(x, Tensor) or x.is_complex():
            raise TypeError(f"{name} must be a real tensor [S], got {getattr(x, 'dtype', type(x).__name__)}")
        if x.dim() != 1 or x.shape != named[0][1].shape:
            raise ValueError(f"{name} must be [S], one per candidate, got {list(x.shape)} (scores: {list(named[0][1].shape)})")
    on_device = isinstance(list_sizes, Tensor)
    if on_device and (list_sizes.is_floating_point() or list_sizes.dtype == torch.bool or list_sizes.dim() != 1):
        raise TypeError(f"list_sizes must be [lists] of an integer dtype, got {list_sizes.dtype} {list(list_sizes.shape)}")
    device = named[0][1].device
    parts = [x.detach() for _, x in named] + ([list_sizes] if on_device else [])
    wide = torch.float64 if any(x.dtype == torch.float64 for x in parts) else torch.float32
    lengths = [len(x) for x in parts]
    copied = list(torch.cat([x.to(device, wide) for x in parts]).cpu().double().split(lengths))
    if on_device:
        list_sizes = copied.pop().long()
    elif not isinstance(list_sizes, int) and len(list_sizes):
        list_sizes = torch.as_tensor(np.asarray(list_sizes))  # integers of numpy too
    borders, m = validation.lists(list_sizes, lengths[0], torch.device("cpu"))
    sizes = torch.full((lengths[0] // m,), m) if borders is None else borders.diff()
    return sizes.numpy(), [x.numpy() for x in copied]

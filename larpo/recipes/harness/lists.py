"""Lists as flat tensors: what losses of the recipes need beside `larpo_kernels.listwise_loss`.

S candidates, L lists one after the other; list_sizes [L] int64 sum to S, each at least 1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def owners(list_sizes: Tensor) -> Tensor:
    """[S] int64: the list that each candidate belongs to."""
    return torch.arange(len(list_sizes), device=list_sizes.device).repeat_interleave(list_sizes)


def list_means(values: Tensor, list_sizes: Tensor) -> Tensor:
    """[L]: the mean over each list of values [S].

    >>> list_means(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([2, 1]))
    tensor([2., 5.])
    """
    return values.new_zeros(len(list_sizes)).index_add(0, owners(list_sizes), values) / list_sizes


def pairs(relevance: Tensor, list_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """All (better, worse) pairs within lists, as places among the S candidates, ordered by the better one.

    >>> [x.tolist() for x in pairs(torch.tensor([1.0, 3.0, 2.0, 5.0]), torch.tensor([3, 1]))]
    [[1, 1, 2], [0, 2, 0]]
    """
    owner = owners(list_sizes)
    return ((owner[:, None] == owner) & (relevance[:, None] > relevance)).nonzero(as_tuple=True)


def best(relevance: Tensor, list_sizes: Tensor) -> Tensor:
    """[L] int64: the place of each list's best candidate, the first of equals.

    >>> best(torch.tensor([0.0, 5.0, 5.0, 7.0]), torch.tensor([3, 1])).tolist()
    [1, 3]
    """
    return _ranked(relevance, list_sizes)[list_sizes.cumsum(0) - list_sizes]


def ideal_dcg(relevance: Tensor, list_sizes: Tensor) -> Tensor:
    """[L] float64: the sum of (2^r - 1) / log2(1 + rank) in the order of falling relevance.

    >>> ideal_dcg(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([2, 1])).round(decimals=4).tolist()
    [3.6309, 0.0]
    """
    order, owner = _ranked(relevance, list_sizes), owners(list_sizes)
    rank = torch.arange(1, len(order) + 1, device=order.device) - (list_sizes.cumsum(0) - list_sizes)[owner]
    gains = (2 ** relevance.double()[order] - 1) / (1 + rank.double()).log2()
    return gains.new_zeros(len(list_sizes)).index_add(0, owner, gains)


def _ranked(relevance: Tensor, list_sizes: Tensor) -> Tensor:
    """[S] int64: places by list and then by falling relevance, equal ones as they stand."""
    order = relevance.argsort(descending=True, stable=True)
    return order[owners(list_sizes)[order].argsort(stable=True)]

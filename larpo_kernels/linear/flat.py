"""Whether the logits of a call are flat, seen from a few of its tokens before any other is walked.

A model that was hardly trained gives every row of the vocabulary next to nothing. Then no row may be merged, and a walk that
looks for rows to merge is slower than one that does not: its blocks of tokens are smaller, so that d weight is added up over
more of them, and it looks in vain.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import walk
from .schedules import FEW_TOKENS
from .vocab_shard import add_up

FLAT = 0.5  # of the probability of those tokens; text leaves far less below the threshold, initial logits nearly all


def places(count: int) -> list[int]:
    """Of the tokens to look at, among `count` that count: evenly spaced, first and last among them."""
    return [i * (count - 1) // (FEW_TOKENS - 1) for i in range(FEW_TOKENS)]


def mostly_below(head: walk.Head, hidden: Tensor, labels: Tensor, threshold: float, backend: str) -> bool:
    """Whether these tokens have most of their probability in rows that have at most the threshold of their token.

    hidden [n, H] and labels [n] of a few tokens. Ranks that share the vocabulary get one answer. A GPU is waited for.
    """
    rows = head.weight.shape[0]
    with torch.no_grad():
        keeps = dict(held_rows=rows, held_dtype=head.dtype, fuse_hidden_grad=False)
        _, saved = walk.forward(head, hidden, labels, **keeps, stats=False, backend=backend)
        e = saved.held.clamp_(min=0)  # negative at the targets, which always count
        below = e.masked_fill_(e > (threshold * saved.total).to(e.dtype), 0).sum(0, dtype=saved.total.dtype) / saved.total
        return bool(add_up(below, head.group).mean() > FLAT)

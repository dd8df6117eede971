"""The tail of a softmax: which rows of the vocabulary a block of tokens needs for its gradients, and the rest merged.

A trained model leaves nearly all of the vocabulary next to no probability, for any token of a block. So once a tile is
formed, only the rows that some token gives more than a threshold are gathered from it, and the gradients are GEMMs of
those. What the others add to d hidden is merged: each token's summed E of them times one mean row of the weight, weighted
by what the block gives each row. (More mean rows do not pay.) To d weight and d bias they add nothing: a merged
gradient could be far off where those of tokens cancel, so theirs is exactly 0.

A row's probability is taken relative to the sum so far, which never exceeds the whole: no row above the threshold is left
out, and a tile is looked at while it is in the cache. A tile stays whole, and exact, where gathering would not pay or where
the merged share of the block would grow too large for a mean row. Flat logits do not come here at all (flat.py). How many
rows a tile keeps only its values tell: on a GPU the host waits for that number, once a tile, and a tile there is the whole
vocabulary of a block of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .kept import Part
from .tiles import ForwardSums, Rescale
from .vocab_shard import ranks

MOST_ROWS = 0.75  # of a tile: gathering more saves nothing
MOST_MERGED = 1 / 8  # of the probability of a block, on average over its tokens
NO_TAIL = 0.9  # of a tile's rows: then the next tiles will hardly have a tail, and are not looked at
MOST_SKIPPED = 4  # tiles


class Block(NamedTuple):
    """What is kept of a block of tokens."""

    parts: list[Part]  # one a tile
    rest: Tensor  # [tokens] the summed E of the rows that are in no part
    mean: Tensor  # [H] the mean row of their weight

    def add_rest(self, acc: Tensor) -> None:
        """acc [tokens, H]: E^T W of the parts, and now of all rows."""
        acc.addr_(self.rest, self.mean)

    def filled(self, tensors: Iterator[Tensor | None]) -> Block:
        """The same with other tensors, in the order of `tensors`."""
        parts = [part._replace(rows=next(tensors), e=next(tensors)) for part in self.parts]
        return Block(parts, next(tensors), next(tensors))

    def tensors(self) -> Iterator[Tensor | None]:
        for part in self.parts:
            yield from (part.rows, part.e)
        yield from (self.rest, self.mean)


@dataclass
class Tail:
    """How rows of the tail are recognised, and what is kept: walk.forward adds the blocks, walk.backward reads them."""

    threshold: float
    tokens: int  # that count; those after them only fill up
    tile: tuple[int, int]  # tokens and rows
    stored: torch.dtype  # of E where it is held
    most_held_bytes: int  # that E may take; what does not fit is formed again
    fuse_hidden_grad: bool = False  # nothing is left to the backward
    blocks: list[Block] = field(default_factory=list)
    scratch: Tensor | None = None  # of a tile, during the forward
    shares: TailShares = field(default_factory=lambda: TailShares())

    def close(self) -> None:
        """Once the forward is through."""
        self.scratch = None
        for shares in _open.get():
            shares.add(self.shares)

    def tensors(self) -> list[Tensor | None]:
        return [x for block in self.blocks for x in block.tensors()]

    def filled(self, tensors: Iterator[Tensor | None]) -> Tail:
        """The same with other tensors, in the order of `tensors`."""
        return replace(self, blocks=[block.filled(tensors) for block in self.blocks])


@dataclass
class TailShares:
    """Counts what calls with a `tail_threshold` found and kept while it is open. It never waits for a device.

    >>> from larpo_kernels import TailShares, linear_token_logps
    >>> hidden, weight = torch.randn(64, 512, requires_grad=True), torch.randn(8192, 512)
    >>> with TailShares() as shares:  # around any of the linear ops, or a whole step
    ...     logps = linear_token_logps(hidden, weight, torch.arange(64), tail_threshold=2**-12)
    >>> 0 < shares.rows < 0.2, shares.merged < 2**-4, shares.held_bytes  # a frozen head: nothing is left to the backward
    (True, True, 0)
    """

    tokens: int = 0  # tokens that counted, in forwards with a threshold whose gradient is needed
    held_bytes: int = 0  # bytes of E that these calls held for their backwards
    kept: int = 0  # rows of the vocabulary that gradients are formed of, summed over tokens
    seen: int = 0  # all rows of the vocabulary, summed over tokens
    probability: float = 0.0  # probability that was merged, summed over tokens

    @property
    def rows(self) -> float:
        """The share of the rows of the vocabulary that gradients were formed of, on average over tokens."""
        return self.kept / self.seen if self.seen else 1.0

    @property
    def merged(self) -> float:
        """The probability that was merged, on average over tokens: an upper bound, as a row is judged by the sum so far."""
        return self.probability / self.tokens if self.tokens else 0.0

    def add(self, other: TailShares) -> None:
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))

    def __enter__(self) -> TailShares:
        _open.set((*_open.get(), self))
        return self

    def __exit__(self, *_) -> None:
        _open.set(tuple(one for one in _open.get() if one is not self))


def all_rows_count(tokens: int, rows: int, held_bytes: int) -> None:
    """Counts a call that was walked without a tail, as its logits are flat (flat.py)."""
    for shares in _open.get():
        shares.add(TailShares(tokens, held_bytes, kept=tokens * rows, seen=tokens * rows))


_open: ContextVar[tuple[TailShares, ...]] = ContextVar("larpo_kernels.tail_shares", default=())


class TailBlock:
    """A block of tokens on its walk: where its tiles are formed, and what is kept of each."""

    def __init__(self, tail: Tail, tiles: ForwardSums, first: int):
        """first: position of its first token in the call."""
        self.tail, self.tiles = tail, tiles
        self.count = min(max(tail.tokens - first, 0), tiles.hidden.shape[0])  # tokens that count
        self.parts: list[Part] = []
        tokens, width = tiles.hidden.shape
        self.rest, self.row, self.given = (tiles.shift.new_zeros(size) for size in (tokens, width, ()))
        self.merged, self.most_merged = 0.0, MOST_MERGED * self.count / ranks(tiles.head.group)  # of all tokens together
        self.skip, self.skipped = 0, 0  # tiles not to look at, and how many that were last time

    def room(self, start: int, stop: int) -> Tensor:
        """Where a tile is formed, [rows, tokens]."""
        if self.tail.scratch is None:
            self.tail.scratch = self.tiles.hidden.new_empty(self.tail.tile[0] * self.tail.tile[1])
        tokens = self.tiles.hidden.shape[0]
        return self.tail.scratch[: (stop - start) * tokens].view(stop - start, tokens)

    def holds(self, stop: int) -> bool:
        """Whether a tile is for a gradient: here each is."""
        return True

    def keep(self, start: int, e: Tensor, weight: Tensor) -> Part:
        """Of a tile that was formed; its E is to be read before the next one is."""
        self.skip -= 1
        rows = None if self.skip >= 0 else self._choose(start, e, weight)
        tail, shares = self.tail, self.tail.shares
        stop, count = start + e.shape[0], e.shape[0] if rows is None else rows.shape[0]
        shares.kept += count * self.count
        shares.seen += e.shape[0] * self.count
        if tail.fuse_hidden_grad:
            return Part(start, stop, rows, e if rows is None else e.index_select(0, rows))
        part = Part(start, stop, rows, None)
        size = count * e.shape[1] * tail.stored.itemsize
        if shares.held_bytes + size <= tail.most_held_bytes:
            shares.held_bytes += size
            part = part._replace(e=self._to_hold(e, rows))
        if size:
            self.parts.append(part)
        return part

    def _to_hold(self, e: Tensor, rows: Tensor | None) -> Tensor:
        if rows is not None:
            return e.index_select(0, rows).to(self.tail.stored)
        if e.dtype != self.tail.stored:
            return e.to(self.tail.stored)
        self.tail.scratch = None  # it stays where it was formed
        return e

    def _choose(self, start: int, e: Tensor, weight: Tensor) -> Tensor | None:
        """The rows of a tile that are kept, after the others were merged; None: all are kept."""
        n = e.shape[0]
        largest, summed = self.tiles.shares(e, self.count)
        kept = torch.cat([largest > self.tail.threshold, largest.new_zeros(1, dtype=torch.bool)])
        at = self.tiles.labels - start
        kept[torch.where((at >= 0) & (at < n), at, n)] = True  # the last entry is for targets elsewhere
        kept = kept[:n]
        given = summed.masked_fill(kept, 0)
        count, merged = torch.stack([kept.sum(), given.sum()]).tolist()  # one wait for both
        self.skipped = min(2 * self.skipped + 1, MOST_SKIPPED) if count > NO_TAIL * n else 0
        self.skip = self.skipped
        if count > MOST_ROWS * n or not self.merged + merged <= self.most_merged:
            return None
        self.merged += merged
        self.rest += torch.mv(e.t(), (~kept).to(e.dtype))
        self.row += torch.mv(weight.t(), given.to(weight.dtype))
        self.given += given.sum()
        return _where(kept, int(count))

    def rescale(self, rescale: Rescale, stop: int) -> None:
        """What was kept of the rows up to `stop`: some tokens' shift has grown."""
        for part in self.parts:
            if part.e is not None:
                rescale.apply(part.e.t())
        rescale.apply(self.rest[:, None])

    def finish(self, at_target: Tensor) -> Block:
        """E at the targets, once it is known."""
        for part in self.parts:
            if part.e is not None:
                tiles, start = part.within(self.tiles)
                tiles.put_target(part.e, start, at_target)
        mean = self.row / self.given.clamp(min=torch.finfo(self.given.dtype).tiny)
        block = Block(self.parts, self.rest, mean)
        if not self.tail.fuse_hidden_grad:
            self.tail.blocks.append(block)
        self.tail.shares.tokens += self.count
        self.tail.shares.probability += self.merged
        return block


def _where(mask: Tensor, count: int) -> Tensor:
    """Positions of the `count` true entries of mask, rising: a nonzero() that need not ask a GPU how many there are."""
    if not mask.is_cuda:
        return mask.nonzero()[:, 0]
    positions = torch.arange(mask.shape[0], device=mask.device)
    found = positions.new_empty(count + 1)  # the last place takes those of the others
    return found.index_copy_(0, torch.where(mask, mask.cumsum(0) - 1, count), positions)[:count]

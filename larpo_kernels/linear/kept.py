"""What the walk keeps of a block of tokens for the backward: for each tile, E of all its rows, of some, or of none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from .tiles import BlockTiles, Rescale


class Part(NamedTuple):
    """What is kept of the tile of vocabulary rows start : stop."""

    start: int
    stop: int
    rows: Tensor | None  # [K] of the tile, rising, that count; None: all of them
    e: Tensor | None  # E of those rows, [K, tokens]; None: the backward forms it again

    def within(self, tiles: BlockTiles) -> tuple[BlockTiles, int]:
        """The tiles that these rows are one of, and where it starts."""
        return (tiles, self.start) if self.rows is None else (tiles.over(self.start + self.rows), 0)


class WholeBlock:
    """All rows count. E of the first of them stays where it was formed, that of the others is formed again."""

    def __init__(self, tiles: BlockTiles, held: Tensor, scratch: Tensor):
        """held [held_rows, tokens]; scratch: flat, of a tile in its own dtype, empty where all of E is held in that dtype."""
        self.tiles, self.held, self.scratch = tiles, held, scratch

    def room(self, start: int, stop: int) -> Tensor:
        """Where a tile is formed, [rows, tokens]."""
        if self.holds(stop) and self.held.dtype == self.scratch.dtype:
            return self.held[start:stop]
        tokens = self.held.shape[1]
        return self.scratch[: (stop - start) * tokens].view(stop - start, tokens)

    def holds(self, stop: int) -> bool:
        return stop <= self.held.shape[0]

    def keep(self, start: int, e: Tensor, weight: Tensor) -> Part:
        """Of a tile that was formed; its E is to be read before the next one is."""
        stop = start + e.shape[0]
        if self.holds(stop) and e.dtype != self.held.dtype:
            self.held[start:stop] = e
        return Part(start, stop, None, e)

    def rescale(self, rescale: Rescale, stop: int) -> None:
        """What was kept of the rows up to `stop`: some tokens' shift has grown."""
        rescale.apply(self.held[:stop].t())

    def finish(self, at_target: Tensor) -> None:
        """E at the targets, once it is known."""
        self.tiles.put_target(self.held, 0, at_target)


def whole_parts(held: Tensor, vocab_size: int, rows: int) -> Iterator[Part]:
    """The parts of a block all of whose rows count; held [held_rows, tokens]."""
    for a in range(0, vocab_size, rows):
        b = min(a + rows, vocab_size)
        yield Part(a, b, None, held[a:b] if b <= held.shape[0] else None)

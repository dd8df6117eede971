"""What a card allows, from its two rates alone: the figures of docs/performance.md.

python benchmarks/limits.py --bandwidth 4.3e12 --flops 790e12
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.reporting.tables import aligned

HALF, FULL = 2, 4  # bytes of a bfloat16 and a float32


@dataclass(frozen=True)
class Card:
    bandwidth: float  # bytes a second, reads and writes counted
    flops: float  # of a bfloat16 GEMM, a second


@dataclass(frozen=True)
class Head:
    tokens: int
    hidden: int
    vocabulary: int

    def gemm(self, card: Card) -> float:
        """Seconds of one of its products."""
        return 2 * self.tokens * self.hidden * self.vocabulary / card.flops

    def logits(self, card: Card, passes: int) -> float:
        """Seconds of reading or writing the logits so often: 1 forward, 2 backward."""
        return passes * HALF * self.tokens * self.vocabulary / card.bandwidth

    def exp_pass(self, card: Card) -> float:
        """E over the logits: one read, one write."""
        return self.logits(card, 2)

    def sum_hidden(self, card: Card, rows: int) -> float:
        """d hidden in float32: set to 0, read and written once a slice of the vocabulary, then scaled and rounded."""
        slices = -(-self.vocabulary // rows)
        return (FULL + 2 * FULL * slices + FULL + HALF) * self.tokens * self.hidden / card.bandwidth

    def sum_weight(self, card: Card, tokens: int) -> float:
        """d weight in float32: written by the first block of tokens, read and written by the others, then rounded.

        One block: its GEMM writes bfloat16, and nothing is added up.
        """
        blocks = -(-self.tokens // tokens)
        if blocks == 1:
            return 0.0
        return (FULL + 2 * FULL * (blocks - 1) + FULL + HALF) * self.vocabulary * self.hidden / card.bandwidth


def tile(head: Head, most_tokens: int, tile_bytes: int) -> tuple[int, int]:
    """Tokens and vocabulary rows of a tile of at most so many tokens and bytes."""
    tokens = min(head.tokens, most_tokens)
    return tokens, min(head.vocabulary, tile_bytes // (HALF * max(tokens, head.hidden)))


def rows(card: Card, heads: list[Head], most_tokens: tuple[int, ...], tile_bytes: int) -> list[list[str]]:
    """A line for each head and block of tokens: GEMM, and the rest as a share of the three GEMMs of list_hold."""
    lines = [["tokens", "tile", "one GEMM", "E over the logits", "d hidden summed", "d weight summed"]]
    for head in heads:
        shapes = dict.fromkeys(tile(head, most, tile_bytes) for most in most_tokens)
        three = 3 * head.gemm(card)
        for t, v in shapes:
            share = [head.exp_pass(card), head.sum_hidden(card, v), head.sum_weight(card, t)]
            lines.append(
                [str(head.tokens), f"{t} x {v}", f"{head.gemm(card) * 1e3:.2f} ms", *(f"{s / three:.1%}" for s in share)]
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bandwidth", type=float, default=4.3e12, help="bytes a second of a copy, reads and writes counted")
    parser.add_argument("--flops", type=float, default=790e12, help="of a bfloat16 GEMM, a second")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--tile-bytes", type=int, default=1 << 30)
    asked = parser.parse_args()
    card = Card(asked.bandwidth, asked.flops)
    heads = [Head(t, asked.hidden, asked.vocabulary) for t in (4096, 8192, 16384)]
    for head in heads:
        forward, backward = (head.logits(card, n) * 1e3 for n in (1, 2))
        print(f"from logits, {head.tokens} tokens: forward {forward:.2f} ms, backward {backward:.2f} ms")
    print()
    print(aligned(rows(card, heads, (4096, 8192, 16384), asked.tile_bytes)))


if __name__ == "__main__":
    main()

"""What studies of `tail_threshold` set inside the walk: how many tokens share rows, and that heads of any size have a tail."""

from __future__ import annotations

from contextlib import AbstractContextManager
from unittest.mock import patch

from larpo_kernels.linear import schedules, tile_shapes


def in_blocks_of(tokens: int) -> AbstractContextManager:
    """So many tokens share the rows that are kept, instead of as many as are fastest on a CPU."""
    return patch.object(tile_shapes, "TAIL_CPU_TOKENS", tile_shapes.walked_tokens(tokens))


def for_small_heads() -> AbstractContextManager:
    """A threshold acts on heads that are too small for it to save time."""
    return patch.object(schedules, "TAIL_HEAD", 0)

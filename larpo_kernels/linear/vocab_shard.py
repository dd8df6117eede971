"""A vocabulary cut over processes: which rows of the head a rank owns, and the sums over all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import validation

ELSEWHERE = -1  # local label of a token whose target another rank owns; it is no row of any tile
IGNORED = -100

_groups: dict[str, dist.ProcessGroup] = {}  # by name: an op's arguments cannot hold a group


@dataclass(frozen=True)
class VocabShard:
    """Rows start : start + rows of a vocabulary of `size`, owned by this rank of `group`; the other ranks own the rest.

    Make it once, with `of` or `even`; then the calls of the head need not agree on sizes again.
    """

    start: int
    rows: int
    size: int
    group: dist.ProcessGroup

    @classmethod
    def of(cls, rows: int, group: dist.ProcessGroup | None = None) -> VocabShard:
        """From the number of rows that each rank owns; ranks own consecutive rows, in rank order. Collective.

        Args:
            rows: of this rank, >= 1.
            group: the ranks that share the vocabulary; None for all processes.
        """
        group = process_group(group)
        counts: list[int] = [0] * dist.get_world_size(group)
        dist.all_gather_object(counts, rows, group=group)
        if min(counts) < 1:
            raise ValueError(f"every rank must own at least one row of the vocabulary, got {counts} rows")
        start = sum(counts[: dist.get_rank(group)])
        return cls(start, rows, sum(counts), group)

    @classmethod
    def even(cls, size: int, group: dist.ProcessGroup | None = None) -> VocabShard:
        """As torch.chunk and DTensor's Shard(0) split it: ceil(size / ranks) rows each, and fewer on the last ranks."""
        group = process_group(group)
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        chunk = -(-size // ranks)
        if chunk * (ranks - 1) >= size:
            raise ValueError(f"a vocabulary of {size} in chunks of {chunk} leaves the last of {ranks} ranks without a row")
        return cls(rank * chunk, min(chunk, size - rank * chunk), size, group)

    @property
    def name(self) -> str:
        """Of the group, for the arguments of an op."""
        _groups[self.group.group_name] = self.group
        return self.group.group_name

    def local_labels(self, labels: Tensor, ignore_index: int | None) -> Tensor:
        """Rows of this rank's weight; ELSEWHERE where another rank owns the target, IGNORED where not counted. int64."""
        local = labels.long() - self.start
        local = torch.where((local >= 0) & (local < self.rows), local, ELSEWHERE)
        return local if ignore_index is None else torch.where(labels == ignore_index, IGNORED, local)

    def nan_where_out_of_range(self, logps: Tensor, labels: Tensor, ignore_index: int | None) -> Tensor:
        """NaN for a label that no rank owns, and for its gradients. Where labels can be read, validation has refused it."""
        if validation.readable(labels):
            return logps
        wrong = validation.token_mask(labels, ignore_index) & ((labels < 0) | (labels >= self.size))
        return logps * torch.where(wrong, torch.nan, 1.0)


class Sharded(NamedTuple):
    """Logits or a head of which this rank has its own part of the vocabulary. `larpo_kernels.parallel` hands them to the public
    functions in place of a tensor."""

    values: Tensor
    shard: VocabShard

    @staticmethod
    def parts(x: Any) -> tuple[Any, VocabShard | None]:
        return x if isinstance(x, Sharded) else (x, None)


def process_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("torch.distributed must be initialised first: torch.distributed.init_process_group(...)")
    return dist.group.WORLD if group is None else group


def add_up(x: Tensor, name: str) -> Tensor:
    """x summed over the ranks of the named group, in place; no group (""): as it is."""
    if name:
        dist.all_reduce(x, group=_groups[name])
    return x


def ranks(name: str) -> int:
    """Of the named group; 1 for no group ("")."""
    return dist.get_world_size(_groups[name]) if name else 1


def largest(x: Tensor, name: str) -> Tensor:
    """The largest of each entry over the ranks, in place."""
    if name:
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=_groups[name])
    return x

"""Schedules: what the walk over hidden x weight (walk.py) keeps for the backward, what it costs, and which to take.

    score_only    nothing                                                              1 GEMM
    frozen_head   E^T W, summed up at once: the gradient of hidden up to c             2 GEMMs
    list_hold     E, in half precision where the operands are: backward is GEMMs only  3 GEMMs
    recompute     k and s; backward forms E again                                      4 GEMMs

E of some of the vocabulary may be held and the rest formed again: `auto` does so when the budget allows only a part.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from . import memory, tile_shapes
from .dtypes import stored_dtype
from .memory import Needs, Workload

SCHEDULES = ("auto", "score_only", "frozen_head", "list_hold", "recompute")
TAIL_HEAD = 1 << 22  # elements of a weight below which looking for its tail takes as long as it saves
TAIL_AMX_WIDTH = 1024  # see tail_width
FLAT_TOKENS = 512  # from so many on a few of them are looked at first (flat.py), which takes 1 % of their time
FEW_TOKENS = 16  # that are looked at; a multiple of 8, so that rows of their tile start aligned
FLOAT16_ON_A_GPU = "SLOW: float16 is multiplied in float32 on a GPU, without tensor cores; bfloat16 is many times faster"


@dataclass(frozen=True)
class Plan:
    """A schedule and what it costs. `print(plan(...))` shows it in one line."""

    schedule: str  # score_only, frozen_head, list_hold or recompute
    reason: str  # why this one
    gemms: float  # GEMMs of tokens x hidden x vocabulary, forward and backward together
    extra_bytes: int  # memory beyond the inputs, their gradients and one number per token
    held_rows: int = 0  # vocabulary rows whose E is held for the backward
    tail_threshold: float | None = None  # as asked for; the figures above are then the most that it can cost
    tail_tile: tuple[int, int] | None = None  # tokens and rows of a tile with tail_threshold
    note: str = ""  # something that the caller should know
    one_tile: bool = False  # all logits are formed at once (ops/small_linear.py) and held for the backward
    if_flat: Plan | None = field(default=None, repr=False)  # the plan that is taken where a few tokens show no tail (flat.py)

    def __str__(self) -> str:
        held = f", E of {self.held_rows} vocabulary rows held" if self.held_rows else ""
        text = f"{self.schedule}: {self.gemms:.2g} GEMMs, {self.extra_bytes / 2**20:.1f} MiB extra{held} ({self.reason})"
        text += f"; {self.note}" if self.note else ""
        if self.tail_threshold is None:
            return text
        return (
            f"{text}; all but the first GEMM, and what is held, only of the rows that some token of a block gives "
            f"more than {self.tail_threshold:.2g}" + ("; of all rows where logits are flat" if self.if_flat else "")
        )


class Request(NamedTuple):
    """What the caller asks for."""

    schedule: str = "auto"
    memory_budget: int | None = None
    tail_threshold: float | None = None

    def check(self, needs: Needs) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {SCHEDULES}, got {self.schedule!r}")
        budget = self.memory_budget
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 0):
            raise ValueError(f"memory_budget must be None or a number of bytes >= 0, got {budget!r}")
        if self.schedule == "score_only" and (needs.hidden or needs.parameters):
            raise ValueError(
                "schedule='score_only' keeps nothing for a backward, but a gradient is needed: detach, or use 'auto'"
            )
        if self.schedule == "frozen_head" and needs.parameters:
            raise ValueError("schedule='frozen_head' gives no gradient to weight or bias, but one requires grad: use 'auto'")


def make_plan(work: Workload, asked: Request) -> Plan:
    """Picks a schedule by what needs a gradient, sizes and budget; checks one that the caller picked.

    Ranks that share the vocabulary walk the same blocks of tokens, so their tiles do not depend on a rank's own rows.
    """
    plan = _make_plan(work, asked)
    if plan.tail_threshold is None or work.num_tokens < FLAT_TOKENS:
        return plan
    exact = _make_plan(work, asked._replace(tail_threshold=None))
    return replace(plan, extra_bytes=max(plan.extra_bytes, exact.extra_bytes, few_bytes(work)), if_flat=exact)


def few_bytes(work: Workload) -> int:
    """What looking at a few tokens holds: E of all rows, and each one's share in float32."""
    return FEW_TOKENS * work.vocab_size * (work.dtype.itemsize + 4 + 1)


def tail_width(work: Workload) -> int:
    """Of hidden states narrower than this no rows are merged: finding them would take longer than the GEMMs of a tile.

    In bfloat16 on a CPU with AMX (two cores of a Xeon, peaked logits, 512 tokens, V 49152): at a width of 576 a tail takes
    1.07 (list_hold) and 1.2 (frozen_head) times as long as none, at 1024 0.78 and 1.23, at 2048 0.71 and 0.94.
    """
    if work.device.type != "cpu" or work.dtype != torch.bfloat16:
        return 0
    return TAIL_AMX_WIDTH if work.needs.parameters else 2 * TAIL_AMX_WIDTH


def _make_plan(work: Workload, asked: Request) -> Plan:
    needs, gemms = work.needs, 1 + work.needs.hidden + work.needs.weight
    asked.check(needs)
    slow = work.device.type == "cuda" and torch.float16 in work.given and work.dtype == torch.float32
    plan = functools.partial(Plan, note=FLOAT16_ON_A_GPU if slow else "")
    large = (work.whole_vocab_size or work.vocab_size) * work.hidden_size >= TAIL_HEAD
    threshold = asked.tail_threshold if large and work.hidden_size >= tail_width(work) else None
    tiles = _tiles(work, threshold)
    tail = {} if threshold is None else {"tail_threshold": threshold, "tail_tile": tiles.usual}

    def working(tile: tuple[int, int]) -> int:
        return memory.working_bytes(work, tile) + (memory.tail_bytes(work, tile) if tail else 0)

    recomputing, holding = working(tiles.usual), working(tiles.held) + work.held_bytes
    if work.stored == work.dtype and not tail:
        holding -= math.prod(tiles.held) * work.dtype.itemsize  # tiles are formed where they stay
    if not (needs.hidden or needs.parameters):
        return plan("score_only", "nothing requires grad", 1, recomputing)
    if asked.schedule == "list_hold":
        return plan("list_hold", "asked for", gemms, holding, work.vocab_size, **tail)
    if asked.schedule == "recompute":
        return plan("recompute", "asked for", gemms + 1, recomputing, **tail)
    if not needs.parameters:
        fused = working(tiles.fused_grad) + 4 * work.num_tokens * work.hidden_size
        return plan("frozen_head", "only hidden requires grad", 2, fused, **tail)
    budget, source = asked.memory_budget, "memory_budget"
    if budget is None:
        budget, source = memory.free_bytes(work.device) // 2, "half of free memory"
    source = f"{source} = {budget / 2**20:.0f} MiB"
    if budget >= holding:
        return plan("list_hold", f"all E fits {source}", gemms, holding, work.vocab_size, **tail)
    of_row, (_, rows) = work.num_tokens * work.stored.itemsize, tiles.usual
    held_rows = min(max(budget - recomputing, 0) // max(of_row, 1), work.vocab_size - 1) // rows * rows
    reason = f"E would take {work.held_bytes / 2**20:.0f} MiB, {source}"
    gemms += 1 - held_rows / work.vocab_size
    return plan("recompute", reason, gemms, recomputing + held_rows * of_row, held_rows, **tail)


class _Tiles(NamedTuple):
    """(tokens, rows) of a tile by what becomes of it."""

    usual: tuple[int, int]
    fused_grad: tuple[int, int]  # d hidden is formed in the forward
    held: tuple[int, int]  # all E is held


def _tiles(work: Workload, tail_threshold: float | None) -> _Tiles:
    size = work.hidden_size, work.vocab_size, work.dtype, work.device
    if tail_threshold is not None:
        whole_vocab_size = work.whole_vocab_size or work.vocab_size
        tokens = tile_shapes.tail_tokens(work.num_tokens, whole_vocab_size, work.dtype, work.device)
        return _Tiles(*[tile_shapes.tile_shape(tokens, *size)] * 3)
    alone = work.whole_vocab_size is None
    shape = functools.partial(tile_shapes.tile_shape, work.num_tokens, *size, casts=work.given[1] != work.dtype)
    return _Tiles(shape(), shape(fuse_hidden_grad=alone), shape(in_place=alone and work.stored == work.dtype))


def one_tile_plan(hidden, weight, num_tokens: int, needs: Needs, compute: torch.dtype) -> Plan | None:
    """The plan of a call whose logits are one tile on a CPU: they are formed and held as they are. None if they are more, or
    bfloat16, which would round logits from which nothing was subtracted."""
    (h, v), size = (hidden.shape[-1], weight.shape[0]), compute.itemsize
    if compute == torch.bfloat16 or tile_shapes.tile_shape(num_tokens, h, v, compute, hidden.device) != (num_tokens, v):
        return None
    extra = 2 * num_tokens * v * size  # the logits, and E or their gradient
    extra += num_tokens * h * (size * int(hidden.dtype != compute) + hidden.dtype.itemsize)
    extra += v * h * size * int(weight.dtype != compute)
    if not (needs.hidden or needs.parameters):
        return Plan("score_only", "nothing requires grad", 1, extra, one_tile=True)
    if not needs.parameters:
        return Plan("frozen_head", "only hidden requires grad", 2, extra, one_tile=True)
    return Plan("list_hold", "all logits fit one tile", 1 + needs.hidden + needs.weight, extra, v, one_tile=True)


def plan_for(
    hidden,
    weight,
    bias,
    num_tokens: int,
    asked: Request,
    compute: torch.dtype,
    *,
    whole_vocab_size: int | None = None,
    one_tile: bool = False,
) -> Plan:
    """`make_plan` for the tensors of a call, num_tokens of which count, with tiles in the dtype `compute`.

    whole_vocab_size: where weight is one rank's rows. one_tile: nothing but their size stands against forming all logits.
    """
    needs = Needs(*_need_grad(hidden, weight, bias))
    if is_recorded(hidden):
        asked = asked._replace(tail_threshold=None)  # how many rows count is known to the device alone
        if asked.schedule == "auto":  # free memory and the number of tokens belong to a run, not to a graph
            schedule = "recompute" if needs.parameters else "frozen_head" if needs.hidden else "score_only"
            asked = asked._replace(schedule=schedule)
    small = asked.tail_threshold is None or weight.numel() < TAIL_HEAD
    if one_tile and small and asked.schedule == "auto" and asked.memory_budget is None:
        plan = one_tile_plan(hidden, weight, num_tokens, needs, compute)
        if plan is not None:
            return plan
    tokens, given = tile_shapes.walked_tokens(num_tokens), (hidden.dtype, weight.dtype)
    stored = stored_dtype(compute, hidden.dtype)
    size = hidden.shape[-1], weight.shape[0]
    return make_plan(Workload(tokens, *size, needs, given, compute, stored, hidden.device, whole_vocab_size), asked)


def _need_grad(*tensors: torch.Tensor | None) -> tuple[bool, ...]:
    enabled = torch.is_grad_enabled()
    return tuple(enabled and x is not None and x.requires_grad for x in tensors)


def is_recorded(x: torch.Tensor) -> bool:
    """Whether what runs is recorded, to be played on other values: torch.compile, or a CUDA graph that is captured."""
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())

"""What the machine could do at best: the GEMMs of a schedule and nothing else, or moving the same bytes.

A CPU without native bfloat16 multiplies faster in float32: both are measured, the faster one is the floor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.core.problem import IGNORE, Problem
from benchmarks.providers.registry import Output, provider
from larpo_kernels.linear.tile_shapes import tile_shape


def _scored_only(dtype: torch.dtype | None) -> Callable[[Problem], Problem]:
    """The scored tokens as one candidate, operands in `dtype` (None: as they are)."""

    def prepare(problem: Problem) -> Problem:
        keep = problem.labels != IGNORE
        hidden, weight = problem.hidden[keep][None], problem.weight
        if dtype is not None:
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        return replace(problem, labels=problem.labels[keep][None], hidden=hidden, weight=weight)

    return prepare


def products(hidden: Tensor, weight: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The products of the head, each as one GEMM."""
    tile = weight.new_empty(len(weight), len(hidden)).normal_()
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)
    return {
        "logits": lambda: torch.mm(weight, hidden.t(), out=tile),
        "d hidden": lambda: torch.mm(tile.t(), weight, out=d_hidden),
        "d weight": lambda: torch.mm(tile, hidden, out=d_weight),
    }


def _tiled(logits_products: int, d_hidden: bool, d_weight: bool, **use: bool):
    """The products on the tiles of the schedule that has as many; use: what `tile_shape` knows of that schedule."""

    def forward(problem: Problem) -> Output:
        h, w = problem.hidden[0].detach(), problem.weight.detach()  # [N, H], [V, H]
        of_hidden, of_weight = torch.zeros_like(h), torch.empty_like(w)
        tokens, rows = tile_shape(*h.shape, len(w), h.dtype, h.device, casts=h.dtype != w.dtype, **use)
        scratch = h.new_empty(min(rows, len(w)), min(tokens, len(h)))
        for t in range(0, len(h), tokens):
            block = h[t : t + tokens]
            for a in range(0, len(w), rows):
                slab = w[a : a + rows]
                tile = scratch[: len(slab), : len(block)]
                for _ in range(logits_products):
                    torch.mm(slab, block.T, out=tile)
                if d_hidden:
                    of_hidden[t : t + tokens].addmm_(tile.T, slab)
                if d_weight:
                    torch.addmm(of_weight[a : a + rows], tile, block, beta=int(t > 0), out=of_weight[a : a + rows])
        return Output(None)

    return forward


FLOORS = {  # (mode, GEMMs): on the tiles of score_only, frozen_head, recompute with a frozen head, list_hold, recompute
    ("score", 1): _tiled(1, False, False),
    ("frozen", 2): _tiled(1, True, False, fuse_hidden_grad=True),
    ("frozen", 3): _tiled(2, True, False),
    ("trainable", 3): _tiled(1, True, True, in_place=True),
    ("trainable", 4): _tiled(2, True, True),
}
for (_mode, _count), _run in FLOORS.items():
    _options = {"modes": (_mode,), "gemms": {_mode: _count}, "floor": True}
    provider(f"{_count} GEMMs only", "linear", prepare=_scored_only(None), **_options)(_run)
    provider(
        f"{_count} GEMMs only, float32",
        "linear",
        prepare=_scored_only(torch.float32),
        devices=("cpu",),
        dtypes=(torch.bfloat16, torch.float16),
        **_options,
    )(_run)


@provider("moving the same bytes", "logits", floor=True, overwrites_input=True)
def copy(problem: Problem) -> Output:
    """As many bytes as one read of the logits (score) or two reads and one write (train)."""
    rows = problem.rows.detach()
    half = len(rows) // 2
    for _ in range({"score": 1, "train": 3}[problem.mode]):
        rows[:half].copy_(rows[half : 2 * half])
    return Output(None)

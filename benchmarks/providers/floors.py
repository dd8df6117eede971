"""What the machine could do at best: the GEMMs of a schedule and nothing else, or moving the same bytes.

A CPU without native bfloat16 multiplies faster in float32: both are measured, the faster one is the floor.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.core.problem import IGNORE, Problem
from benchmarks.providers.registry import Output, provider
from larpo_kernels.linear.schedules import tile_shape


def _scored_only(dtype):
    """The scored tokens as one candidate, operands in `dtype` (None: as they are)."""

    def prepare(problem: Problem) -> Problem:
        keep = problem.labels != IGNORE
        cast = lambda x: x.to(dtype or x.dtype)  # noqa: E731
        return replace(
            problem,
            labels=problem.labels[keep][None],
            hidden=cast(problem.hidden[keep])[None],
            weight=cast(problem.weight),
        )

    return prepare


def _gemms(count: int, with_weight: bool):
    """1: logits. 2: and d hidden. 3: and d weight, or the logits again. 4: all of them. On our own tiles."""
    logits_products = count - 1 - with_weight if count > 1 else 1

    def forward(problem: Problem) -> Output:
        hidden, weight = problem.hidden[0].detach(), problem.weight.detach()  # [N, H], [V, H]
        d_hidden = torch.zeros_like(hidden)
        d_weight = torch.empty_like(weight) if with_weight else None
        tokens, rows = tile_shape(*hidden.shape, len(weight), hidden.dtype, hidden.device)
        scratch = hidden.new_empty(min(rows, len(weight)), min(tokens, len(hidden)))
        for t in range(0, len(hidden), tokens):
            h, d_h = hidden[t : t + tokens], d_hidden[t : t + tokens]
            for a in range(0, len(weight), rows):
                w = weight[a : a + rows]
                tile = scratch[: len(w), : len(h)]
                for _ in range(logits_products):
                    torch.mm(w, h.T, out=tile)
                if count > 1:
                    d_h.addmm_(tile.T, w)
                if d_weight is not None:
                    torch.addmm(d_weight[a : a + rows], tile, h, beta=int(t > 0), out=d_weight[a : a + rows])
        return Output(None)

    return forward


for _mode, _counts in {"score": (1,), "frozen": (2, 3), "trainable": (3, 4)}.items():
    for _count in _counts:
        _run = _gemms(_count, _mode == "trainable")
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
def copy(problem):
    """As many bytes as one read of the logits (score) or two reads and one write (train)."""
    rows = problem.rows.detach()
    half = len(rows) // 2
    for _ in range({"score": 1, "train": 3}[problem.mode]):
        rows[:half].copy_(rows[half : 2 * half])
    return Output(None)

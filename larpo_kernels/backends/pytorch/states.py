"""Passes over hidden states [n, H] in plain PyTorch, some rows at a time where float32 copies are needed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..arguments import TargetTerm

STEP = 256  # rows at a time where something needs a float32 copy: small enough to stay in the cache


def target_dots(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, sums: torch.dtype) -> Tensor:
    """h_t . W[y_t] + bias[y_t], [n], multiplied and added in the dtype `sums`; anything where a label is negative."""
    out = torch.empty(labels.shape[0], dtype=sums, device=hidden.device)
    for at in slices(out.shape[0], out.device):
        out[at] = (hidden[at].to(sums) * weight[labels[at]].to(hidden.dtype).to(sums)).sum(1)
    return out if bias is None else out.add_(bias[labels])


def scale_rows(x: Tensor, factor: Tensor, out: Tensor, targets: TargetTerm | None = None) -> None:
    """out = factor [n] * (x [n, H] + targets), rounded once; out may be x."""
    sums = factor.dtype
    value = None if targets is None else targets.value.masked_fill(targets.labels < 0, 0)
    for at in slices(x.shape[0], x.device):
        rows = x[at].to(sums)
        if targets is not None:
            rows = torch.addcmul(rows, targets.weight[targets.labels[at]].to(sums), value[at, None])
        torch.mul(rows, factor[at, None], out=out[at])


def slices(n: int, device: torch.device) -> Iterator[slice]:
    step = STEP if device.type == "cpu" else 16 * STEP
    for a in range(0, n, step):
        yield slice(a, min(a + step, n))

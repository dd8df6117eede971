"""Rows of given logits: token log-probs in one read, their gradient in one read and one write.

With k the target's logit, E = exp(z - k) without the target and s = sum E:

    l = -log1p(s)          d l / dz = -exp(z - k + l), 1 - exp(l) at the target

so one exp per element, no maximum, and the backward needs nothing but l. Where s gets large, the target being far below
others, the row is redone with the ordinary formulas: s may overflow, and z - k + l loses all digits where k is a mask's -1e9.
Rows pass through a small float32 scratch, a few at a time: no copy of the logits exists.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# With one thread 1 to 32 MB took the same time. With two on busy cores every parallel region waits for a thread that is
# not running: few large regions (16 MB) were faster than many small ones.
SCRATCH_BYTES = 16 << 20
MOST, FAR = 1e36, -64.0  # of s and l; backends/triton/kernels/rows.py has the same


def token_logps(
    logits: Tensor, labels: Tensor, ignore_index: int, logit_scale: float, softcap: float | None, stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows = _Rows(logits, labels, ignore_index, logit_scale, softcap)
    logps = torch.zeros(labels.shape, dtype=rows.dtype, device=logits.device)
    entropy = torch.zeros_like(logps) if stats else logps.new_empty(0)
    top1 = torch.zeros_like(entropy)
    for at, x, y, n in rows:
        x.sub_(x.gather(1, y))
        if stats:
            e, h, hit = _stats(x)
            entropy[at], top1[at] = h[:n], hit[:n]
        else:
            e = x.exp_()
        s = e.scatter_(1, y, 0).sum(1)[:n]
        rare = ~(s < MOST)
        logps[at] = -s.log1p_()
        if rare.any():
            z = rows.read(at)[:n][rare]
            logps[at][rare] = z.log_softmax(-1).gather(1, y[:n][rare])[:, 0]
            if stats:
                entropy[at][rare] = torch.special.entr(z.softmax(-1)).sum(1)
    return logps, entropy, top1


def _stats(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x = z - k [rows, V] -> exp(x), the entropy of softmax(x), whether no x is above the target's 0."""
    e = x.exp()
    total = e.sum(1)  # below MOST, times an x still finite
    mean = torch.where(e > 0, x, 0).mul_(e).sum(1) / total
    return e, total.log() - mean, (x.amax(1) <= 0).to(x.dtype)


def token_logps_backward(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    logps: Tensor,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    out: Tensor,
    whole: bool = True,
) -> None:
    """Writes d logits to `out` [S, T, V], which may be the logits themselves. Ignored rows are zeroed without a read.

    whole: the logits are of the whole vocabulary, so a row's own sum may take the place of what l says of it.
    """
    rows = _Rows(logits, labels, ignore_index, logit_scale, softcap)
    out[labels == ignore_index] = 0
    for at, x, y, n in rows:
        l, c = logps[at][:, None], grad[at][:, None].to(rows.dtype)
        x, y = x[:n], y[:n]
        slope = None if softcap is None else (x / softcap).square_().neg_().add_(1)
        far = l[:, 0] < FAR if whole else torch.zeros_like(l[:, 0], dtype=torch.bool)
        redone = x[far].softmax(-1) if far.any() else None
        x.sub_(x.gather(1, y)).add_(l).exp_()
        if redone is not None:
            x[far] = redone
        x.mul_(-c)
        x.scatter_(1, y, -c * l.expm1())
        if slope is not None:
            x.mul_(slope)
        if logit_scale != 1:
            x.mul_(logit_scale)
        lost = l[:, 0] == -torch.inf  # a target at -inf: no direction would help
        if lost.any():
            x[lost] = 0
        out[at] = x


class _Rows:
    """Blocks of rows that count, as z in a float scratch: yields (index, z [rows, V], labels [rows, 1], rows)."""

    def __init__(self, logits, labels, ignore_index, logit_scale, softcap):
        self.logits, self.labels, self.ignore_index = logits, labels, ignore_index
        self.scale, self.softcap = logit_scale, softcap
        self.dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        fits = SCRATCH_BYTES // (logits.shape[-1] * self.dtype.itemsize)
        self.block = max(2, min(fits, labels.shape[-1]))
        self.scratch = torch.zeros(self.block, logits.shape[-1], dtype=self.dtype, device=logits.device)

    def __iter__(self) -> Iterator[tuple[tuple[int, slice], Tensor, Tensor, int]]:
        for at in self._blocks():
            n = at[1].stop - at[1].start
            rows = max(n, 2)  # one row alone is summed in another order: a candidate would feel its neighbours
            y = self.labels.new_zeros(rows, 1, dtype=torch.int64)
            y[:n, 0] = self.labels[at]
            self.read(at)
            yield at, self.scratch[:rows], y, n

    def read(self, at: tuple[int, slice]) -> Tensor:
        n = at[1].stop - at[1].start
        x = self.scratch[:n].copy_(self.logits[at])
        if self.scale != 1:
            x.mul_(self.scale)
        if self.softcap is not None:
            x.div_(self.softcap).tanh_().mul_(self.softcap)
        return x

    def _blocks(self) -> Iterator[tuple[int, slice]]:
        """Runs of counted tokens within a sequence, cut to the block size."""
        counted = (self.labels != self.ignore_index).to(torch.int8)
        edges = torch.nn.functional.pad(counted, (1, 1)).diff(dim=1).nonzero().tolist()
        for (s, start), (_, stop) in zip(edges[::2], edges[1::2], strict=True):
            for a in range(start, stop, self.block):
                yield s, slice(a, min(a + self.block, stop))

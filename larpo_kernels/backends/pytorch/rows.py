"""Rows of given logits: token log-probs in one read, their gradient in one read and one write.

With k the target's logit, E = exp(z - k) without the target and s = sum E:

    l = -log1p(s)          d l / dz = -exp(z - k + l), 1 - exp(l) at the target

so one exp per element, no maximum, and the backward needs nothing but l. Where s gets large, the target being far below
others, the row is redone with the ordinary formulas: s may overflow, and z - k + l loses all digits where k is a mask's -1e9.
Rows that count pass through a small float32 scratch, a block at a time, wherever they lie: no copy of the logits exists,
and the time follows the tokens that count, not how many runs a mask cuts them into.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

# With one thread 1 to 32 MB took the same time. With two on busy cores every parallel region waits for a thread that is
# not running: few large regions (16 MB) were faster than many small ones.
SCRATCH_BYTES = 16 << 20
SMALL_SCRATCH_BYTES = 2 << 20  # several short sequences share a block up to this size
# Rows below this are gathered by one call, which needs a block of them once more; of larger ones every run is copied by a
# call of its own, which then costs little beside its bytes.
GATHERED_ROW_BYTES = 16 << 10
MOST, FAR = 1e36, -64.0  # of s and l; backends/triton/kernels/rows.py has the same


def token_logps(
    logits: Tensor, labels: Tensor, ignore_index: int, logit_scale: float, softcap: float | None, stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows = _Rows(logits, labels, ignore_index, logit_scale, softcap)
    logps = torch.zeros(labels.numel(), dtype=rows.dtype, device=logits.device)
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
        l = -s.log1p_()
        if rare.any():
            z = rows.read(at)[rare]
            l[rare] = z.log_softmax(-1).gather(1, y[:n][rare])[:, 0]
            if stats:
                h[:n][rare] = torch.special.entr(z.softmax(-1)).sum(1)
                entropy[at] = h[:n]
        logps[at] = l
    shape = labels.shape
    for x in (logps, entropy, top1) if stats else (logps,):
        x.masked_fill_(rows.wrong, torch.nan)
    return logps.view(shape), *((entropy.view(shape), top1.view(shape)) if stats else (entropy, top1))


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
    _zero_ignored(labels, ignore_index, out)
    logps, grad = logps.reshape(-1), grad.reshape(-1)
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
        _write(x, at, out)


At = slice | Tensor  # positions on the flat axis of tokens [S * T]: a run, or an index in ascending order


class _Rows:
    """Blocks of rows that count, as z in a float scratch: yields (positions, z [rows, V], labels [rows, 1], rows)."""

    def __init__(self, logits, labels, ignore_index, logit_scale, softcap):
        self.logits, self.scale, self.softcap = logits, logit_scale, softcap
        self.labels = labels.reshape(-1)
        counted = self.labels != ignore_index
        self.counted = counted.nonzero()[:, 0]
        self.wrong = counted & (self.labels != self.labels.clamp(0, logits.shape[-1] - 1))  # a label that names no column
        self.dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        row_bytes = logits.shape[-1] * self.dtype.itemsize
        fits, few = SCRATCH_BYTES // row_bytes, SMALL_SCRATCH_BYTES // row_bytes
        self.block = max(2, min(fits, max(few, labels.shape[1]), self.counted.shape[0]))
        self.scratch = torch.zeros(self.block, logits.shape[-1], dtype=self.dtype, device=logits.device)

    def __iter__(self) -> Iterator[tuple[At, Tensor, Tensor, int]]:
        for index in self.counted.split(self.block):
            n = index.shape[0]
            if n == 0:
                return
            first, last = int(index[0]), int(index[-1])
            at = slice(first, last + 1) if last - first == n - 1 else index
            rows = max(n, 2)  # one row alone is summed in another order: a candidate would feel its neighbours
            y = self.labels.new_zeros(rows, 1, dtype=torch.int64)
            y[:n, 0] = self.labels[at]
            self.read(at)
            yield at, self.scratch[:rows], y.clamp_(0, self.logits.shape[-1] - 1), n

    def read(self, at: At) -> Tensor:
        """z of these rows, in the scratch: [n, V]."""
        n = 0
        for values in _parts(self.logits, at):
            self.scratch[n : n + values.shape[0]].copy_(values)
            n += values.shape[0]
        x = self.scratch[:n]
        if self.scale != 1:
            x.mul_(self.scale)
        if self.softcap is not None:
            x.div_(self.softcap).tanh_().mul_(self.softcap)
        return x


def _parts(values: Tensor, at: At) -> Iterator[Tensor]:
    """Rows of values [S, T, V], in order: small rows that do not follow each other by one call, of others views of runs."""
    values, length = _flat(values)
    if _are_gathered(values, at):
        yield values[0].index_select(0, at) if len(values) == 1 else values[_places(at, length)]
    else:
        yield from (values[s, run] for s, run in _runs(at, length))


def _write(x: Tensor, at: At, out: Tensor) -> None:
    """x [n, V] to these rows of out [S, T, V]."""
    out, length = _flat(out)
    if not _are_gathered(out, at):
        runs = _runs(at, length)
        for (s, run), rows in zip(runs, x.split([run.stop - run.start for _, run in runs]), strict=True):
            out[s, run] = rows
    elif len(out) == 1:
        out[0].index_copy_(0, at, x.to(out.dtype))
    else:
        out[_places(at, length)] = x.to(out.dtype)


def _zero_ignored(labels: Tensor, ignore_index: int, out: Tensor) -> None:
    ignored = labels == ignore_index
    out, _ = _flat(out)
    if len(out) == 1:  # less than half the time of a mask
        out[0].index_fill_(0, ignored.reshape(-1).nonzero()[:, 0], 0)
    else:
        out[ignored] = 0


def _flat(values: Tensor) -> tuple[Tensor, int]:
    """values [S, T, V] as [1, S * T, V] where strides allow, a view; and the length of a sequence then."""
    if values.shape[1] == 1 or values.stride(0) == values.shape[1] * values.stride(1):
        values = values.view(1, -1, values.shape[2])
    return values, values.shape[1]


def _are_gathered(values: Tensor, at: At) -> bool:
    one_run = isinstance(at, slice) and len(values) == 1
    return values.shape[2] * values.element_size() < GATHERED_ROW_BYTES and not one_run


def _places(at: At, length: int) -> tuple[Tensor, Tensor]:
    """(sequence, token in it) of each position."""
    at = torch.arange(at.start, at.stop) if isinstance(at, slice) else at
    return at // length, at % length


def _runs(at: At, length: int) -> list[tuple[int, slice]]:
    """(sequence, tokens in it) of the runs of tokens that follow each other within a sequence of this length."""
    if isinstance(at, slice):
        starts = [at.start, *range((at.start // length + 1) * length, at.stop, length)]
        runs = pairwise([*starts, at.stop])
    else:
        breaks = (at.diff() != 1) | (at[1:] % length == 0)
        ends = torch.nn.functional.pad(breaks.nonzero()[:, 0] + 1, (1, 0)).tolist()
        index = at.tolist()
        runs = ((index[i], index[j - 1] + 1) for i, j in pairwise([*ends, len(index)]))
    return [(a // length, slice(a % length, a % length + b - a)) for a, b in runs]

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
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    stats: bool,
    *,
    keep: Tensor | None = None,
    checked: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    rows = _Rows(logits, labels, ignore_index, logit_scale, softcap, keep, checked)
    scratch = rows.scratch()
    out = None
    for at, y, n in rows:
        found = _forward(rows, at, y, scratch, stats)
        if n == labels.numel() and n > 1:
            out = found
            break
        if out is None:
            out = [x.new_zeros(labels.numel()) for x in found]
        for x, part in zip(out, found, strict=True):
            x[at] = part[:n]
    if out is None:
        out = [scratch.new_zeros(labels.numel()) for _ in range(3 if stats else 1)]
    if rows.wrong is not None:
        out = [x.masked_fill_(rows.wrong, torch.nan) for x in out]
    out = [x.view(labels.shape) for x in out]
    return tuple(out) if stats else (*out, None, None)


def _forward(rows: _Rows, at: At, y: Tensor, scratch: Tensor, stats: bool) -> list[Tensor]:
    """logps, with stats entropy and top1 of the rows that stand there; of one row alone twice."""
    z = rows.read(at, scratch)
    if z.shape[0] == 1:  # one row alone is summed in another order: a candidate would feel its neighbours
        z, y = z.repeat(2, 1), y.repeat(2, 1)
    x = torch.sub(z, z.gather(1, y), out=_first(scratch, z.shape[0]))
    if stats:
        e, entropy, top1 = _stats(x)
    else:
        e = x.exp_()
    s = e.scatter_(1, y, 0).sum(1)
    rare = None if float(s.amax()) < MOST else ~(s < MOST)
    l = s.log1p_().neg_()
    if rare is not None:
        z = rows.read(at, scratch).expand(s.shape[0], -1)[rare]
        l[rare] = z.log_softmax(-1).gather(1, y[rare])[:, 0]
        if stats:
            entropy[rare] = torch.special.entr(z.softmax(-1)).sum(1)
    return [l, entropy, top1] if stats else [l]


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
    *,
    keep: Tensor | None = None,
    checked: bool = False,
    whole: bool = True,
) -> None:
    """Writes d logits to `out`, which may be the logits themselves. Ignored rows are zeroed without a read.

    whole: the logits are of the whole vocabulary, so a row's own sum may take the place of what l says of it.
    """
    rows = _Rows(logits, labels, ignore_index, logit_scale, softcap, keep, checked)
    if rows.keep is not None:
        _zero_ignored(labels, ignore_index, out)
    if not rows.count:
        return
    l, minus_c = logps.reshape(-1, 1), grad.neg().to(rows.dtype).reshape(-1, 1)
    target = minus_c * l.expm1()
    some_are_far = not float(l.amin()) >= FAR
    flat, scratch = _flat(out), None
    for at, y, _ in rows:
        own = flat is not None and out.dtype == rows.dtype and isinstance(at, slice)
        if not own and scratch is None:
            scratch = rows.scratch()
        x = _part(flat, at) if own else scratch
        z = rows.read(at, x)
        x = _first(x, z.shape[0])
        l_, minus_c_ = _part(l, at), _part(minus_c, at)
        slope = None if softcap is None else (z / softcap).square_().neg_().add_(1)
        far = l_[:, 0] < FAR if some_are_far and whole else None
        redone = None if far is None else z[far].softmax(-1)
        torch.sub(z, z.gather(1, y), out=x).add_(l_).exp_()
        if redone is not None:
            x[far] = redone
        x.mul_(minus_c_).scatter_(1, y, _part(target, at))
        if slope is not None:
            x.mul_(slope)
        if logit_scale != 1:
            x.mul_(logit_scale)
        if some_are_far:
            x.masked_fill_(l_ == -torch.inf, 0)  # a target at -inf: no direction would help
        if not own:
            _write(x, at, out)


At = slice | Tensor  # positions on the flat axis of tokens: a run, or an index in ascending order


class _Rows:
    """The rows that count, in blocks of z in a float scratch: (positions, labels [n, 1], n)."""

    def __init__(self, logits, labels, ignore_index, logit_scale, softcap, keep, checked):
        self.logits, self.scale, self.softcap = logits, logit_scale, softcap
        self.flat = _flat(logits)
        self.dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        self.wrong = None
        if not checked:
            counted = (labels != ignore_index).reshape(-1)
            keep = counted.nonzero().view(-1)
            safe = labels.clamp(0, logits.shape[-1] - 1)
            self.wrong = counted & (labels != safe).reshape(-1)  # a label that names no column
            labels = safe
        self.labels = labels.long().reshape(-1, 1)
        self.keep = keep
        self.count = self.labels.shape[0] if keep is None else keep.shape[0]
        row_bytes = logits.shape[-1] * self.dtype.itemsize
        fits, few = SCRATCH_BYTES // row_bytes, SMALL_SCRATCH_BYTES // row_bytes
        self.block = max(2, min(fits, max(few, labels.shape[-1]), self.count))

    def scratch(self) -> Tensor:
        return torch.empty(self.block, self.logits.shape[-1], dtype=self.dtype, device=self.logits.device)

    def __iter__(self) -> Iterator[tuple[At, Tensor, int]]:
        for a in range(0, self.count, self.block):
            b = min(a + self.block, self.count)
            at = slice(a, b) if self.keep is None else _as_run(self.keep[a:b])
            yield at, _part(self.labels, at), b - a

    def read(self, at: At, scratch: Tensor) -> Tensor:
        """z of these rows [n, V]: in the scratch, or where they lie if they are z as they stand."""
        as_it_stands = self.scale == 1 and self.softcap is None and self.logits.dtype == self.dtype
        if as_it_stands and self.flat is not None and isinstance(at, slice):
            return _part(self.flat, at)
        n = 0
        for values in _parts(self.logits, at):
            scratch[n : n + values.shape[0]].copy_(values)
            n += values.shape[0]
        x = scratch[:n]
        if self.scale != 1:
            x.mul_(self.scale)
        if self.softcap is not None:
            x.div_(self.softcap).tanh_().mul_(self.softcap)
        return x


def _as_run(index: Tensor) -> At:
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first == index.shape[0] - 1 else index


def _first(x: Tensor, n: int) -> Tensor:
    return x if x.shape[0] == n else x[:n]


def _part(x: Tensor, at: At) -> Tensor:
    """x[at]; a small call feels what it takes to ask for all of x."""
    whole = isinstance(at, slice) and at.stop - at.start == x.shape[0]
    return x if whole else x[at]


def _flat(values: Tensor) -> Tensor | None:
    """values [S, T, V] or [N, V] as [N, V], a view where strides allow."""
    if values.dim() == 2:
        return values
    s, t, v = values.shape
    return values.view(-1, v) if s == 1 or t == 1 or values.stride(0) == t * values.stride(1) else None


def _parts(values: Tensor, at: At) -> Iterator[Tensor]:
    """Rows of values, in order: small rows that do not follow each other by one call, of others views of runs."""
    flat, length = _flat(values), values.shape[-2]
    if _are_gathered(values, flat, at):
        yield flat.index_select(0, at) if flat is not None else values[_places(at, length)]
    elif flat is not None:
        yield from (flat[run] for _, run in _runs(at, flat.shape[0]))
    else:
        yield from (values[s, run] for s, run in _runs(at, length))


def _write(x: Tensor, at: At, out: Tensor) -> None:
    """x [n, V] to these rows of out."""
    flat, length = _flat(out), out.shape[-2]
    if not _are_gathered(out, flat, at):
        runs = _runs(at, length if flat is None else flat.shape[0])
        for (s, run), rows in zip(runs, x.split([run.stop - run.start for _, run in runs]), strict=True):
            (out[s] if flat is None else flat)[run] = rows
    elif flat is not None:
        flat.index_copy_(0, at, x.to(out.dtype))
    else:
        out[_places(at, length)] = x.to(out.dtype)


def _zero_ignored(labels: Tensor, ignore_index: int, out: Tensor) -> None:
    ignored = labels == ignore_index
    flat = _flat(out)
    if flat is not None:  # less than half the time of a mask
        flat.index_fill_(0, ignored.reshape(-1).nonzero().view(-1), 0)
    else:
        out[ignored] = 0


def _are_gathered(values: Tensor, flat: Tensor | None, at: At) -> bool:
    one_run = isinstance(at, slice) and flat is not None
    return values.shape[-1] * values.element_size() < GATHERED_ROW_BYTES and not one_run


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

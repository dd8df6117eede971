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

from ... import validation
from ..arguments import LogitRows

# With one thread 1 to 32 MB took the same time. With two on busy cores every parallel region waits for a thread that is
# not running: few large regions (16 MB) were faster than many small ones.
SCRATCH_BYTES = 16 << 20
SMALL_SCRATCH_BYTES = 2 << 20  # several short sequences share a block up to this size
# Rows below this are gathered by one call, which needs a block of them once more; of larger ones every run is copied by a
# call of its own, which then costs little beside its bytes.
GATHERED_ROW_BYTES = 16 << 10
LARGEST_SUM = 1e36  # of s: beyond, a row is redone; backends/triton/kernels/rows.py has the same
UNLIKELY_LOGP = -64.0  # below, a gradient is formed from the largest logit; the same there


def token_logps(given: LogitRows, stats: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    rows, labels = _Rows(given), given.labels
    out = None
    for at, y in rows:
        found = _forward(rows, at, y, stats)
        if at is ALL:
            out = found
            break
        out = out or [x.new_zeros(labels.numel()) for x in found]
        for x, part in zip(out, found, strict=True):
            x[at] = part
    else:
        out = out or [torch.zeros(labels.numel(), dtype=rows.dtype, device=labels.device) for _ in range(3 if stats else 1)]
        out = [x.view(labels.shape) for x in out]
    if rows.wrong is not None:
        out = [x.masked_fill_(rows.wrong, torch.nan) for x in out]
    return tuple(out) if stats else (*out, None, None)


def _forward(rows: _Rows, at: At, y: Tensor, stats: bool) -> list[Tensor]:
    """logps, with stats entropy and top1 of these rows."""
    z = rows.read(at)
    alone = y.numel() == 1
    if alone:  # one row alone is summed in another order: results would depend on the batch
        z, y = (x.expand(2, *x.shape).clone() for x in (z, y))
    k = z.gather(-1, y)
    x = torch.sub(z, k, out=z if alone else rows.scratch(at))
    if stats:
        e, entropy, top1 = _stats(x)
    else:
        e = x.exp_()
    s = e.scatter_(-1, y, 0).sum(-1).add_(k.squeeze(-1), alpha=0)  # NaN where k is infinite, and not an accidental number
    rare = None if s.amax().item() < LARGEST_SUM else ~(s < LARGEST_SUM)
    l = s.log1p_().neg_()
    if rare is not None:
        z = rows.read(at).expand(*rare.shape, -1)[rare]
        l[rare] = z.log_softmax(-1).gather(-1, y[rare])[:, 0]
        if stats:
            entropy[rare] = torch.special.entr(z.softmax(-1)).sum(-1)
    out = [l, entropy, top1] if stats else [l]
    return [x[0] for x in out] if alone else out


def _stats(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x = z - k [..., V] -> exp(x), the entropy of softmax(x), whether no x is above the target's 0."""
    e = x.exp()
    total = e.sum(-1)  # below LARGEST_SUM, times an x still finite
    mean = torch.where(e > 0, x, 0).mul_(e).sum(-1) / total
    return e, total.log() - mean, (x.amax(-1) <= 0).to(x.dtype)


def token_logps_backward(given: LogitRows, grad: Tensor, logps: Tensor, out: Tensor, *, whole: bool = True) -> None:
    """Writes d logits to `out`, which may be the logits themselves. Ignored rows are zeroed without a read.

    whole: the logits are of the whole vocabulary, so that softmax of a row can be formed without its log-prob.
    """
    rows, softcap = _Rows(given), given.softcap
    if rows.token_indices is not None:
        _zero_ignored(given.labels, given.ignore_index, out)
    if not rows.count:
        return
    l, minus_c = rows.per_token(logps), rows.per_token(grad.neg())
    target = l.expm1() * minus_c
    far_ones = not l.amin().item() >= UNLIKELY_LOGP
    own = None if out.dtype != rows.dtype else out if rows.at_once else _flat(out)
    for at, y in rows:
        in_place = own is not None and not isinstance(at, Tensor)
        x = _part(own, at) if in_place else rows.scratch(at)
        z = rows.read(at, into=x)
        l_, minus_c_ = _part(l, at), _part(minus_c, at)
        slope = None if softcap is None else (z / softcap).square_().neg_().add_(1)
        far = l_[..., 0] < UNLIKELY_LOGP if far_ones and whole else None
        redone = None if far is None else z[far].softmax(-1)
        torch.sub(z, z.gather(-1, y), out=x).add_(l_).exp_()
        if redone is not None:
            x[far] = redone
        x.mul_(minus_c_).scatter_(-1, y, _part(target, at))
        if slope is not None:
            x.mul_(slope)
        if given.logit_scale != 1:
            x.mul_(given.logit_scale)
        if far_ones:
            x.masked_fill_(l_ == -torch.inf, 0)  # a target at -inf: no direction would help
        if not in_place:
            _write(x, at, out)


ALL = None
At = slice | Tensor | None  # positions on the flat axis of tokens: a run, an index in ascending order; or ALL tokens, in shape


class _Rows:
    """The rows that count, in blocks: positions, labels [n, 1]. All of a small call at once, in the shape they come in."""

    def __init__(self, given: LogitRows):
        logits, labels, token_indices, checked, ignore_index, logit_scale, softcap = given
        self.logits, self.scale, self.softcap = logits, logit_scale, softcap
        self.dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        self.wrong = None
        if not checked:
            token_mask = validation.token_mask(labels, ignore_index)
            token_indices = token_mask.reshape(-1).nonzero().view(-1)
            safe = labels.clamp(0, logits.shape[-1] - 1)
            self.wrong = token_mask & (labels != safe)  # a label that names no column
            labels = safe
        self.token_indices = token_indices
        self.count = labels.numel() if token_indices is None else token_indices.shape[0]
        row_bytes = logits.shape[-1] * self.dtype.itemsize
        fits, few = SCRATCH_BYTES // row_bytes, SMALL_SCRATCH_BYTES // row_bytes
        self.block = max(1, min(fits, max(few, labels.shape[-1]), self.count))
        self.at_once = token_indices is None and 0 < self.count == self.block
        self.labels = self.per_token(labels if labels.dtype == torch.int64 else labels.long())
        self.in_place = None  # the logits, if they need no change to be z
        if logit_scale == 1 and softcap is None and logits.dtype == self.dtype:
            self.in_place = logits if self.at_once else _flat(logits)
        self._scratch = None

    def per_token(self, x: Tensor) -> Tensor:
        """x of the labels' shape as it is cut into blocks, with an axis for the vocabulary."""
        return x.unsqueeze(-1) if self.at_once else x.reshape(-1, 1)

    def scratch(self, at: At) -> Tensor:
        """Room for z of these rows."""
        if self._scratch is None:
            shape = self.logits.shape if at is ALL else (self.block, self.logits.shape[-1])
            self._scratch = torch.empty(shape, dtype=self.dtype, device=self.logits.device)
        return self._scratch if at is ALL else self._scratch[: _count(at)]

    def __iter__(self) -> Iterator[tuple[At, Tensor]]:
        if self.at_once:
            yield ALL, self.labels
            return
        for a in range(0, self.count, self.block):
            b = min(a + self.block, self.count)
            at = slice(a, b) if self.token_indices is None else _as_run(self.token_indices[a:b])
            yield at, self.labels[at]

    def read(self, at: At, into: Tensor | None = None) -> Tensor:
        """z of these rows: a view of the logits if they need no change, else in `into` or in the scratch."""
        if self.in_place is not None and not isinstance(at, Tensor):
            return _part(self.in_place, at)
        x = self.scratch(at) if into is None else into
        if at is ALL:
            x.copy_(self.logits)
        else:
            n = 0
            for values in _parts(self.logits, at):
                x[n : n + values.shape[0]] = values
                n += values.shape[0]
        if self.scale != 1:
            x.mul_(self.scale)
        if self.softcap is not None:
            x.div_(self.softcap).tanh_().mul_(self.softcap)
        return x


def _count(at: slice | Tensor) -> int:
    return at.stop - at.start if isinstance(at, slice) else at.shape[0]


def _as_run(index: Tensor) -> At:
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first == index.shape[0] - 1 else index


def _part(x: Tensor, at: At) -> Tensor:
    return x if at is ALL else x[at]


def _flat(values: Tensor) -> Tensor | None:
    """values [S, T, V] or [N, V] as [N, V], a view where strides allow."""
    if values.dim() == 2:
        return values
    s, t, v = values.shape
    return values.view(-1, v) if s == 1 or t == 1 or values.stride(0) == t * values.stride(1) else None


def _parts(values: Tensor, at: slice | Tensor) -> Iterator[Tensor]:
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
    if at is ALL:
        out.copy_(x)
        return
    flat, length = _flat(out), out.shape[-2]
    if not _are_gathered(out, flat, at):
        runs = _runs(at, length if flat is None else flat.shape[0])
        for (s, run), rows in zip(runs, x.split([run.stop - run.start for _, run in runs]), strict=True):
            (out[s] if flat is None else flat)[run] = rows
    elif flat is not None:
        flat.index_copy_(0, at, x.to(out.dtype))
    else:
        out[_places(at, length)] = x.to(out.dtype)


def _zero_ignored(labels: Tensor, ignore_index: int | None, out: Tensor) -> None:
    ignored = ~validation.token_mask(labels, ignore_index)
    flat = _flat(out)
    if flat is not None:  # less than half the time of a mask
        flat.index_fill_(0, ignored.reshape(-1).nonzero().view(-1), 0)
    else:
        out[ignored] = 0


def _are_gathered(values: Tensor, flat: Tensor | None, at: slice | Tensor) -> bool:
    one_run = isinstance(at, slice) and flat is not None
    return values.shape[-1] * values.element_size() < GATHERED_ROW_BYTES and not one_run


def _places(at: slice | Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(sequence, token in it) of each position."""
    at = torch.arange(at.start, at.stop) if isinstance(at, slice) else at
    return at // length, at % length


def _runs(at: slice | Tensor, length: int) -> list[tuple[int, slice]]:
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

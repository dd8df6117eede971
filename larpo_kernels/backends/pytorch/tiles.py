"""Tiles of a head's logits in plain PyTorch: vocabulary-major, shifted by the target, turned into E in place."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ...linear.tiles import BlockTiles, ForwardSums, Sums, exact_in_tiles
from ...linear.vocab_shard import add_up
from .states import slices, target_dots

LARGEST_TILE_SUM = 1e30  # s stays below it, so that E^T W and E (r h) stay finite too
GROUPS = 16  # partial column sums of a bfloat16 tile, so that rounding each of them to bfloat16 does not matter


@dataclass
class Rescale:
    """Some tokens got a larger shift: what was summed relative to the old one is multiplied by exp(old - new)."""

    tokens: Tensor
    factor: Tensor

    def apply(self, x: Tensor) -> None:
        """x [tokens, ...], in place."""
        if x.numel():
            x[self.tokens] = (x[self.tokens] * self.factor[:, None]).to(x.dtype)


class Tiles(BlockTiles):
    target_dots = staticmethod(target_dots)

    def form_again(self, a: int, weight: Tensor, out: Tensor, at_target: Tensor) -> None:
        """E of vocabulary rows a.. for the backward, with at_target [tokens] at the targets."""
        self._e(a, weight, out, for_grad=True, stats=False)
        self.put_target(out, a, at_target)

    def put_target(self, e: Tensor, a: int, at_target: Tensor) -> None:
        """Writes at_target [tokens] at the targets that lie in rows a.. of e."""
        rows, columns = self._targets.within(a, a + e.shape[0])
        e[rows, columns] = at_target[columns].to(e.dtype)

    def over(self, rows: Tensor) -> Tiles:
        return Tiles(*self.arguments_over(rows))

    def _e(self, a: int, weight: Tensor, out: Tensor, for_grad: bool, stats: bool) -> Sums:
        """E of vocabulary rows a.. into out, target left out; -> its sums.

        for_grad: E times the slope of the soft cap, as the gradient needs it; the sums are of E alone.
        """
        late = self._logits(a, weight, out)
        rows, columns = self._targets.within(a, a + out.shape[0])
        if self.head.softcap is None and late is None and not stats:
            out.exp_()[rows, columns] = 0
            return Sums(_column_sums(out), None, None)
        s, sx, above = torch.zeros_like(self.shift), torch.zeros_like(self.shift), torch.full_like(self.shift, -torch.inf)
        for at in slices(out.shape[0], out.device):
            x, slope = self._less_shift(out[at], None if late is None else late[at])
            here = (rows >= at.start) & (rows < at.stop)
            x[rows[here] - at.start, columns[here]] = -torch.inf
            e = x.exp()
            s += e.sum(0)
            if stats:
                above = torch.maximum(above, x.amax(0))
                sx += torch.where(e > 0, x, 0).mul_(e).sum(0)
            out[at] = e.mul_(slope) if slope is not None and for_grad else e
        return Sums(s, sx if stats else None, above if stats else None)

    def _less_shift(self, rows: Tensor, late: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x = z - k in float32 from what `_logits` left of some rows, and the slope of the soft cap there, if there is one."""
        x, softcap = rows.to(self.head.sums), self.head.softcap
        x = x if late is None else x.add_(late)
        if softcap is None:
            return x, None
        t = x.div(softcap).tanh_()
        x = t.mul(softcap).sub_(self.shift)
        return x, t.square_().neg_().add_(1)

    def _logits(self, a: int, weight: Tensor, out: Tensor) -> Tensor | None:
        """z - k of vocabulary rows a.. ; with a soft cap what goes into it, not shifted.

        A bfloat16 tile would be rounded again by each step after the GEMM: its bias is returned, [rows, 1] in float32.
        """
        head, hidden, k = self.head, self.hidden.t(), self.shift
        bias = None if head.bias is None else head.bias[a : a + out.shape[0], None].to(head.sums) * head.scale
        if out.dtype == torch.bfloat16:
            minus = None if head.softcap is not None else k.neg().to(head.dtype)
            torch.addmm(out if minus is None else minus, weight, hidden, beta=int(minus is not None), alpha=head.scale, out=out)
            return bias
        torch.mm(weight, hidden, out=out)
        if head.scale != 1:
            out *= head.scale
        if bias is not None:
            out += bias
        if head.softcap is None:
            out -= k
        return None

    @functools.cached_property
    def _targets(self) -> _Targets:
        return _Targets(self.labels)


class ForwardTiles(ForwardSums, Tiles):
    def form(self, a: int, weight: Tensor, out: Tensor, for_grad: bool) -> Rescale | None:
        """E of vocabulary rows a.. into out [rows, tokens], target left out, and into the sums; for_grad as in `_e`."""
        new = self._e(a, weight, out, for_grad, self.stats)
        rescale = None
        if not bool((self.sums.e + new.e < LARGEST_TILE_SUM).all()):
            rescale, new = self._retry_with_larger_shift(a, weight, out, for_grad, new)
        s = self.sums
        above = torch.maximum(s.above, new.above) if self.stats else None
        self.sums = Sums(s.e + new.e, s.ex + new.ex if self.stats else None, above)
        return rescale

    def _retry_with_larger_shift(self, a, weight, out, for_grad, new: Sums) -> tuple[Rescale, Sums]:
        """Forms the tile again, with the largest logit as the shift of the tokens whose sum grew too large.

        All tokens, though few need it: a GEMM of another shape would round the others otherwise than the backward will.
        """
        s = self.sums
        high = ~(s.e + new.e < LARGEST_TILE_SUM)
        late = self._logits(a, weight, out)
        top = out.amax(0).to(self.head.sums) if late is None else _largest_sum(out, late)
        if self.head.softcap is not None:
            top = top.div_(self.head.softcap).tanh_().mul_(self.head.softcap).sub_(self.shift)
        old = self.shift
        self.shift = exact_in_tiles(self.head, torch.where(high, old + top.clamp_(min=0), old))
        new = self._e(a, weight, out, for_grad, self.stats)
        up = self.shift - old
        factor = up.neg().exp()
        self.sums = Sums(s.e * factor, (s.ex - up * s.e) * factor if self.stats else None, s.above - up if self.stats else None)
        tokens = high.nonzero()[:, 0]
        return Rescale(tokens, factor[tokens]), new

    def merge_ranks(self) -> Rescale | None:
        """The sums over all ranks' vocabularies, relative to the largest k among them; what is held here is to be rescaled."""
        factor = self.take_largest_shift_of_ranks()
        self.sums = Sums(add_up(self.sums.e * factor, self.head.group), None, None)
        tokens = (factor < 1).nonzero()[:, 0]
        return Rescale(tokens, factor[tokens]) if tokens.numel() else None

    def row_shares(self, e: Tensor, per_e: Tensor) -> tuple[Tensor, Tensor]:
        """The largest and the sum of each row of e * per_e; per_e [tokens]."""
        largest, summed = per_e.new_empty(e.shape[0]), per_e.new_empty(e.shape[0])
        scratch = None
        for at in slices(e.shape[0], e.device):
            scratch = torch.empty_like(e[at], dtype=per_e.dtype) if scratch is None else scratch[: at.stop - at.start]
            p = torch.mul(e[at], per_e, out=scratch)
            torch.amax(p, 1, out=largest[at])
            torch.sum(p, 1, out=summed[at])
        return largest, summed


class _Targets:
    """Where the labels of some tokens lie in the vocabulary: which of them a tile holds, without looking at all."""

    def __init__(self, labels: Tensor):
        self.labels, self.order = labels.sort(stable=True)

    def within(self, a: int, b: int) -> tuple[Tensor, Tensor]:
        """Rows (counted from a) and columns of the targets in vocabulary rows a:b."""
        ends = torch.tensor([a, b], dtype=self.labels.dtype, device=self.labels.device)
        first, last = torch.searchsorted(self.labels, ends).tolist()
        return self.labels[first:last] - a, self.order[first:last]


def _column_sums(e: Tensor) -> Tensor:
    """Sums over rows in float32: by a small GEMM in bfloat16, whose own sum over rows is 40 times slower."""
    if e.dtype != torch.bfloat16:
        return e.sum(0)
    n = e.shape[0]
    groups = torch.eye(GROUPS, dtype=e.dtype, device=e.device).repeat_interleave(-(-n // GROUPS), 1)[:, :n]
    return (groups @ e).float().sum(0)


def _largest_sum(x: Tensor, y: Tensor) -> Tensor:
    """Column maxima of x [rows, n] + y [rows, 1] in the dtype of y, a few rows at a time."""
    return torch.stack([(x[at] + y[at]).amax(0) for at in slices(x.shape[0], x.device)]).amax(0)

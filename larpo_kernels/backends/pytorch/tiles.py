"""Tiles of a head's logits in plain PyTorch: vocabulary-major, centred on the target, turned into E in place."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...linear.schedules import seen_step
from ...linear.vocab_shard import ELSEWHERE, add_up, largest
from .states import slices, target_dots

ROOM = 1e30  # s stays below it, so that E^T W and E (r h) stay finite too
GROUPS = 16  # partial column sums of a bfloat16 tile, so that rounding each of them to bfloat16 does not matter


class Sums(NamedTuple):
    """Sums over vocabulary rows, one number per token; x = z - k, the target left out."""

    e: Tensor  # of exp(x)
    ex: Tensor | None  # of x exp(x), with stats
    above: Tensor | None  # the largest x, with stats


@dataclass
class Raised:
    """Some tokens got a larger k: what was summed relative to the old one is scaled by exp(old - new)."""

    tokens: Tensor
    factor: Tensor

    def rescale(self, x: Tensor) -> None:
        """x [tokens, ...], in place."""
        if x.numel():
            x[self.tokens] = (x[self.tokens] * self.factor[:, None]).to(x.dtype)


class Tiles:
    """The tiles of one block of tokens, formed one after the other; sums over the vocabulary add up inside."""

    target_dots = staticmethod(target_dots)

    def __init__(self, head, hidden: Tensor, labels: Tensor, *, centre=None, level=None, stats=False):
        self.head, self.hidden, self.labels, self.stats = head, hidden, labels, stats
        if centre is not None:
            self.centre, self.level = centre, level
            return
        self.target = self._target_logits()
        self.centre = self._exact(self._centre())
        self.level = torch.zeros_like(self.centre)  # what k is above the centre; here the centre itself is raised
        zero = torch.zeros_like(self.target)
        self.sums = Sums(zero, torch.zeros_like(zero), torch.full_like(zero, -torch.inf)) if stats else Sums(zero, None, None)

    def _centre(self) -> Tensor:
        """The target's logit, as long as that is not -inf.

        A bfloat16 tile is rounded once it is centred, by the more the further a logit lies from the centre. So there some
        rows of the vocabulary are looked at first, and where one of them is above the target it becomes the centre.
        """
        k = torch.where(self.target.isfinite(), self.target, 0)
        return torch.maximum(k, self._seen()) if self.head.dtype == torch.bfloat16 and self.head.softcap is None else k

    def _seen(self) -> Tensor:
        """The largest logit of each token among some rows of the vocabulary, without a soft cap."""
        head, step = self.head, seen_step(self.head.weight.shape[0])
        z = torch.mm(head.weight[::step].to(head.dtype), self.hidden.t())
        if head.bias is not None:
            z += head.bias[::step, None]
        return z.mul_(head.scale).amax(0).to(head.sums)

    def _exact(self, k: Tensor) -> Tensor:
        """k as the GEMM can subtract it: exact in the dtype of the tile."""
        return k.to(self.head.dtype).to(self.head.sums)

    def _target_logits(self) -> Tensor:
        """z[t, y_t], by a dot in float32."""
        head = self.head
        z = self.target_dots(self.hidden, head.weight, head.bias, self.labels, head.sums)
        if head.group:
            z = add_up(z.masked_fill_(self.labels < 0, 0), head.group)  # of its owner, exactly
        if head.scale != 1:
            z *= head.scale
        return z if head.softcap is None else z.div_(head.softcap).tanh_().mul_(head.softcap)

    def form(self, a: int, weight: Tensor, out: Tensor, for_grad: bool) -> Raised | None:
        """E of vocabulary rows a.. into out [rows, tokens], target left out, and into the sums.

        for_grad: E times the slope of the soft cap, as the gradient wants it; the sums are of E alone.
        """
        new = self._e(a, weight, out, for_grad, self.stats)
        raised = None
        if not bool((self.sums.e + new.e < ROOM).all()):
            raised, new = self._raise(a, weight, out, for_grad, new)
        s = self.sums
        above = torch.maximum(s.above, new.above) if self.stats else None
        self.sums = Sums(s.e + new.e, s.ex + new.ex if self.stats else None, above)
        return raised

    def form_again(self, a: int, weight: Tensor, out: Tensor, at_target: Tensor) -> None:
        """E of vocabulary rows a.. for the backward, with at_target [tokens] at the targets."""
        self._e(a, weight, out, True, False)
        self.put_target(out, a, at_target)

    def _e(self, a, weight, out, for_grad, stats) -> Sums:
        softcap, centre = self.head.softcap, self.centre
        late = self._logits(a, weight, out)
        rows, columns = self._targets.within(a, a + out.shape[0])
        if softcap is None and late is None and not stats:
            out.exp_()[rows, columns] = 0
            return Sums(_column_sums(out), None, None)
        s, sx, above = torch.zeros_like(centre), torch.zeros_like(centre), torch.full_like(centre, -torch.inf)
        for at in slices(out.shape[0], out.device):
            x, slope = out[at].to(self.head.sums), None
            x = x if late is None else x.add_(late[at])
            if softcap is not None:
                t = x.div(softcap).tanh_()
                x = t.mul(softcap).sub_(centre)
                slope = t.square_().neg_().add_(1)
            here = (rows >= at.start) & (rows < at.stop)
            x[rows[here] - at.start, columns[here]] = -torch.inf
            e = x.exp()
            s += e.sum(0)
            if stats:
                above = torch.maximum(above, x.amax(0))
                sx += torch.where(e > 0, x, 0).mul_(e).sum(0)
            out[at] = e.mul_(slope) if slope is not None and for_grad else e
        return Sums(s, sx if stats else None, above if stats else None)

    def _logits(self, a: int, weight: Tensor, out: Tensor) -> Tensor | None:
        """z - centre of vocabulary rows a.. ; with a soft cap what goes into it, not centred.

        A bfloat16 tile would be rounded again by each step after the GEMM: its bias is returned, [rows, 1] in float32.
        """
        head, hidden, centre = self.head, self.hidden.t(), self.centre
        bias = None if head.bias is None else head.bias[a : a + out.shape[0], None].to(head.sums) * head.scale
        if out.dtype == torch.bfloat16:
            minus = None if head.softcap is not None else centre.neg().to(head.dtype)
            torch.addmm(out if minus is None else minus, weight, hidden, beta=int(minus is not None), alpha=head.scale, out=out)
            return bias
        torch.mm(weight, hidden, out=out)
        if head.scale != 1:
            out *= head.scale
        if bias is not None:
            out += bias
        if head.softcap is None:
            out -= centre
        return None

    def _raise(self, a, weight, out, for_grad, new) -> tuple[Raised, Sums]:
        """Redoes the tile with k at the largest logit where a sum grew too large.

        All columns, though few need it: a GEMM of another shape would round the others otherwise than the backward will.
        """
        s = self.sums
        high = ~(s.e + new.e < ROOM)
        late = self._logits(a, weight, out)
        top = out.amax(0).to(self.head.sums) if late is None else _largest_sum(out, late)
        if self.head.softcap is not None:
            top = top.div_(self.head.softcap).tanh_().mul_(self.head.softcap).sub_(self.centre)
        old, self.centre = self.centre, self._exact(torch.where(high, self.centre + top.clamp_(min=0), self.centre))
        new = self._e(a, weight, out, for_grad, self.stats)
        up = self.centre - old
        factor = up.neg().exp()
        self.sums = Sums(s.e * factor, (s.ex - up * s.e) * factor if self.stats else None, s.above - up if self.stats else None)
        tokens = high.nonzero()[:, 0]
        return Raised(tokens, factor[tokens]), new

    def merge_ranks(self) -> Raised | None:
        """The sums over all ranks' vocabularies, relative to the largest k among them; what is held here is to be rescaled."""
        factor = self._common_centre()
        self.sums = Sums(add_up(self.sums.e * factor, self.head.group), None, None)
        tokens = (factor < 1).nonzero()[:, 0]
        return Raised(tokens, factor[tokens]) if tokens.numel() else None

    def _common_centre(self) -> Tensor:
        """Raises k to the largest of all ranks; returns exp(old - new) of each token."""
        old = self.centre, self.level
        self.centre, self.level = largest(torch.stack(old), self.head.group)
        return ((old[0] - self.centre) + (old[1] - self.level)).exp()

    def finish(self) -> dict[str, Tensor]:
        """Results per token once every tile was formed, by their names in walk.Kept."""
        s, offset = self.sums, self.target - self.centre - self.level  # about 0; far below it where k was raised
        at_target = offset.exp()
        total = at_target + s.e
        logps = -torch.log1p(s.e / at_target)
        logps = torch.where(logps.isfinite(), logps, offset - total.log())
        out = {"logps": logps, "total": total, "centre": self.centre, "level": self.level}
        if self.stats:
            mean = (s.ex + torch.where(at_target > 0, offset, 0) * at_target) / total
            above = s.above <= self.target - self.centre
            out |= {"entropy": total.log() - mean, "top1": above.to(total.dtype)}
        return out

    def at_target(self, logps: Tensor, total: Tensor) -> Tensor:
        """-s times the slope of the soft cap: what E holds at the target for the gradient."""
        value = total * logps.expm1()
        return value if self.head.softcap is None else value * self._slope()

    def _slope(self) -> Tensor:
        """Derivative of the soft cap at each target."""
        target = self.target if hasattr(self, "target") else self._target_logits()
        return 1 - (target / self.head.softcap).square()

    def put_target(self, e: Tensor, a: int, at_target: Tensor) -> None:
        """Writes at_target [tokens] at the targets that lie in rows a.. of e."""
        rows, columns = self._targets.within(a, a + e.shape[0])
        e[rows, columns] = at_target[columns].to(e.dtype)

    # ---- what a tail is chosen by (linear/tail.py)

    def shares(self, e: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Of each row of E [rows, tokens] the largest and the summed probability over the first `count` tokens, relative to
        the sums so far; where ranks share the vocabulary those of their first tiles count too."""
        at_target = (self.target - self.centre - self.level).exp()
        per_e = 1 / (self.sums.e + self._first_sums_of_others * at_target + at_target)
        per_e[count:] = 0
        return self._row_shares(e, per_e)

    @functools.cached_property
    def _first_sums_of_others(self) -> Tensor | float:
        """Relative to exp(target), which all ranks know; too large a number is as good as a larger one."""
        if not self.head.group:
            return 0.0
        own = (self.sums.e.double() * (self.centre + self.level - self.target).double().exp()).clamp(max=1e30)
        return (add_up(own.clone(), self.head.group) - own).clamp(min=0).to(self.sums.e.dtype)

    def _row_shares(self, e: Tensor, per_e: Tensor) -> tuple[Tensor, Tensor]:
        largest, summed = per_e.new_empty(e.shape[0]), per_e.new_empty(e.shape[0])
        room = None
        for at in slices(e.shape[0], e.device):
            room = torch.empty_like(e[at], dtype=per_e.dtype) if room is None else room[: at.stop - at.start]
            p = torch.mul(e[at], per_e, out=room)
            torch.amax(p, 1, out=largest[at])
            torch.sum(p, 1, out=summed[at])
        return largest, summed

    def over(self, rows: Tensor) -> Tiles:
        """The same tokens over these vocabulary rows alone, rising: a tile of them starts at 0."""
        at = torch.searchsorted(rows, self.labels).clamp_(max=rows.shape[0] - 1)
        labels = torch.where(rows[at] == self.labels, at, ELSEWHERE)
        head = self.head if self.head.bias is None else replace(self.head, bias=self.head.bias[rows])
        return type(self)(head, self.hidden, labels, centre=self.centre, level=self.level)

    @functools.cached_property
    def _targets(self) -> _Targets:
        return _Targets(self.labels)


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

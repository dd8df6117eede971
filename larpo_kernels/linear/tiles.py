"""A block of tokens against the vocabulary, tile by tile: what all backends share.

A backend derives two classes from those here. `Tiles` forms E of some vocabulary rows for given shifts, which is all that a
backward asks for. `ForwardTiles` finds the shifts, adds every tile it forms to sums over the vocabulary, and turns these sums
into results. A shift is what is subtracted from a token's logits: the k of walk.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import tile_shapes
from .vocab_shard import ELSEWHERE, add_up, largest


class TokenResults(NamedTuple):
    """What a forward returns of each token."""

    logps: Tensor  # [n]
    entropy: Tensor | None  # [n], with stats
    top1: Tensor | None  # [n], with stats


class Sums(NamedTuple):
    """Sums over vocabulary rows, one number per token; x = z - k, the target left out."""

    e: Tensor  # of exp(x)
    ex: Tensor | None  # of x exp(x), with stats
    above: Tensor | None  # the largest x, with stats


class Rescale(Protocol):
    """Some tokens got a larger shift: what was formed with the old one is to be multiplied by exp(old - new)."""

    def apply(self, x: Tensor) -> None:
        """x [tokens, ...], in place."""


class BlockTiles:
    """The tiles of one block of tokens whose shifts are known. A backend adds `form_again`, `put_target` and `over`."""

    target_dots: Callable  # of the backend (its states.py)

    def __init__(self, head, hidden: Tensor, labels: Tensor, shift: Tensor, shift_correction: Tensor):
        """shift [tokens]: subtracted by the GEMM; shift_correction [tokens]: subtracted on top, 0 but for rare tokens."""
        self.head, self.hidden, self.labels = head, hidden, labels
        self.shift, self.shift_correction = shift, shift_correction

    @functools.cached_property
    def target(self) -> Tensor:
        """z[t, y_t], by a dot in float32."""
        return target_logits(self.target_dots, self.head, self.hidden, self.labels)

    def at_target(self, logps: Tensor, total: Tensor) -> Tensor:
        """-s times the slope of the soft cap: what E holds at the target for the gradient."""
        value, softcap = total * logps.expm1(), self.head.softcap
        return value if softcap is None else value * (1 - (self.target / softcap).square())

    def arguments_over(self, rows: Tensor) -> tuple:
        """Of tiles of the same tokens over these vocabulary rows alone, rising: a tile of them starts at 0."""
        at = torch.searchsorted(rows, self.labels).clamp_(max=rows.shape[0] - 1)
        labels = torch.where(rows[at] == self.labels, at, ELSEWHERE)
        head = self.head if self.head.bias is None else replace(self.head, bias=self.head.bias[rows])
        return head, self.hidden, labels, self.shift, self.shift_correction


def target_logits(target_dots: Callable, head, hidden: Tensor, labels: Tensor) -> Tensor:
    z = target_dots(hidden, head.weight, head.bias, labels, head.sums)
    if head.group:
        z = add_up(z.masked_fill_(labels < 0, 0), head.group)  # exact: only the owner of a target adds anything
    if head.scale != 1:
        z *= head.scale
    return z if head.softcap is None else z.div_(head.softcap).tanh_().mul_(head.softcap)


def first_shift(head, hidden: Tensor, target: Tensor) -> Tensor:
    """The target's logit, as long as that is not -inf.

    A bfloat16 tile is rounded after its shift was subtracted, by the more the further a logit lies from the shift. So there
    some rows of the vocabulary are looked at first, and where one of them is above the target it becomes the shift.
    """
    k = torch.where(target.isfinite(), target, 0)
    if head.dtype == torch.bfloat16 and head.softcap is None:
        return torch.maximum(k, largest_seen(head, hidden))
    return k


def largest_seen(head, hidden: Tensor) -> Tensor:
    """The largest logit of each token among some rows of the vocabulary, without a soft cap."""
    step = tile_shapes.seen_step(head.weight.shape[0])
    z = torch.mm(head.weight[::step].to(head.dtype), hidden.t())
    if head.bias is not None:
        z += head.bias[::step, None]
    return z.mul_(head.scale).amax(0).to(head.sums)


def exact_in_tiles(head, k: Tensor) -> Tensor:
    """k as the GEMM can subtract it: exact in the dtype of the tile."""
    return k.to(head.dtype).to(head.sums)


class ForwardSums:
    """What a forward does beyond `Tiles`, to be inherited beside them. A backend adds `form`, `merge_ranks`, `row_shares`."""

    first_shift = staticmethod(first_shift)

    def __init__(self, head, hidden: Tensor, labels: Tensor, *, stats: bool = False):
        target = target_logits(self.target_dots, head, hidden, labels)
        shift = exact_in_tiles(head, self.first_shift(head, hidden, target))
        super().__init__(head, hidden, labels, shift, torch.zeros_like(shift))
        self.target, self.stats = target, stats
        zero = torch.zeros_like(target)
        self.sums = Sums(zero, torch.zeros_like(zero), torch.full_like(zero, -torch.inf)) if stats else Sums(zero, None, None)

    def take_largest_shift_of_ranks(self) -> Tensor:
        """Returns exp(old shift - new shift) of each token."""
        old = self.shift, self.shift_correction
        self.shift, self.shift_correction = largest(torch.stack(old), self.head.group)
        return ((old[0] - self.shift) + (old[1] - self.shift_correction)).exp()

    def finish(self) -> tuple[TokenResults, Tensor]:
        """Results of each token, and e0 + s, once every tile was formed."""
        s, offset = self.sums, self.target - self.shift - self.shift_correction  # about 0; far below where the shift was raised
        at_target = offset.exp()
        total = at_target + s.e
        logps = -torch.log1p(s.e / at_target)
        logps = torch.where(logps.isfinite(), logps, offset - total.log())
        if not self.stats:
            return TokenResults(logps, None, None), total
        mean = (s.ex + torch.where(at_target > 0, offset, 0) * at_target) / total
        top1 = (s.above <= self.target - self.shift).to(total.dtype)
        return TokenResults(logps, total.log() - mean, top1), total

    # ---- what a tail is chosen by (tail.py)

    def shares(self, e: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Of each row of E [rows, tokens] the largest and the summed probability over the first `count` tokens, relative to
        the sums so far; where ranks share the vocabulary those of their first tiles count too."""
        at_target = (self.target - self.shift - self.shift_correction).exp()
        per_e = 1 / (self.sums.e + self._first_sums_of_others * at_target + at_target)
        per_e[count:] = 0
        return self.row_shares(e, per_e)

    @functools.cached_property
    def _first_sums_of_others(self) -> Tensor | float:
        """Relative to exp(target), which all ranks know; too large a number is as good as a larger one."""
        if not self.head.group:
            return 0.0
        own = (self.sums.e.double() * (self.shift + self.shift_correction - self.target).double().exp()).clamp(max=1e30)
        return (add_up(own.clone(), self.head.group) - own).clamp(min=0).to(self.sums.e.dtype)

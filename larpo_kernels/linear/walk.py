"""The walk over hidden x weight: forward and back, once for every schedule and every backend.

It visits tiles of the logits, vocabulary-major: rows a:b of the weight times a block of tokens, [b - a, tokens]. Every
token is centred on its target before anything is rounded (k its target logit, s the sum over the other tokens):

    E = exp(z - k), target left out     l = -log1p(s / e0)     d l / dz = -(E, with -s at the target) / (e0 + s)

with e0 = exp(z_y - k), about 1. Partial sums simply add up over tiles. The upstream gradient c and 1 / (e0 + s) are one
number per token and never touch the vocabulary: with r = -c / (e0 + s),

    d weight = E (r h)          d hidden = r (E^T W)

Where s would overflow (a target some 70 nats below the largest logit), k is raised and what was summed is rescaled.

Ranks that share the vocabulary (vocab_shard.py) walk their own rows. Since partial sums add up, they exchange per token k
before the walk and s after it, and the rows of d hidden; d weight stays where its rows are.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from .kept import WholeBlock, whole_parts
from .schedules import tile_shape, widened_entries
from .tail import Tail, TailBlock
from .vocab_shard import add_up

# torch 2.8 and 2.9 refuse an accumulator that is wider than the operands (pytorch/pytorch#167931)
ADDMM_WIDENS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)


@dataclass(frozen=True)
class Head:
    """The head as the tiles read it: z = scale * (h W^T + bias), then the soft cap."""

    weight: Tensor  # [V, H], the caller's dtype
    bias: Tensor | None  # [V]
    scale: float
    softcap: float | None
    dtype: torch.dtype  # of the GEMM operands and tiles
    group: str = ""  # whose ranks own a part of the vocabulary each (vocab_shard.py); labels are local then

    def rows(self, a: int, b: int, some: Tensor | None = None) -> Tensor:
        """The weight of vocabulary rows a:b, or of some of them, in the dtype of tiles."""
        rows = self.weight[a:b]
        return (rows if some is None else rows.index_select(0, some)).to(self.dtype)

    @property
    def sums(self) -> torch.dtype:
        """Dtype of everything that is one number per token, and of accumulators."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


class Kept(NamedTuple):
    """What the forward walk leaves: results per token, and what the backward needs. All over the n tokens that count."""

    logps: Tensor  # [n]
    entropy: Tensor  # [n], empty without stats
    top1: Tensor  # [n], empty without stats
    total: Tensor  # [n] e0 + s
    centre: Tensor  # [n] what the GEMM subtracts
    level: Tensor  # [n] what is subtracted on top, 0 but for rare tokens
    unit_grad: Tensor  # [n, H] in the dtype of sums: d l / d hidden, frozen_head only
    held: Tensor  # [held_rows, n] E with -s at the target, stored block of tokens after block (see _of_block)


def _blocks(n: int, size: int) -> Iterator[tuple[int, int]]:
    for a in range(0, n, size):
        yield a, min(a + size, n)


def _tile(head: Head, hidden: Tensor, held: Tensor, tail: Tail | None, one_pass: bool = False) -> tuple[int, int, bool]:
    """Tokens and vocabulary rows of a tile, and whether all tiles are formed where they are held."""
    (n, h), v = hidden.shape, head.weight.shape[0]
    in_place = held.shape[0] == v and held.dtype == head.dtype
    if tail:
        return *tail.tile, in_place
    # ranks that share the vocabulary walk the same blocks of tokens, whatever rows each of them has
    use = {} if head.group else {"one_pass": one_pass, "in_place": in_place}
    return *tile_shape(n, h, v, head.dtype, hidden.device, casts=head.weight.dtype != head.dtype, **use), in_place


def _of_block(held: Tensor, t0: int, t1: int) -> Tensor:
    """E of a block of tokens [held_rows, t1 - t0]: contiguous, or GEMMs on it would miss their fastest paths."""
    rows = held.shape[0]
    return held.view(-1)[rows * t0 : rows * t1].view(rows, t1 - t0)


def _in_own_dtypes(function):
    """Autocast would round products that are chosen to be in float32."""

    @functools.wraps(function)
    def run(head: Head, hidden: Tensor, *args, **options):
        with torch.autocast(hidden.device.type, enabled=False):
            return function(head, hidden, *args, **options)

    return run


@_in_own_dtypes
def forward(
    head: Head,
    hidden: Tensor,
    labels: Tensor,
    *,
    held_rows: int,
    held_dtype: torch.dtype,
    one_pass: bool,
    stats: bool,
    backend: str,
    tail: Tail | None = None,  # keeps what the backward reads instead of held rows
) -> Kept:
    """hidden [n, H] and labels [n] of the tokens that count."""
    (n, h), v = hidden.shape, head.weight.shape[0]
    per_token = lambda n: hidden.new_empty(n, dtype=head.sums)  # noqa: E731
    kept = Kept(
        logps=per_token(n),
        entropy=per_token(n if stats else 0),
        top1=per_token(n if stats else 0),
        total=per_token(n),
        centre=per_token(n),
        level=per_token(n),
        unit_grad=hidden.new_empty((n, h) if one_pass else (0, h), dtype=head.sums),
        held=hidden.new_empty((held_rows, n), dtype=held_dtype),
    )
    primitives = backends.get(backend)
    tokens, rows, in_place = _tile(head, hidden, kept.held, tail, one_pass)
    scratch = hidden.new_empty(0 if in_place or tail else rows * tokens, dtype=head.dtype)
    for t0, t1 in _blocks(n, tokens):
        tiles = primitives.Tiles(head, hidden[t0:t1].to(head.dtype), labels[t0:t1], stats=stats)
        block = TailBlock(tail, tiles, t0) if tail else WholeBlock(tiles, _of_block(kept.held, t0, t1), scratch)
        acc = kept.unit_grad[t0:t1] if one_pass else None
        for a, b in _blocks(v, rows):
            e, weight = block.room(a, b), head.rows(a, b)
            raised = tiles.form(a, weight, e, for_grad=one_pass or block.holds(b))
            if raised is not None:
                block.rescale(raised, a)
                if acc is not None and a > 0:
                    raised.rescale(acc)
            part = block.keep(a, e, weight)
            if acc is not None:
                _product(acc, part.e.t(), weight if part.rows is None else weight.index_select(0, part.rows), add=a > 0)
        raised = tiles.merge_ranks() if head.group else None
        if raised is not None:
            block.rescale(raised, v)
            if acc is not None:
                raised.rescale(acc)
        ends = tiles.finish()
        for name, x in ends.items():
            getattr(kept, name)[t0:t1] = x
        at_target = tiles.at_target(ends["logps"], ends["total"])
        merged = block.finish(at_target)
        if acc is not None:
            if merged is not None:
                merged.add_rest(acc)
            factor = _factor(head, ends["logps"], ends["total"])
            primitives.scale_rows(acc, factor, acc, at_target, head.weight, tiles.labels)
            add_up(acc, head.group)
    if tail is not None:
        tail.close()
    return kept


@_in_own_dtypes
def backward(
    head: Head,
    hidden: Tensor,
    labels: Tensor,
    grad: Tensor,  # [n] upstream gradient of each token's log-prob
    kept: Kept,
    *,
    d_hidden: Tensor | None,  # [n, H], written
    d_weight: Tensor | None,  # [V, H], written
    d_bias: Tensor | None,  # [V], written
    backend: str,
    tail: Tail | None = None,  # as the forward filled it
) -> None:
    """The gradients that are wanted, from E held or formed again."""
    n, v = hidden.shape[0], head.weight.shape[0]
    if n == 0:
        for x in (d_hidden, d_weight, d_bias):
            if x is not None:
                x.zero_()
        return
    primitives = backends.get(backend)
    tokens, rows, all_held = _tile(head, hidden, kept.held, tail)
    entries = tail.stored if tail else kept.held.dtype if kept.held.shape[0] else head.dtype  # the dtype of E
    in_place = entries == head.dtype
    scratch = hidden.new_empty(0 if all_held else rows * tokens, dtype=head.dtype)
    once = n <= tokens  # then a slice of d weight is one GEMM, and nothing is added up
    direct = d_weight is None or once or d_weight.dtype == head.sums
    sum_weight = d_weight if direct else d_weight.new_empty(d_weight.shape, dtype=head.sums)
    sum_bias = None if d_bias is None else d_bias.new_zeros(v, dtype=head.sums)
    factors = _factor(head, kept.logps, kept.total, grad.to(head.sums))
    if tail is not None:  # rows of which no part is left count 0, or NaN where a token has no gradient
        for x in (sum_weight, sum_bias):
            if x is not None:
                x.copy_((0 * factors).sum())
    for i, (t0, t1) in enumerate(_blocks(n, tokens)):
        at, held = slice(t0, t1), _of_block(kept.held, t0, t1)
        logps, total = kept.logps[at], kept.total[at]
        tiles = primitives.Tiles(head, hidden[at].to(head.dtype), labels[at], centre=kept.centre[at], level=kept.level[at])
        at_target = tiles.at_target(logps, total)
        rounded = at_target.to(entries).to(head.sums)
        r = factors[at]
        # The target is the largest entry of its column. What rounding does to it is made good: for the parameters by a
        # factor, which is exact where it matters most; for d hidden by a term, so that a column still sums to 0.
        rp = r * torch.where(rounded == 0, 1, at_target / rounded)
        rh = acc = None
        if d_weight is not None:
            rh = torch.empty_like(tiles.hidden, memory_format=torch.contiguous_format)
            primitives.scale_rows(tiles.hidden, rp, rh)
        parts = tail.blocks[i].parts if tail else list(whole_parts(held, v, rows))
        if d_hidden is not None:
            acc = (tiles.hidden.new_empty if parts else tiles.hidden.new_zeros)(tiles.hidden.shape, dtype=head.sums)
        for j, part in enumerate(parts):
            a, b = part.start, part.stop
            weight = head.rows(a, b, part.rows)
            e = part.e if part.e is not None and in_place else scratch[: len(weight) * (t1 - t0)].view(-1, t1 - t0)
            if part.e is None:
                again, start = part.within(tiles)
                again.form_again(start, weight, e, rounded)
            elif not in_place:
                e.copy_(part.e)
            if acc is not None:
                _product(acc, e.t(), weight, add=j > 0)
            if sum_weight is not None:
                _add_rows(sum_weight[a:b], part.rows, e, rh, add=t0 > 0)
            if sum_bias is not None:
                sums = _row_sums(e, rp)
                sum_bias[a:b] += sums if part.rows is None else sums.new_zeros(b - a).index_copy_(0, part.rows, sums)
        if acc is not None:
            if tail is not None:
                tail.blocks[i].add_rest(acc)
            out = acc if head.group else d_hidden[at]
            left = None if entries == head.sums else at_target - rounded
            primitives.scale_rows(acc, r, out, left, head.weight, tiles.labels)
            if head.group:
                d_hidden[at] = add_up(acc, head.group)
    if not direct:
        d_weight.copy_(sum_weight)
    if d_bias is not None:
        d_bias.copy_(sum_bias)


def _factor(head: Head, logps: Tensor, total: Tensor, grad: Tensor | float = 1.0) -> Tensor:
    """r of each token; 0 where the target is at -inf: no direction would help."""
    return torch.where(logps == -torch.inf, 0, -head.scale * grad / total)


def _add_rows(out: Tensor, rows: Tensor | None, e: Tensor, rh: Tensor, add: bool) -> None:
    """out [a tile's rows, H] (+)= e @ rh, for these rows of it."""
    if rows is None:
        _product(out, e, rh, add)
    else:
        product = out.new_empty(rows.shape[0], out.shape[1])
        _product(product, e, rh, add=False)
        (out.index_add_ if add else out.index_copy_)(0, rows, product)


def _row_sums(e: Tensor, r: Tensor) -> Tensor:
    """e [rows, tokens] @ r [tokens] in the dtype of r, some rows at a time: a product in bfloat16 would be rounded to it."""
    if e.dtype == r.dtype:
        return e @ r
    step = max(1, widened_entries(e.device) // e.shape[1])
    return torch.cat([e[a:b].to(r.dtype) @ r for a, b in _blocks(e.shape[0], step)])


def _product(out: Tensor, x: Tensor, y: Tensor, add: bool) -> None:
    """out (+)= x @ y; where out is wider than x and y nothing is rounded in between on a GPU."""
    widens = out.is_cuda and (x.dtype, out.dtype) == (torch.bfloat16, torch.float32)
    if out.dtype == x.dtype:
        out.addmm_(x, y) if add else torch.mm(x, y, out=out)
    elif widens and not add:
        torch.mm(x, y, out_dtype=out.dtype, out=out)
    elif widens and ADDMM_WIDENS:
        torch.addmm(out, x, y, out_dtype=out.dtype, out=out)
    elif add:
        out += torch.mm(x, y, out_dtype=out.dtype) if widens else x @ y
    else:
        out.copy_(x @ y)

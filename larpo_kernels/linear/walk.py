"""The walk over hidden x weight: forward and back, once for every schedule and every backend.

It visits tiles of the logits, vocabulary-major: rows a:b of the weight times a block of tokens, [b - a, tokens]. Every
token is shifted by its target logit k before anything is rounded (s: the sum over the rest of the vocabulary):

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends.arguments import TargetTerm
from . import tile_shapes
from .kept import Part, WholeBlock, whole_parts
from .memory import widened_entries
from .tail import Tail, TailBlock
from .tiles import BlockTiles, ForwardSums, TokenResults
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


class Saved(NamedTuple):
    """What the forward walk saves for the backward, beside the log-probs. All over the n tokens that count."""

    total: Tensor  # [n] e0 + s
    shift: Tensor  # [n] what the GEMM subtracts
    shift_correction: Tensor  # [n] what is subtracted on top, 0 but for rare tokens
    dlogp_dhidden: Tensor  # [n, H] in the dtype of sums, where d hidden is fused into the forward; else [0, H]
    held: Tensor  # [held_rows, n] E with -s at the target, stored block of tokens after block (see _of_block)


def _blocks(n: int, size: int) -> Iterator[tuple[int, int]]:
    for a in range(0, n, size):
        yield a, min(a + size, n)


def _tile(head: Head, hidden: Tensor, held: Tensor, tail: Tail | None, fuse: bool = False) -> tuple[int, int, bool]:
    """Tokens and vocabulary rows of a tile, and whether all tiles are formed where they are held."""
    (n, h), v = hidden.shape, head.weight.shape[0]
    in_place = held.shape[0] == v and held.dtype == head.dtype
    if tail:
        return *tail.tile, in_place
    # ranks that share the vocabulary walk the same blocks of tokens, whatever rows each of them has
    use = {} if head.group else {"fuse_hidden_grad": fuse, "in_place": in_place}
    casts = head.weight.dtype != head.dtype
    return *tile_shapes.tile_shape(n, h, v, head.dtype, hidden.device, casts=casts, **use), in_place


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
    fuse_hidden_grad: bool,
    stats: bool,
    backend: str,
    tail: Tail | None = None,  # keeps what the backward reads instead of held rows
) -> tuple[TokenResults, Saved]:
    """hidden [n, H] and labels [n] of the tokens that count."""
    n, h = hidden.shape
    per_token = functools.partial(hidden.new_empty, n, dtype=head.sums)
    results = TokenResults(per_token(), *(per_token() if stats else None for _ in range(2)))
    dlogp_dhidden = hidden.new_empty((n if fuse_hidden_grad else 0, h), dtype=head.sums)
    held = hidden.new_empty((held_rows, n), dtype=held_dtype)
    saved = Saved(per_token(), per_token(), per_token(), dlogp_dhidden, held)
    primitives = backends.get(backend)
    tokens, rows, in_place = _tile(head, hidden, held, tail, fuse_hidden_grad)
    scratch = hidden.new_empty(0 if in_place or tail else rows * tokens, dtype=head.dtype)
    for t0, t1 in _blocks(n, tokens):
        tiles = primitives.ForwardTiles(head, hidden[t0:t1].to(head.dtype), labels[t0:t1], stats=stats)
        block = TailBlock(tail, tiles, t0) if tail else WholeBlock(tiles, _of_block(held, t0, t1), scratch)
        acc = dlogp_dhidden[t0:t1] if fuse_hidden_grad else None
        _form_block(tiles, block, rows, acc)
        of_block, total_of_block = tiles.finish()
        found = (*of_block, total_of_block, tiles.shift, tiles.shift_correction)
        for whole, part in zip((*results, saved.total, saved.shift, saved.shift_correction), found, strict=True):
            if whole is not None:
                whole[t0:t1] = part
        at_target = tiles.at_target(of_block.logps, total_of_block)
        merged = block.finish(at_target)
        if acc is not None:
            if merged is not None:
                merged.add_rest(acc)
            r = _factor(head, of_block.logps, total_of_block)
            primitives.scale_rows(acc, r, acc, TargetTerm(at_target, head.weight, tiles.labels))
            add_up(acc, head.group)
    if tail is not None:
        tail.close()
    return results, saved


def _form_block(tiles: ForwardSums, block: WholeBlock | TailBlock, rows: int, acc: Tensor | None) -> None:
    """Forms every tile of a block of tokens, a number of rows each: the sums grow in `tiles`, and E^T W in acc."""
    head = tiles.head
    v = head.weight.shape[0]
    for a, b in _blocks(v, rows):
        e, weight = block.room(a, b), head.rows(a, b)
        rescale = tiles.form(a, weight, e, for_grad=acc is not None or block.holds(b))
        if rescale is not None:
            block.rescale(rescale, a)
            if acc is not None and a > 0:
                rescale.apply(acc)
        part = block.keep(a, e, weight)
        if acc is not None:
            _product(acc, part.e.t(), weight if part.rows is None else weight.index_select(0, part.rows), add=a > 0)
    rescale = tiles.merge_ranks() if head.group else None
    if rescale is not None:
        block.rescale(rescale, v)
        if acc is not None:
            rescale.apply(acc)


@_in_own_dtypes
def backward(
    head: Head,
    hidden: Tensor,
    labels: Tensor,
    grad: Tensor,  # [n] upstream gradient of each token's log-prob
    logps: Tensor,  # [n]
    saved: Saved,
    *,
    d_hidden: Tensor | None,  # [n, H], written
    d_weight: Tensor | None,  # [V, H], written
    d_bias: Tensor | None,  # [V], written
    backend: str,
    tail: Tail | None = None,  # as the forward filled it
) -> None:
    """The gradients that are needed, from E held or formed again."""
    n, v = hidden.shape[0], head.weight.shape[0]
    if n == 0:
        for x in (d_hidden, d_weight, d_bias):
            if x is not None:
                x.zero_()
        return
    primitives = backends.get(backend)
    tokens, rows, all_held = _tile(head, hidden, saved.held, tail)
    stored = tail.stored if tail else saved.held.dtype if saved.held.shape[0] else head.dtype  # the dtype of E
    scratch = hidden.new_empty(0 if all_held else rows * tokens, dtype=head.dtype)
    factors = _factor(head, logps, saved.total, grad.to(head.sums))
    parameters = _ParameterGradients(head, d_weight, d_bias, direct=n <= tokens)
    if tail is not None:  # rows that were merged get 0, or NaN where a token's gradient is NaN
        parameters.fill((0 * factors).sum())
    for i, (t0, t1) in enumerate(_blocks(n, tokens)):
        at, r = slice(t0, t1), factors[t0:t1]
        tiles = primitives.Tiles(head, hidden[at].to(head.dtype), labels[at], saved.shift[at], saved.shift_correction[at])
        at_target = tiles.at_target(logps[at], saved.total[at])
        rounded = at_target.to(stored).to(head.sums)
        # The target is the largest entry of its column, so its rounding error is compensated: for the parameters by a
        # factor, which is exact where it matters most; for d hidden by a term, so that a column still sums to 0.
        parameters.start_block(tiles.hidden, r * torch.where(rounded == 0, 1, at_target / rounded), primitives.scale_rows)
        parts = tail.blocks[i].parts if tail else list(whole_parts(_of_block(saved.held, t0, t1), v, rows))
        acc = None
        if d_hidden is not None:
            acc = (tiles.hidden.new_empty if parts else tiles.hidden.new_zeros)(tiles.hidden.shape, dtype=head.sums)
        for j, part in enumerate(parts):
            e, weight = _e_of(part, tiles, scratch, rounded)
            if acc is not None:
                _product(acc, e.t(), weight, add=j > 0)
            parameters.add(part, e, add=t0 > 0)
        if acc is None:
            continue
        if tail is not None:
            tail.blocks[i].add_rest(acc)
        left = None if stored == head.sums else TargetTerm(at_target - rounded, head.weight, tiles.labels)
        primitives.scale_rows(acc, r, acc if head.group else d_hidden[at], left)
        if head.group:
            d_hidden[at] = add_up(acc, head.group)
    parameters.finish()


def _e_of(part: Part, tiles: BlockTiles, scratch: Tensor, at_target: Tensor) -> tuple[Tensor, Tensor]:
    """E of a part in the dtype of tiles, held or formed again, and the weight of its rows."""
    weight, tokens = tiles.head.rows(part.start, part.stop, part.rows), tiles.hidden.shape[0]
    if part.e is not None and part.e.dtype == scratch.dtype:
        return part.e, weight
    e = scratch[: len(weight) * tokens].view(-1, tokens)
    if part.e is not None:
        e.copy_(part.e)
    else:
        again, start = part.within(tiles)
        again.form_again(start, weight, e, at_target)
    return e, weight


class _ParameterGradients:
    """d weight and d bias, summed over blocks of tokens in the dtype of sums."""

    def __init__(self, head: Head, d_weight: Tensor | None, d_bias: Tensor | None, direct: bool):
        """direct: there is one block, so that a slice of d weight is one GEMM and nothing is added up."""
        self.d_weight, self.d_bias = d_weight, d_bias
        self.weight, self.bias = d_weight, None
        if d_weight is not None and not direct and d_weight.dtype != head.sums:
            self.weight = d_weight.new_empty(d_weight.shape, dtype=head.sums)
        if d_bias is not None:
            self.bias = d_bias.new_zeros(d_bias.shape, dtype=head.sums)

    def fill(self, value: Tensor) -> None:
        for x in (self.weight, self.bias):
            if x is not None:
                x.copy_(value)

    def start_block(self, hidden: Tensor, r: Tensor, scale_rows: Callable) -> None:
        """r [tokens]: what each token's column of E is multiplied by."""
        self.r, self.rh = r, None
        if self.weight is not None:
            self.rh = torch.empty_like(hidden, memory_format=torch.contiguous_format)
            scale_rows(hidden, r, self.rh)

    def add(self, part: Part, e: Tensor, add: bool) -> None:
        a, b, rows = part.start, part.stop, part.rows
        if self.weight is not None:
            _add_rows(self.weight[a:b], rows, e, self.rh, add)
        if self.bias is not None:
            sums = _row_sums(e, self.r)
            self.bias[a:b] += sums if rows is None else sums.new_zeros(b - a).index_copy_(0, rows, sums)

    def finish(self) -> None:
        for whole, sums in ((self.d_weight, self.weight), (self.d_bias, self.bias)):
            if sums is not None and sums is not whole:
                whole.copy_(sums)


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

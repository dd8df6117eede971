"""Tiles of a head's logits on a GPU: a GEMM of the vendor's library and one elementwise kernel in place.

Nothing here asks the device for a value: where the plain backend looks whether a sum grew too large, the kernels do.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ...linear.tiles import BlockTiles, ForwardSums, first_shift, largest_seen
from ...linear.vocab_shard import add_up
from .kernels import tiles
from .launch import Launch, for_tensor, on_device, options
from .states import target_dots

FAR_ABOVE_TARGET = 30.0  # nats of a logit above its target, half of what exp_tile takes
MERGED_SPANS, MERGED_TOKENS = 128, 32  # of a step of merge_spans: few tokens, so that those of a tile fill the GPU
PROGRAMS = 32  # for a block of tokens, to mend what is hardly ever to be mended: each walks its share of the rows


@dataclass
class Rescale:
    """Factors of all tokens, nearly always 1: the kernel finds out by itself whether there is anything to do."""

    factor: Tensor

    def apply(self, x: Tensor) -> None:
        """x [tokens, n], in place."""
        if x.numel():
            t, n = 64, 64
            grid = (triton.cdiv(x.shape[0], t), min(PROGRAMS, triton.cdiv(x.shape[1], n)))
            with on_device(x):
                tiles.rescale[grid](x, self.factor, *x.shape, *x.stride(), T=t, N=n, **options(x))


def gemm_shifts(head) -> bool:
    """Whether the GEMM itself subtracts the shift, before it rounds."""
    return head.softcap is None and head.dtype == torch.bfloat16


class Tiles(BlockTiles):
    target_dots = staticmethod(target_dots)

    def form_again(self, a: int, weight: Tensor, out: Tensor, at_target: Tensor) -> None:
        self._gemm(weight, out)
        self._exp(a, out, for_grad=True, at_target=at_target)

    def put_target(self, e: Tensor, a: int, at_target: Tensor) -> None:
        if e.numel():
            with on_device(e):
                grid = (triton.cdiv(e.shape[1], 256),)
                tiles.put_target[grid](e, at_target, self.labels, a, *e.shape, e.stride(0), T=256, **options(e))

    def over(self, rows: Tensor) -> Tiles:
        return Tiles(*self.arguments_over(rows))

    @functools.cached_property
    def launch(self) -> Launch:
        return for_tensor(self.hidden)

    def _gemm(self, weight: Tensor, out: Tensor) -> None:
        if gemm_shifts(self.head):  # one number per column: the GEMM's own bias
            torch.addmm(self.shift.neg().to(out.dtype), weight, self.hidden.t(), alpha=self.head.scale, out=out)
        else:
            torch.mm(weight, self.hidden.t(), out=out)

    def _exp(
        self,
        a: int,
        out: Tensor,
        span: Tensor | None = None,
        *,
        for_grad: bool,
        stats: bool = False,
        at_target: Tensor | None = None,
    ) -> None:
        """span: where its sums go, in the forward; at_target: what stands at the targets, in the backward."""
        final, unused = at_target is not None, self.shift
        head, launch, (rows, tokens) = self.head, self.launch, out.shape
        bias = out if head.bias is None else head.bias[a : a + rows].contiguous()
        grid = (triton.cdiv(tokens, launch.tile_tokens), triton.cdiv(rows, launch.tile_span))
        per_token = (self.shift, self.shift_correction, unused if final else span, self.labels, at_target if final else unused)
        constants = {
            "SHIFTED": gemm_shifts(head),
            "BIAS": head.bias is not None,
            "SOFTCAP": head.softcap is not None,
            "FOR_GRAD": for_grad and head.softcap is not None,  # without a soft cap one kernel serves both
            "FINAL": final,
            "STATS": stats,
            "SPAN": launch.tile_span,
            "R": launch.tile_rows,
            "T": launch.tile_tokens,
        }
        how = options(out, launch.tile_warps, None if head.softcap is None else 255)
        with on_device(out):
            tiles.exp_tile[grid](
                out, bias, *per_token, a, rows, tokens, out.stride(0), head.scale, head.softcap or 1.0, **constants, **how
            )


class ForwardTiles(ForwardSums, Tiles):
    @staticmethod
    def first_shift(head, hidden: Tensor, target: Tensor) -> Tensor:
        """In float32 a logit above LARGEST_EXPONENT is left as its distance from k: k must not be a mask's -1e9."""
        k = first_shift(head, hidden, target)
        if gemm_shifts(head) or head.softcap is not None:
            return k
        seen = largest_seen(head, hidden)
        return torch.where(seen > k + FAR_ABOVE_TARGET, seen, k)

    def form(self, a: int, weight: Tensor, out: Tensor, for_grad: bool) -> Rescale:
        rows, tokens = out.shape
        spans = triton.cdiv(rows, self.launch.tile_span)
        span = self.shift.new_empty(spans, 4, tokens)
        factor, lowest = self.shift.new_empty(2, tokens)
        self._gemm(weight, out)
        self._exp(a, out, span, for_grad=for_grad, stats=self.stats)
        s, unused = self.sums, self.shift
        of_stats = (s.ex, s.above) if self.stats else (unused, unused)
        block = self.launch.tile_tokens
        few = min(MERGED_TOKENS, block)
        sizes = {"SPAN": self.launch.tile_span, "R": self.launch.tile_rows, "T": block}
        with on_device(out):
            merged = (span, s.e, self.shift_correction, *of_stats, factor, lowest, spans, tokens)
            tiles.merge_spans[(triton.cdiv(tokens, few),)](*merged, STATS=self.stats, S=MERGED_SPANS, T=few, **options(out, 8))
            if for_grad:
                grid = (triton.cdiv(tokens, block), min(PROGRAMS, spans))
                leveled = (out, span, self.shift_correction, lowest, rows, tokens, out.stride(0))
                tiles.level_spans[grid](*leveled, **sizes, **options(out, self.launch.tile_warps))
        return Rescale(factor)

    def merge_ranks(self) -> Rescale:
        factor = self.take_largest_shift_of_ranks()
        self.sums = self.sums._replace(e=add_up(self.sums.e * factor, self.head.group))
        return Rescale(factor)

    def row_shares(self, e: Tensor, per_e: Tensor) -> tuple[Tensor, Tensor]:
        (rows, tokens), launch = e.shape, self.launch
        few = launch.tile_rows // 2  # two sums an entry: more would not fit the registers
        largest, summed = per_e.new_empty(rows), per_e.new_empty(rows)
        sizes = {"R": few, "T": launch.tile_tokens}
        with on_device(e):
            tiles.row_shares[(triton.cdiv(rows, few),)](
                e, per_e, largest, summed, rows, tokens, e.stride(0), **sizes, **options(e, launch.tile_warps)
            )
        return largest, summed

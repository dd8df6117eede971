"""Tiles of a head's logits on a GPU: a GEMM of the vendor's library and one elementwise kernel in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ...linear.vocab_shard import add_up
from ..pytorch import tiles as plain
from .kernels import tiles
from .launch import for_tensor, on_device, options
from .states import target_dots

FAR = 30.0  # nats of a logit above its target, half of what exp_tile takes
MERGED_SPANS, MERGED_TOKENS = 128, 32  # of a step of merge_spans: few tokens, so that those of a tile fill the GPU
PROGRAMS = 32  # for a block of tokens, to mend what is hardly ever to be mended: each walks its share of the rows


@dataclass
class Raised:
    """Factors of all tokens, nearly always 1; the kernel finds out by itself."""

    factor: Tensor

    def rescale(self, x: Tensor) -> None:
        """x [tokens, n], in place."""
        if x.numel():
            t, n = 64, 64
            grid = (triton.cdiv(x.shape[0], t), min(PROGRAMS, triton.cdiv(x.shape[1], n)))
            with on_device(x):
                tiles.rescale[grid](x, self.factor, *x.shape, *x.stride(), T=t, N=n, **options(x))


class Tiles(plain.Tiles):
    """Differs from the plain ones in how a tile becomes E, and in never asking the device anything."""

    target_dots = staticmethod(target_dots)

    def __init__(self, head, hidden: Tensor, labels: Tensor, *, centre=None, level=None, stats=False):
        super().__init__(head, hidden, labels.contiguous(), centre=centre, level=level, stats=stats)
        self.launch = for_tensor(hidden)
        if centre is None:
            self.level = torch.zeros_like(self.centre)

    def _centre(self) -> Tensor:
        """In float32 a logit above ROOM is left as its distance from k: k must not be a mask's -1e9."""
        k = super()._centre()
        if self._centred or self.head.softcap is not None:
            return k
        seen = self._seen()
        return torch.where(seen > k + FAR, seen, k)

    def form(self, a: int, weight: Tensor, out: Tensor, for_grad: bool) -> Raised:
        rows, tokens = out.shape
        spans = triton.cdiv(rows, self.launch.tile_span)
        span = self.centre.new_empty(spans, 4, tokens)
        factor, lowest = self.centre.new_empty(2, tokens)
        self._gemm(weight, out)
        self._exp(a, out, span, for_grad=for_grad)
        s, unused = self.sums, self.centre
        block = self.launch.tile_tokens
        few = min(MERGED_TOKENS, block)
        with on_device(out):
            tiles.merge_spans[(triton.cdiv(tokens, few),)](
                span, s.e, self.level, s.ex if self.stats else unused, s.above if self.stats else unused, factor,
                lowest, spans, tokens, STATS=self.stats, S=MERGED_SPANS, T=few, **options(out, 8),
            )  # fmt: skip
            if for_grad:
                tiles.level_spans[(triton.cdiv(tokens, block), min(PROGRAMS, spans))](
                    out, span, self.level, lowest, rows, tokens, out.stride(0),
                    SPAN=self.launch.tile_span, R=self.launch.tile_rows, T=block, **options(out, self.launch.tile_warps),
                )  # fmt: skip
        return Raised(factor)

    def merge_ranks(self) -> Raised:
        factor = self._common_centre()
        self.sums = self.sums._replace(e=add_up(self.sums.e * factor, self.head.group))
        return Raised(factor)

    def form_again(self, a: int, weight: Tensor, out: Tensor, at_target: Tensor) -> None:
        self._gemm(weight, out)
        self._exp(a, out, for_grad=True, at_target=at_target)

    @property
    def _centred(self) -> bool:
        return self.head.softcap is None and self.head.dtype == torch.bfloat16

    def _gemm(self, weight: Tensor, out: Tensor) -> None:
        if self._centred:  # one number per column: the GEMM's own bias, added before it rounds
            torch.addmm(self.centre.neg().to(out.dtype), weight, self.hidden.t(), alpha=self.head.scale, out=out)
        else:
            torch.mm(weight, self.hidden.t(), out=out)

    def _exp(self, a: int, out: Tensor, span: Tensor | None = None, *, for_grad: bool, at_target: Tensor | None = None) -> None:
        """span: where its sums go, in the forward; at_target: what stands at the targets, in the backward."""
        final, unused = at_target is not None, self.centre
        head, launch, (rows, tokens) = self.head, self.launch, out.shape
        bias = out if head.bias is None else head.bias[a : a + rows].contiguous()
        with on_device(out):
            tiles.exp_tile[(triton.cdiv(tokens, launch.tile_tokens), triton.cdiv(rows, launch.tile_span))](
                out, bias, self.centre, self.level, unused if final else span, self.labels, at_target if final else unused,
                a, rows, tokens, out.stride(0), head.scale, head.softcap or 1.0,
                CENTRED=self._centred, BIAS=head.bias is not None, SOFTCAP=head.softcap is not None,
                FOR_GRAD=for_grad and head.softcap is not None,  # without a soft cap one kernel serves both
                FINAL=final, STATS=self.stats and not final, SPAN=launch.tile_span, R=launch.tile_rows,
                T=launch.tile_tokens, **options(out, launch.tile_warps, None if head.softcap is None else 255),
            )  # fmt: skip

    def put_target(self, e: Tensor, a: int, at_target: Tensor) -> None:
        if e.numel():
            with on_device(e):
                grid = (triton.cdiv(e.shape[1], 256),)
                tiles.put_target[grid](e, at_target, self.labels, a, *e.shape, e.stride(0), T=256, **options(e))

    def _row_shares(self, e: Tensor, per_e: Tensor) -> tuple[Tensor, Tensor]:
        (rows, tokens), launch = e.shape, self.launch
        few = launch.tile_rows // 2  # two sums an entry: more would not fit the registers
        largest, summed = per_e.new_empty(rows), per_e.new_empty(rows)
        with on_device(e):
            tiles.row_shares[(triton.cdiv(rows, few),)](
                e, per_e, largest, summed, rows, tokens, e.stride(0),
                R=few, T=launch.tile_tokens, **options(e, launch.tile_warps),
            )  # fmt: skip
        return largest, summed

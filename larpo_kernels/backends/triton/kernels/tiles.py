"""Tiles of a head's logits, vocabulary-major [rows, tokens]: what a GEMM wrote becomes E = exp(z - k) in place.

A program walks a span of rows for a block of tokens, and the next program the same span for the next block: together they read
whole rows, which lie beside each other in memory. Tokens are on the contiguous axis and padded by whoever allocates
the tile, so loads are wide at any vocabulary size. k, the shift, is the target's logit; the targets are set to -inf first.
Where some z - k exceeds LARGEST_EXPONENT (a target far below the largest logit) the program stores the negative marker
-(z - k); exp is never negative. It then walks its span once more and subtracts a `correction` on top. `merge_spans` finds one
correction for all spans of a token, `level_spans` and `rescale` apply it to what was written before. Both return at once
where there is nothing to correct, so that the host need not ask the device.

Writing in place is safe. An entry of a tile is loaded and stored by one thread (tiles have more entries than their program has
threads; of fewer, several threads would hold copies of one, and read what another has stored), a barrier stands before
`exp_tile` walks its span once more, `merge_spans` loads the old sums before a sum over spans that all warps wait for, and
whatever else a program reads comes from an earlier launch.
"""

import triton
import triton.language as tl

from .math import LOG2E, tanh

LARGEST_EXPONENT: tl.constexpr = tl.constexpr(60.0)  # nats above k; sums of e^60 leave room for a product with weights


@triton.jit
def read_tile(
    at,
    inside,
    bias_ptr,
    r,
    real,
    base,
    scale,
    softcap,
    SHIFTED: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """-> x = z - base of rows r, and the slope of the soft cap there. real: which of these rows there are."""
    z = tl.load(at, mask=inside, other=-float("inf")).to(tl.float32)
    x = z
    slope = 1.0
    if BIAS:
        b = tl.load(bias_ptr + r, mask=real, other=0.0).to(tl.float32)
    if SHIFTED:
        if BIAS:
            x += (b * scale)[:, None]
    else:
        if BIAS:
            x += b[:, None]
        x *= scale
        if SOFTCAP:
            bent, slope = tanh(x / softcap)
            x = softcap * bent
        x = tl.where(z == -float("inf"), z, x)  # a masked logit stays -inf under any cap or scale
    x -= base[None, :]
    return x, slope


@triton.jit
def correct_span(
    x_ptr,
    start,
    stop,
    t,
    real,
    stride,
    total_e,
    total_xe,
    up,
    base,
    softcap,
    CAPPED_GRAD: tl.constexpr,
    STATS: tl.constexpr,
    R: tl.constexpr,
):
    """Walks a span once more: forms E where the first walk left a negative marker, brings the rest to the shift + up, and
    returns the sums of both."""
    factor = tl.exp2(-up * LOG2E)
    total_xe = (total_xe - up * total_e) * factor
    total_e *= factor
    for r0 in range(start, stop, R):
        r = r0 + tl.arange(0, R)
        inside = (r < stop)[:, None] & real[None, :]
        at = x_ptr + r.to(tl.int64)[:, None] * stride + t[None, :]
        e = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        left = e < 0
        x = tl.where(left, -e - up[None, :], -float("inf"))
        late = tl.exp2(x * LOG2E)
        total_e += tl.sum(late, 0)
        if STATS:
            total_xe += tl.sum(tl.where(late > 0, x * late, 0.0), 0)
        if CAPPED_GRAD:
            bent = tl.where(left, base[None, :] - e, 0.0) / softcap
            late *= 1 - bent * bent
        tl.store(at, tl.where(left, late, e * factor[None, :]).to(x_ptr.dtype.element_ty), mask=inside)
    return total_e, total_xe


@triton.jit
def exp_tile(
    x_ptr,  # [rows, tokens], in: what the GEMM wrote, out: E; unit stride on tokens
    bias_ptr,  # [rows], with BIAS
    shift_ptr,  # [tokens] float32, k
    correction_ptr,  # [tokens] float32, what is subtracted on top of the shift
    span_ptr,  # [spans, 4, tokens] float32, unless FINAL: sum of E, correction, sum of x E, largest x
    label_ptr,  # [tokens] int64, from first_row of the tile
    value_ptr,  # [tokens] float32, with FINAL: what E is at the targets; else it is 0 there
    first_row,
    rows,
    tokens,
    stride,
    scale,
    softcap,
    SHIFTED: tl.constexpr,  # the GEMM has scaled, and subtracted the shift
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FOR_GRAD: tl.constexpr,  # E times the slope of the soft cap
    FINAL: tl.constexpr,  # the corrections are known: form E again for the backward, without sums
    STATS: tl.constexpr,
    SPAN: tl.constexpr,  # rows of a program, a multiple of R
    R: tl.constexpr,
    T: tl.constexpr,
):
    CAPPED_GRAD: tl.constexpr = SOFTCAP and FOR_GRAD
    t = tl.program_id(0) * T + tl.arange(0, T)
    span = tl.program_id(1)
    real = t < tokens
    correction = tl.load(correction_ptr + t, mask=real, other=0.0)
    base = correction  # added first: a shift of -1e9 and a correction of 1e9 cancel exactly
    if not SHIFTED:
        base += tl.load(shift_ptr + t, mask=real, other=0.0)
    total = tl.zeros([R, T], tl.float32)  # summed over rows at the end: a thread's own are all in its registers
    weighted = tl.zeros([R, T], tl.float32)
    top = tl.full([R, T], -float("inf"), tl.float32)
    start = span * SPAN
    stop = tl.minimum(start + SPAN, rows)
    target = tl.load(label_ptr + t, mask=real, other=-1) - first_row
    mine = (target >= start) & (target < stop)
    if not FINAL:
        tl.store(x_ptr + target * stride + t, tl.full([T], -float("inf"), tl.float32), mask=mine)
        tl.debug_barrier()  # before any warp reads it
    for r0 in range(start, stop, R):
        r = r0 + tl.arange(0, R)
        inside = (r < stop)[:, None] & real[None, :]
        at = x_ptr + r.to(tl.int64)[:, None] * stride + t[None, :]
        x, slope = read_tile(at, inside, bias_ptr, r, r < stop, base, scale, softcap, SHIFTED, BIAS, SOFTCAP)
        e = tl.exp2(x * LOG2E)
        if not FINAL:
            over = x > LARGEST_EXPONENT
            total += tl.where(over, 0.0, e)
            if STATS:
                weighted += tl.where(over | (e == 0), 0.0, x * e)
            top = tl.maximum(top, x)
        if CAPPED_GRAD:
            e *= slope
        if not FINAL:
            e = tl.where(over, -x, e)
        tl.store(at, e.to(x_ptr.dtype.element_ty), mask=inside)
    if FINAL:
        value = tl.load(value_ptr + t, mask=mine, other=0.0)
        tl.debug_barrier()  # after every warp has written
        tl.store(x_ptr + target * stride + t, value.to(x_ptr.dtype.element_ty), mask=mine)
    else:
        total_e = tl.sum(total, 0)
        total_xe = tl.sum(weighted, 0)
        most = tl.max(top, 0)
        above = most + correction
        if tl.max(most) > LARGEST_EXPONENT:
            up = tl.where(most > LARGEST_EXPONENT, most, 0.0)
            tl.debug_barrier()
            total_e, total_xe = correct_span(
                x_ptr, start, stop, t, real, stride, total_e, total_xe, up, base, softcap, CAPPED_GRAD, STATS, R
            )
            correction += up
        out = span_ptr + span * 4 * tokens + t
        tl.store(out, total_e, mask=real)
        tl.store(out + tokens, correction, mask=real)
        if STATS:
            tl.store(out + 2 * tokens, total_xe, mask=real)
            tl.store(out + 3 * tokens, above, mask=real)


@triton.jit
def merge_spans(
    span_ptr,  # [spans, 4, tokens] float32
    total_ptr,  # [tokens] float32, in and out: sum of E over all tiles so far, relative to shift + correction
    correction_ptr,  # [tokens] float32, in and out
    weighted_ptr,  # [tokens] float32, in and out, with STATS: sum of x E, x relative to shift + correction
    above_ptr,  # [tokens] float32, in and out, with STATS: largest x, relative to the shift
    factor_ptr,  # [tokens] float32, out: exp(old correction - new correction)
    lowest_ptr,  # [tokens] float32, out: the least of the spans'; below the new one where some span is to be brought to it
    spans,
    tokens,
    STATS: tl.constexpr,
    S: tl.constexpr,  # spans per step: their loads are in flight together
    T: tl.constexpr,
):
    """Adds the spans of a tile to the sums in a fixed order, at a common correction."""
    t = tl.program_id(0) * T + tl.arange(0, T)
    real = t < tokens
    old = tl.load(correction_ptr + t, mask=real, other=0.0)
    correction = old
    lowest = tl.full([T], float("inf"), tl.float32)
    for s0 in range(0, spans, S):
        s = s0 + tl.arange(0, S)
        correction_at = span_ptr + ((s * 4 + 1) * tokens)[:, None] + t[None, :]
        inside = (s < spans)[:, None] & real[None, :]
        corrections = tl.load(correction_at, mask=inside, other=0.0)
        correction = tl.maximum(correction, tl.max(corrections, 0))
        lowest = tl.minimum(lowest, tl.min(tl.where(inside, corrections, float("inf")), 0))
    factor = tl.exp2((old - correction) * LOG2E)
    total = tl.load(total_ptr + t, mask=real, other=0.0)
    weighted = tl.zeros([T], tl.float32)
    above = tl.zeros([T], tl.float32)
    if STATS:
        weighted = (tl.load(weighted_ptr + t, mask=real, other=0.0) + (old - correction) * total) * factor
        above = tl.load(above_ptr + t, mask=real, other=0.0)
    total *= factor
    for s0 in range(0, spans, S):
        s = s0 + tl.arange(0, S)
        part = span_ptr + (s * 4 * tokens)[:, None] + t[None, :]
        inside = (s < spans)[:, None] & real[None, :]
        e = tl.load(part, mask=inside, other=0.0)
        down = tl.load(part + tokens, mask=inside, other=0.0) - correction[None, :]
        f = tl.exp2(down * LOG2E)
        total += tl.sum(e * f, 0)
        if STATS:
            weighted += tl.sum((tl.load(part + 2 * tokens, mask=inside, other=0.0) + down * e) * f, 0)
            above = tl.maximum(above, tl.max(tl.load(part + 3 * tokens, mask=inside, other=-float("inf")), 0))
    tl.store(total_ptr + t, total, mask=real)
    tl.store(correction_ptr + t, correction, mask=real)
    tl.store(factor_ptr + t, factor, mask=real)
    tl.store(lowest_ptr + t, lowest, mask=real)
    if STATS:
        tl.store(weighted_ptr + t, weighted, mask=real)
        tl.store(above_ptr + t, above, mask=real)


@triton.jit
def level_spans(
    x_ptr,  # [rows, tokens], E, in and out
    span_ptr,  # [spans, 4, tokens] float32
    correction_ptr,  # [tokens] float32
    lowest_ptr,  # [tokens] float32
    rows,
    tokens,
    stride,
    SPAN: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
):
    """Brings each span of a tile from its own correction to that of its tokens; returns at once where all spans agree."""
    t = tl.program_id(0) * T + tl.arange(0, T)
    real = t < tokens
    correction = tl.load(correction_ptr + t, mask=real, other=0.0)
    if tl.min(tl.load(lowest_ptr + t, mask=real, other=0.0) - correction) == 0.0:
        return
    for start in range(tl.program_id(1) * SPAN, rows, tl.num_programs(1) * SPAN):
        down = tl.load(span_ptr + (start // SPAN * 4 + 1) * tokens + t, mask=real, other=0.0) - correction
        if tl.min(down) < 0.0:
            factor = tl.exp2(down * LOG2E)
            stop = tl.minimum(start + SPAN, rows)
            for r0 in range(start, stop, R):
                r = r0 + tl.arange(0, R)
                inside = (r < stop)[:, None] & real[None, :]
                at = x_ptr + r.to(tl.int64)[:, None] * stride + t[None, :]
                e = tl.load(at, mask=inside, other=0.0).to(tl.float32) * factor[None, :]
                tl.store(at, e.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rescale(
    x_ptr,  # [tokens, n], any strides, in and out
    factor_ptr,  # [tokens] float32
    tokens,
    n,
    stride_t,
    stride_n,
    T: tl.constexpr,
    N: tl.constexpr,
):
    """x times the factor of its token; returns at once where all factors are 1."""
    t = tl.program_id(0) * T + tl.arange(0, T)
    factor = tl.load(factor_ptr + t, mask=t < tokens, other=1.0)
    if tl.min(factor) == 1.0:
        return
    for c0 in range(tl.program_id(1) * N, n, tl.num_programs(1) * N):
        c = c0 + tl.arange(0, N)
        inside = (t < tokens)[:, None] & (c < n)[None, :]
        at = x_ptr + t.to(tl.int64)[:, None] * stride_t + c.to(tl.int64)[None, :] * stride_n
        x = tl.load(at, mask=inside, other=0.0).to(tl.float32) * factor[:, None]
        tl.store(at, x.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def put_target(
    x_ptr,  # [rows, tokens], in and out
    value_ptr,  # [tokens] float32
    label_ptr,  # [tokens] int64
    first_row,
    rows,
    tokens,
    stride,
    T: tl.constexpr,
):
    """x[label - first_row] = value for the tokens whose label lies in the tile."""
    t = tl.program_id(0) * T + tl.arange(0, T)
    r = tl.load(label_ptr + t, mask=t < tokens, other=-1) - first_row
    value = tl.load(value_ptr + t, mask=t < tokens, other=0.0)
    tl.store(x_ptr + r * stride + t, value.to(x_ptr.dtype.element_ty), mask=(t < tokens) & (r >= 0) & (r < rows))


@triton.jit
def row_shares(
    x_ptr,  # [rows, tokens], E
    per_e_ptr,  # [tokens] float32: what an entry of E is times its token's, as a probability
    largest_ptr,  # [rows] float32, out: the largest probability of a row
    summed_ptr,  # [rows] float32, out: their sum; not a number where one of them is none
    rows,
    tokens,
    stride,
    R: tl.constexpr,
    T: tl.constexpr,
):
    r = tl.program_id(0) * R + tl.arange(0, R)
    largest = tl.zeros([R, T], tl.float32)  # reduced over tokens at the end: a thread's own are all in its registers
    summed = tl.zeros([R, T], tl.float32)
    for t0 in range(0, tokens, T):
        t = t0 + tl.arange(0, T)
        inside = (r < rows)[:, None] & (t < tokens)[None, :]
        e = tl.load(x_ptr + r.to(tl.int64)[:, None] * stride + t[None, :], mask=inside, other=0.0).to(tl.float32)
        p = e * tl.load(per_e_ptr + t, mask=t < tokens, other=0.0)[None, :]
        largest = tl.maximum(largest, p)
        summed += p
    tl.store(largest_ptr + r, tl.max(largest, 1), mask=r < rows)
    tl.store(summed_ptr + r, tl.sum(summed, 1), mask=r < rows)

"""Tiles of a head's logits, vocabulary-major [rows, tokens]: what a GEMM wrote becomes E = exp(z - k) in place.

A program walks a span of rows for a block of tokens. Tokens are on the contiguous axis and padded by whoever allocates
the tile, so loads are wide at any vocabulary size. k is the target's logit; where some z - k exceeds ROOM (a target far
below the largest logit) the program raises its own k by a `shift` and rescales what it wrote. `merge_spans` brings all
spans of a token to one level, `level_spans` and `scale_rows` bring what was written before to it. Both return at once
where nothing was raised, so nobody has to ask the device whether that happened.
"""

import triton
import triton.language as tl

from .math import LOG2E, tanh

ROOM: tl.constexpr = tl.constexpr(60.0)  # nats above k; sums of e^60 leave room for a product with weights


@triton.jit
def exp_tile(
    x_ptr,  # [rows, tokens], in: what the GEMM wrote, out: E; unit stride on tokens
    bias_ptr,  # [rows], with BIAS
    centre_ptr,  # [tokens] float32, k
    level_ptr,  # [tokens] float32, what k was raised by so far
    label_ptr,  # [tokens] int64
    at_target_ptr,  # [tokens] float32, with FINAL: what to put at the target
    span_ptr,  # [spans, 4, tokens] float32, unless FINAL: sum of E, shift, sum of x E, largest x
    first_row,  # vocabulary row of the tile's first row
    rows,
    tokens,
    stride,
    scale,
    softcap,
    CENTRED: tl.constexpr,  # the GEMM has scaled, and subtracted k
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FOR_GRAD: tl.constexpr,  # E times the slope of the soft cap
    FINAL: tl.constexpr,  # the levels are known: form E again for the backward, without sums
    STATS: tl.constexpr,
    SPAN: tl.constexpr,  # rows of a program, a multiple of R
    R: tl.constexpr,
    T: tl.constexpr,
):
    span = tl.program_id(0)
    t = tl.program_id(1) * T + tl.arange(0, T)
    real = t < tokens
    k = tl.load(centre_ptr + t, mask=real, other=0.0)
    shift = tl.load(level_ptr + t, mask=real, other=0.0)
    left = tl.zeros([T], tl.float32)  # of k, for this kernel to subtract
    if not CENTRED:
        left = k
    label = tl.load(label_ptr + t, mask=real, other=-1) - first_row
    at_target = tl.zeros([T], tl.float32)
    if FINAL:
        at_target = tl.load(at_target_ptr + t, mask=real, other=0.0)
    total = tl.zeros([T], tl.float32)
    weighted = tl.zeros([T], tl.float32)
    above = tl.full([T], -float("inf"), tl.float32)
    start = span * SPAN
    stop = tl.minimum(start + SPAN, rows)
    for r0 in range(start, stop, R):
        r = r0 + tl.arange(0, R)
        inside = (r < stop)[:, None] & real[None, :]
        at = x_ptr + r.to(tl.int64)[:, None] * stride + t[None, :]
        x = tl.load(at, mask=inside, other=-float("inf")).to(tl.float32)
        slope = tl.full([R, T], 1.0, tl.float32)
        if BIAS:
            b = tl.load(bias_ptr + r, mask=r < stop, other=0.0).to(tl.float32)
        if CENTRED:
            if BIAS:
                x += (b * scale)[:, None]
        else:
            if BIAS:
                x += b[:, None]
            x *= scale
            if SOFTCAP:
                bent, slope = tanh(x / softcap)
                x = softcap * bent
        is_target = r[:, None] == label[None, :]
        x = tl.where(inside & (r[:, None] != label[None, :]), x, -float("inf"))
        if not FINAL:
            if STATS:
                above = tl.maximum(above, tl.max(x, 0) - left)
            if tl.max(x - (left + shift)[None, :]) > ROOM:  # one number first: the columns' own only where needed
                high = tl.max(x - (left + shift)[None, :], 0)
                raised = tl.where(high > ROOM, shift + high, shift)
                factor = tl.exp2((shift - raised) * LOG2E)
                weighted = (weighted + (shift - raised) * total) * factor
                total *= factor
                tl.debug_barrier()
                for p0 in range(start, r0, R):
                    p = p0 + tl.arange(0, R)
                    past = x_ptr + p.to(tl.int64)[:, None] * stride + t[None, :]
                    e = tl.load(past, mask=real[None, :], other=0.0).to(tl.float32) * factor[None, :]
                    tl.store(past, e.to(x_ptr.dtype.element_ty), mask=real[None, :])
                tl.debug_barrier()
                shift = raised
        x -= (left + shift)[None, :]  # one number: of a k of -1e9 and a shift that makes up for it, 0 is left
        e = tl.exp2(x * LOG2E)
        if not FINAL:
            total += tl.sum(e, 0)
            if STATS:
                weighted += tl.sum(e * tl.where(e > 0, x, 0.0), 0)
        if SOFTCAP and FOR_GRAD:
            e *= slope
        if FINAL:
            e = tl.where(is_target, at_target[None, :], e)
        tl.store(at, e.to(x_ptr.dtype.element_ty), mask=inside)
    if not FINAL:
        out = span_ptr + span * 4 * tokens + t
        tl.store(out, total, mask=real)
        tl.store(out + tokens, shift, mask=real)
        if STATS:
            tl.store(out + 2 * tokens, weighted, mask=real)
            tl.store(out + 3 * tokens, above, mask=real)


@triton.jit
def merge_spans(
    span_ptr,  # [spans, 4, tokens] float32
    total_ptr,  # [tokens] float32, in and out: sum of E over all tiles so far, relative to k + level
    level_ptr,  # [tokens] float32, in and out
    weighted_ptr,  # [tokens] float32, in and out, with STATS: sum of x E, x relative to k + level
    above_ptr,  # [tokens] float32, in and out, with STATS: largest x, relative to k
    factor_ptr,  # [tokens] float32, out: exp(old level - new level)
    spans,
    tokens,
    STATS: tl.constexpr,
    S: tl.constexpr,  # spans per step: their loads are in flight together
    T: tl.constexpr,
):
    """Adds the spans of a tile to the sums in a fixed order, at a common level."""
    t = tl.program_id(0) * T + tl.arange(0, T)
    real = t < tokens
    old = tl.load(level_ptr + t, mask=real, other=0.0)
    level = old
    for s0 in range(0, spans, S):
        s = s0 + tl.arange(0, S)
        shift_at = span_ptr + ((s * 4 + 1) * tokens)[:, None] + t[None, :]
        shifts = tl.load(shift_at, mask=(s < spans)[:, None] & real[None, :], other=0.0)
        level = tl.maximum(level, tl.max(shifts, 0))
    factor = tl.exp2((old - level) * LOG2E)
    total = tl.load(total_ptr + t, mask=real, other=0.0)
    weighted = tl.zeros([T], tl.float32)
    above = tl.zeros([T], tl.float32)
    if STATS:
        weighted = (tl.load(weighted_ptr + t, mask=real, other=0.0) + (old - level) * total) * factor
        above = tl.load(above_ptr + t, mask=real, other=0.0)
    total *= factor
    for s0 in range(0, spans, S):
        s = s0 + tl.arange(0, S)
        part = span_ptr + (s * 4 * tokens)[:, None] + t[None, :]
        inside = (s < spans)[:, None] & real[None, :]
        e = tl.load(part, mask=inside, other=0.0)
        down = tl.load(part + tokens, mask=inside, other=0.0) - level[None, :]
        f = tl.exp2(down * LOG2E)
        total += tl.sum(e * f, 0)
        if STATS:
            weighted += tl.sum((tl.load(part + 2 * tokens, mask=inside, other=0.0) + down * e) * f, 0)
            above = tl.maximum(above, tl.max(tl.load(part + 3 * tokens, mask=inside, other=-float("inf")), 0))
    tl.store(total_ptr + t, total, mask=real)
    tl.store(level_ptr + t, level, mask=real)
    tl.store(factor_ptr + t, factor, mask=real)
    if STATS:
        tl.store(weighted_ptr + t, weighted, mask=real)
        tl.store(above_ptr + t, above, mask=real)


@triton.jit
def level_spans(
    x_ptr,  # [rows, tokens], E, in and out
    span_ptr,  # [spans, 4, tokens] float32
    level_ptr,  # [tokens] float32
    rows,
    tokens,
    stride,
    SPAN: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
):
    """Brings each span of a tile from its own shift to the level of its tokens; returns at once where they agree."""
    span = tl.program_id(0)
    t = tl.program_id(1) * T + tl.arange(0, T)
    real = t < tokens
    down = tl.load(span_ptr + (span * 4 + 1) * tokens + t, mask=real, other=0.0)
    down -= tl.load(level_ptr + t, mask=real, other=0.0)
    if tl.min(down) == 0.0:
        return
    factor = tl.exp2(down * LOG2E)
    stop = tl.minimum(span * SPAN + SPAN, rows)
    for r0 in range(span * SPAN, stop, R):
        r = r0 + tl.arange(0, R)
        inside = (r < stop)[:, None] & real[None, :]
        at = x_ptr + r.to(tl.int64)[:, None] * stride + t[None, :]
        e = tl.load(at, mask=inside, other=0.0).to(tl.float32) * factor[None, :]
        tl.store(at, e.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def scale_rows(
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
    c = tl.program_id(1) * N + tl.arange(0, N)
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

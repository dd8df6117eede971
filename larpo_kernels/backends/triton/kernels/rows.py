"""Rows of given logits: target logit and log-sum-exp in one read; gradient in one read and one write.

A row is one token's V logits. With k the target's logit, E = exp(z - k) without the target and s = sum E:

    l = -log1p(s)          d l / dz = -exp(z - k + l), 1 - exp(l) at the target

One exp per element and no running maximum. Where s gets large, with a target far below others, the row is read again
relative to its maximum (the test is a scalar, so a whole program takes the branch): s may overflow, and z - k + l would lose
all its digits where k is a mask's -1e9.
"""

import triton
import triton.language as tl

from .math import LOG2E, log1p, one_minus_exp, tanh

LARGEST_SUM: tl.constexpr = tl.constexpr(1e36)  # of s: times an x of a hundred it is still finite
UNLIKELY_LOGP: tl.constexpr = tl.constexpr(-64.0)  # of l


@triton.jit
def read_logits(ptr, at, mask, scale, softcap, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """z at offsets `at`, float32, -inf where masked out, and the slope of the soft cap there."""
    z = tl.load(ptr + at, mask=mask, other=-float("inf")).to(tl.float32)
    slope = 1.0
    if SCALE:
        z = tl.where(mask, z * scale, -float("inf"))
    if SOFTCAP:
        bent, slope = tanh(z / softcap)
        z = tl.where(mask, softcap * bent, -float("inf"))
    return z, slope


# A row's result must not depend on the batch. For a single token Triton would make T a constant and the row's offset 0; the
# loads would be wider, and the sums in another order.
as_one_of_many = triton.jit(do_not_specialize=["T"])


@triton.jit
def is_ignored(label, ignore_index):
    if ignore_index is None:  # every label counts
        ignored = label != label
    else:
        ignored = label == ignore_index
    return ignored


@triton.jit
def span_sums(
    row_ptr,
    label,
    k,
    start,
    stop,
    scale,
    softcap,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STATS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums over columns start:stop of a row, the target left out.

    -> sum of exp(z - shift), sum of exp(z - shift) (z - shift), largest z - k, and the shift: k or what lies far above it.
    """
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    above = tl.full([BLOCK], -float("inf"), tl.float32)
    for v in range(start, stop, BLOCK):
        cols = v + tl.arange(0, BLOCK)
        x, _slope = read_logits(row_ptr, cols, cols < stop, scale, softcap, SCALE, SOFTCAP)
        x -= k
        if (label >= v) & (label < v + BLOCK):  # only one block holds the label: the others need no comparison per element
            x = tl.where(cols == label, -float("inf"), x)
        e = tl.exp2(x * LOG2E)
        total += e
        if STATS:
            weighted += tl.where(e > 0, e * x, 0.0)
            above = tl.maximum(above, x)
    shift = k
    sum_e = tl.sum(total)
    sum_ex = tl.sum(weighted)
    top = tl.max(above)
    if not (sum_e < LARGEST_SUM):  # a target far below others or at -inf, or NaN: relative to the largest logit instead
        best = tl.full([BLOCK], -float("inf"), tl.float32)
        for v in range(start, stop, BLOCK):
            cols = v + tl.arange(0, BLOCK)
            x, _slope = read_logits(row_ptr, cols, cols < stop, scale, softcap, SCALE, SOFTCAP)
            best = tl.maximum(best, tl.where(cols == label, -float("inf"), x))
        peak = tl.max(best)
        shift = tl.where(peak == -float("inf"), 0.0, peak)
        total = tl.zeros([BLOCK], tl.float32)
        weighted = tl.zeros([BLOCK], tl.float32)
        for v in range(start, stop, BLOCK):
            cols = v + tl.arange(0, BLOCK)
            x, _slope = read_logits(row_ptr, cols, cols < stop, scale, softcap, SCALE, SOFTCAP)
            x = tl.where(cols == label, -float("inf"), x - shift)
            e = tl.exp2(x * LOG2E)
            total += e
            if STATS:
                weighted += tl.where(e > 0, e * x, 0.0)
        sum_e = tl.sum(total)
        sum_ex = tl.sum(weighted)
    return sum_e, sum_ex, top, shift


@as_one_of_many
def token_logps_forward(
    logits_ptr,  # [S, T, V], strides in elements, unit stride on V
    labels_ptr,  # [S, T]
    logps_ptr,  # [S * T] float32
    entropy_ptr,  # [S * T] float32, with STATS
    top1_ptr,  # [S * T] float32, with STATS
    partial_ptr,  # [S * T, 5, SPLITS] float32, with SPLITS > 1
    T,
    V,
    stride_s,
    stride_t,
    labels_stride_s,
    labels_stride_t,
    ignore_index,
    scale,
    softcap,
    own,  # parts of a row that a program takes
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STATS: tl.constexpr,
    SPLITS: tl.constexpr,  # parts of a row; above 1 their sums are left for merge_splits, whichever program computes them
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    s, t = row // T, row % T
    label = tl.load(labels_ptr + s * labels_stride_s + t * labels_stride_t).to(tl.int64)
    row_ptr = logits_ptr + s * stride_s + t * stride_t
    if is_ignored(label, ignore_index):
        if SPLITS == 1:
            store_ignored(logps_ptr, entropy_ptr, top1_ptr, row, STATS)
        return
    valid = (label >= 0) & (label < V)
    k, _ = read_logits(row_ptr, label, valid, scale, softcap, SCALE, SOFTCAP)  # -inf for a label out of range
    k = tl.where(k == float("inf"), float("nan"), k)  # as infinity minus infinity: not a certain token
    if SPLITS == 1:
        sum_e, sum_ex, top, shift = span_sums(row_ptr, label, k, 0, V, scale, softcap, SCALE, SOFTCAP, STATS, BLOCK)
        store_row(logps_ptr, entropy_ptr, top1_ptr, row, valid, k, shift, sum_e, sum_ex, top, STATS)
    else:
        span = tl.cdiv(tl.cdiv(V, SPLITS), BLOCK) * BLOCK
        first = tl.program_id(1) * own
        for split in range(first, tl.minimum(first + own, SPLITS)):
            start = split * span
            stop = tl.minimum(start + span, V)
            sum_e, sum_ex, top, shift = span_sums(row_ptr, label, k, start, stop, scale, softcap, SCALE, SOFTCAP, STATS, BLOCK)
            at = partial_ptr + row * 5 * SPLITS + split
            tl.store(at, sum_e)
            tl.store(at + SPLITS, shift)
            tl.store(at + 2 * SPLITS, k)
            if STATS:
                tl.store(at + 3 * SPLITS, sum_ex)
                tl.store(at + 4 * SPLITS, top)


@triton.jit
def store_ignored(logps_ptr, entropy_ptr, top1_ptr, row, STATS: tl.constexpr):
    tl.store(logps_ptr + row, 0.0)
    if STATS:
        tl.store(entropy_ptr + row, 0.0)
        tl.store(top1_ptr + row, 0.0)


@triton.jit
def store_row(logps_ptr, entropy_ptr, top1_ptr, row, valid, k, shift, sum_e, sum_ex, top, STATS: tl.constexpr):
    """From sums relative to `shift`, the target k or what lies far above it, to the row's results."""
    up = shift - k
    at_target = tl.where(k == -float("inf"), 0.0, tl.exp2(-up * LOG2E))  # the target's own exp on that scale
    whole = sum_e + at_target
    l = tl.where(up == 0.0, -log1p(sum_e), -up - tl.log(whole))
    l = tl.where(k == -float("inf"), tl.where(sum_e >= 0, -float("inf"), sum_e), l)
    nan = float("nan")
    tl.store(logps_ptr + row, tl.where(valid, l, nan))
    if STATS:
        mean = (sum_ex + tl.where(at_target > 0, -up * at_target, 0.0)) / whole
        tl.store(entropy_ptr + row, tl.where(valid, tl.log(whole) - mean, nan))
        tl.store(top1_ptr + row, tl.where(valid, tl.where(top <= 0, 1.0, 0.0), nan))


@as_one_of_many
def merge_splits(
    labels_ptr,
    logps_ptr,
    entropy_ptr,
    top1_ptr,
    partial_ptr,
    T,
    V,
    labels_stride_s,
    labels_stride_t,
    ignore_index,
    STATS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Adds the partial sums of a row in a fixed order."""
    row = tl.program_id(0).to(tl.int64)
    part = partial_ptr + row * 5 * SPLITS
    at = part + tl.arange(0, SPLITS)
    sums = tl.load(at)  # also of ignored rows: so the loads need not wait for the label
    shifts = tl.load(at + SPLITS)
    k = tl.load(part + 2 * SPLITS)
    s, t = row // T, row % T
    label = tl.load(labels_ptr + s * labels_stride_s + t * labels_stride_t).to(tl.int64)
    if is_ignored(label, ignore_index):
        store_ignored(logps_ptr, entropy_ptr, top1_ptr, row, STATS)
        return
    valid = (label >= 0) & (label < V)
    shifts = tl.where(sums == 0.0, -float("inf"), shifts)  # an empty part sets none
    shift = tl.maximum(tl.max(shifts), k)
    shift = tl.where(shift == -float("inf"), 0.0, shift)
    factor = tl.exp2((shifts - shift) * LOG2E)
    sum_e = tl.sum(tl.where(sums == 0.0, 0.0, sums * factor))
    sum_ex = 0.0
    top = 0.0
    if STATS:  # x is relative to each part's own shift
        moved = tl.load(at + 3 * SPLITS) + sums * tl.where(sums == 0.0, 0.0, shifts - shift)
        sum_ex = tl.sum(tl.where(sums == 0.0, 0.0, moved * factor))
        top = tl.max(tl.load(at + 4 * SPLITS))
    store_row(logps_ptr, entropy_ptr, top1_ptr, row, valid, k, shift, sum_e, sum_ex, top, STATS)


@triton.jit
def largest_instead(row_ptr, V, scale, softcap, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """-> the largest logit of a row, and its log-prob."""
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    for v in range(0, V, BLOCK):
        cols = v + tl.arange(0, BLOCK)
        z, _slope = read_logits(row_ptr, cols, cols < V, scale, softcap, SCALE, SOFTCAP)
        best = tl.maximum(best, z)
    k = tl.max(best)
    total = tl.zeros([BLOCK], tl.float32)
    for v in range(0, V, BLOCK):
        cols = v + tl.arange(0, BLOCK)
        z, _slope = read_logits(row_ptr, cols, cols < V, scale, softcap, SCALE, SOFTCAP)
        total += tl.exp2((z - k) * LOG2E)
    return k, -tl.log(tl.sum(total))


@as_one_of_many
def token_logps_backward(
    grad_ptr,  # [S, T], any strides
    logits_ptr,
    labels_ptr,
    logps_ptr,  # [S * T] float32
    out_ptr,  # [S, T, V], unit stride on V; may be the logits
    T,
    V,
    grad_stride_s,
    grad_stride_t,
    stride_s,
    stride_t,
    labels_stride_s,
    labels_stride_t,
    out_stride_s,
    out_stride_t,
    ignore_index,
    scale,
    softcap,
    span,  # columns of a program, a multiple of BLOCK, with SHARED
    SHARED: tl.constexpr,  # several programs have a row; a constant, since rows that are not aligned wait for registers
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WHOLE: tl.constexpr,  # the logits are of the whole vocabulary
    BLOCK: tl.constexpr,
):
    """d logits of one row; an ignored row is zeroed without being read, a row whose target is at -inf likewise.

    Programs that share a row read the target's logit, and some all of the row: in place a row has one program, all of whose
    warps have read them before the first of them stores.
    """
    row = tl.program_id(0).to(tl.int64)
    s, t = row // T, row % T
    label = tl.load(labels_ptr + s * labels_stride_s + t * labels_stride_t).to(tl.int64)
    row_ptr = logits_ptr + s * stride_s + t * stride_t
    out_row_ptr = out_ptr + s * out_stride_s + t * out_stride_t
    start = 0
    stop = V
    if SHARED:
        start = tl.program_id(1) * span
        stop = tl.minimum(start + span, V)
    l = tl.load(logps_ptr + row)
    if is_ignored(label, ignore_index) | (l == -float("inf")):
        zero = tl.zeros([BLOCK], tl.float32).to(out_ptr.dtype.element_ty)
        for v in range(start, stop, BLOCK):
            cols = v + tl.arange(0, BLOCK)
            tl.store(out_row_ptr + cols, zero, mask=cols < stop)
        return
    c = tl.load(grad_ptr + s * grad_stride_s + t * grad_stride_t).to(tl.float32)
    k, _ = read_logits(row_ptr, label, (label >= 0) & (label < V), scale, softcap, SCALE, SOFTCAP)
    at_target = c * one_minus_exp(l)
    if WHOLE:  # noqa: SIM102  a constant; the next test is of a value
        if l < UNLIKELY_LOGP:  # then the largest logit is a better k, and l its log-prob
            k, l = largest_instead(row_ptr, V, scale, softcap, SCALE, SOFTCAP, BLOCK)
    if SCALE:
        c *= scale
        at_target *= scale
    tl.debug_barrier()  # every warp reads the target's logit for itself, and in place the loop overwrites it
    for v in range(start, stop, BLOCK):
        cols = v + tl.arange(0, BLOCK)
        z, slope = read_logits(row_ptr, cols, cols < stop, scale, softcap, SCALE, SOFTCAP)
        g = -c * tl.exp2(((z - k) + l) * LOG2E)
        if (label >= v) & (label < v + BLOCK):
            g = tl.where(cols == label, at_target, g)
        if SOFTCAP:
            g *= slope
        tl.store(out_row_ptr + cols, g.to(out_ptr.dtype.element_ty), mask=cols < stop)

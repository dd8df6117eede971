"""Passes over hidden states [tokens, n], a program for each token: each reads once and writes once what it must."""

import triton
import triton.language as tl


@triton.jit
def target_dots(
    x_ptr,  # [tokens, n], any strides
    weight_ptr,  # [vocabulary, n], any strides; rounded to the dtype of x
    bias_ptr,  # [vocabulary], with BIAS
    label_ptr,  # [tokens] int64; outside of the vocabulary: 0 comes out
    out_ptr,  # [tokens] float32
    vocabulary,
    n,
    stride_xt,
    stride_xn,
    stride_wv,
    stride_wn,
    stride_bias,
    BIAS: tl.constexpr,
    N: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    y = tl.load(label_ptr + t)
    here = (y >= 0) & (y < vocabulary)
    y = tl.where(here, y, 0)
    total = tl.zeros([N], tl.float32)
    for c0 in range(0, n, N):
        c = (c0 + tl.arange(0, N)).to(tl.int64)  # of a transposed head columns are the vocabulary apart
        x = tl.load(x_ptr + t * stride_xt + c * stride_xn, mask=c < n, other=0.0)
        w = tl.load(weight_ptr + y * stride_wv + c * stride_wn, mask=c < n, other=0.0).to(x.dtype)
        total += x.to(tl.float32) * w.to(tl.float32)
    dot = tl.sum(total, 0)
    if BIAS:
        dot += tl.load(bias_ptr + y * stride_bias).to(tl.float32)
    tl.store(out_ptr + t, tl.where(here, dot, 0.0))


@triton.jit
def scale_rows(
    x_ptr,  # [tokens, n], any strides
    factor_ptr,  # [tokens], any stride
    value_ptr,  # [tokens] float32, with TARGETS: times the weight of the target, added to the row
    weight_ptr,  # [vocabulary, n], any strides
    label_ptr,  # [tokens] int64; outside of the vocabulary: nothing is added
    out_ptr,  # [tokens, n], unit stride on n; may be x
    vocabulary,
    n,
    stride_xt,
    stride_xn,
    stride_factor,
    stride_wv,
    stride_wn,
    stride_out,
    TARGETS: tl.constexpr,
    N: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_ptr + t * stride_factor).to(tl.float32)
    if TARGETS:
        y = tl.load(label_ptr + t)
        here = (y >= 0) & (y < vocabulary)
        y = tl.where(here, y, 0)
        value = tl.where(here, tl.load(value_ptr + t), 0.0)
    for c0 in range(0, n, N):
        c = (c0 + tl.arange(0, N)).to(tl.int64)  # of a transposed head columns are the vocabulary apart
        x = tl.load(x_ptr + t * stride_xt + c * stride_xn, mask=c < n, other=0.0).to(tl.float32)
        if TARGETS:
            x += value * tl.load(weight_ptr + y * stride_wv + c * stride_wn, mask=c < n, other=0.0).to(tl.float32)
        tl.store(out_ptr + t * stride_out + c, (x * factor).to(out_ptr.dtype.element_ty), mask=c < n)

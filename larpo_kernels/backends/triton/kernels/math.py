"""Scalar functions that keep float32's relative accuracy where the plain formula loses it. All built on exp2 and log."""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x):
    """-> tanh(x) and its derivative, both by exp of a negative number: no overflow, no 1 - t^2 near saturation."""
    e = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    t = (1 - e) / (1 + e)
    return tl.where(x < 0, -t, t), 4 * e / ((1 + e) * (1 + e))


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0 with float32 relative accuracy near 0 (Kahan's correction of the rounded 1 + x)."""
    u = 1 + x
    d = u - 1
    return tl.where(d == 0, x, tl.where(u == float("inf"), u, tl.log(u) * (x / tl.where(d == 0, 1, d))))


@triton.jit
def one_minus_exp(l):
    """1 - exp(l) for l <= 0 with float32 relative accuracy near 0."""
    series = -l * (1 + l * (0.5 + l * (1 / 6 + l * (1 / 24 + l * (1 / 120)))))
    return tl.where(l > -0.125, series, 1 - tl.exp2(l * LOG2E))


@triton.jit
def logistic(x):
    """-> softplus(x) = log(1 + exp(x)), sigmoid(x) and sigmoid(-x), at any x, by one exp of a negative number."""
    e = tl.exp2(tl.abs(x) * (-LOG2E))
    large = 1.0 / (1 + e)
    small = e * large
    return tl.maximum(x, 0.0) + log1p(e), tl.where(x < 0, small, large), tl.where(x < 0, large, small)

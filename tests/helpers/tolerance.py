"""The tolerance rule: as close to float64 as eager PyTorch in the same dtype, plus a few rounding errors."""

import torch

FLOAT32_ROUNDING = 2.0**-23


def gradient_eps(logps):
    """`eps` for gradients formed as exp(... + logp): a float32 logp of -150 is known to 1e-5."""
    finite = logps[logps.isfinite()]
    return max([16.0, *finite.detach().abs().flatten().tolist()]) * FLOAT32_ROUNDING


def rms(error):
    return error.square().mean().sqrt()


def assert_no_worse_than_eager(ours, eager_same_dtype, float64_truth, eps=16 * FLOAT32_ROUNDING):
    """Largest and rms error of `ours` against float64 are at most eager's + eps * the largest true value.

    All three have one shape. Infinities of the truth must be met exactly; a NaN anywhere in `ours` fails.
    """
    truth = float64_truth.detach().double().cpu()
    ours, eager = ours.detach().double().cpu(), eager_same_dtype.detach().double().cpu()
    assert ours.shape == eager.shape == truth.shape, (ours.shape, eager.shape, truth.shape)
    finite = truth.isfinite()
    assert torch.equal(ours[~finite], truth[~finite]), f"not finite in float64: {truth[~finite]}, ours {ours[~finite]}"
    ours, eager, truth = ours[finite], eager[finite], truth[finite]
    if truth.numel() == 0:
        return
    assert ours.isfinite().all(), f"finite in float64, not in ours: {ours}"
    slack = eps * truth.abs().max()
    for name, size in {"largest": lambda error: error.abs().max(), "rms": rms}.items():
        our_error, eager_error = size(ours - truth), size(eager - truth)
        assert our_error <= eager_error + slack, (
            f"{name} error {our_error:.3e} against float64; eager's is {eager_error:.3e}, slack {slack:.3e}"
        )

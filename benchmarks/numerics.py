"""Error of bf16 log-likelihoods and gradients by logit regime and by answer length: the plot of docs/numerics.md.

python benchmarks/numerics.py            # a minute or two on 2 cores; writes docs/numerics.png and prints the numbers
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import larpo_kernels as lk
from larpo_kernels.linear import dtypes

DOCS = Path(__file__).resolve().parents[1] / "docs"
TOKENS, HIDDEN, VOCAB = 512, 128, 4096
STDS = (1, 2, 4, 8, 16, 32)
LENGTHS = (8, 32, 128, 512)


def eager(hidden, weight, labels):
    return lk.reference.linear_token_logps(hidden, weight, labels)


def target_dot(hidden, weight, labels):
    """Target logit by a float32 dot, log-sum-exp of bf16 logits: two roundings that do not match."""
    z = (hidden.float() * weight.float()[labels]).sum(-1)
    return z - (hidden @ weight.t()).float().logsumexp(-1)


def ours(native):
    def run(hidden, weight, labels):
        dtypes.native_bf16, kept = (lambda *_: native), dtypes.native_bf16
        try:
            return lk.linear_token_logps(hidden, weight, labels, schedule="recompute")
        finally:
            dtypes.native_bf16 = kept

    return run


METHODS = {
    "eager (bf16 logits)": eager,
    "float32 target dot, bf16 logsumexp": target_dot,
    "larpo_kernels, bf16 tiles (GPU, AMX, AVX512-BF16)": ours(True),
    "larpo_kernels, float32 tiles (other CPUs)": ours(False),
}


def case(std, on_policy, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16()
    weight = (torch.randn(VOCAB, HIDDEN, generator=generator) * std / HIDDEN**0.5).bfloat16()
    p = (hidden.float() @ weight.float().t()).softmax(-1)
    labels = (p if on_policy else torch.ones_like(p)).multinomial(1, generator=generator)[:, 0]
    return hidden, weight, labels


def rms(x):
    return float(x.double().square().mean().sqrt())


def errors(method, hidden, weight, labels):
    """-> rms error of token log-probs in nats, relative error of d hidden, and the token errors themselves."""
    c = torch.randn(8, generator=torch.Generator().manual_seed(1)).repeat_interleave(TOKENS // 8)
    exact = hidden.double().requires_grad_()
    truth = lk.reference.linear_token_logps(exact, weight.double(), labels)
    truth.backward(c.double())
    given = hidden.clone().requires_grad_()
    logps = method(given, weight, labels)
    logps.backward(c)
    error = (logps.double() - truth).detach()
    return rms(error), rms(given.grad.double() - exact.grad) / rms(exact.grad), error


def by_regime():
    rows = []
    for on_policy in (True, False):
        for std in STDS:
            inputs = case(std, on_policy)
            for name, method in METHODS.items():
                logp, grad, _ = errors(method, *inputs)
                rows.append((on_policy, std, name, logp, grad))
                labels = "sampled" if on_policy else "random"
                print(f"{labels:8s} std {std:3d}  {name:52s} logp {logp:.1e}  d hidden {grad:.1e}")
    return rows


def by_length(std=8):
    """rms error of the log-likelihood of an answer of n tokens, labels sampled from the model."""
    rows = []
    for name, method in METHODS.items():
        e = torch.cat([errors(method, *case(std, True, seed))[2] for seed in range(4)])
        for n in LENGTHS:
            rows.append((name, n, rms(e.view(-1, n).sum(1))))
            print(f"length {n:5d}  {name:52s} {rows[-1][2]:.1e} nats")
    return rows


def plot(regimes, lengths, path):
    from benchmarks.reporting.plots import plt

    fig, axes = plt.subplots(1, 3, figsize=(13, 4))
    for name in METHODS:
        for ax, on_policy in zip(axes, (True, False), strict=False):
            ax.loglog(STDS, [r[3] for r in regimes if r[0] == on_policy and r[2] == name], "o-", label=name)
        axes[2].loglog(LENGTHS, [r[2] for r in lengths if r[0] == name], "o-", label=name)
    spread, error = "standard deviation of the logits", "rms error of {}, nats"
    axes[0].set(title="labels sampled from the model", xlabel=spread, ylabel=error.format("a token's log-prob"))
    axes[1].set(title="random labels", xlabel=spread)
    axes[2].set(title="sampled answers, std 8", xlabel="tokens", ylabel=error.format("an answer's log-likelihood"))
    for ax in axes:
        ax.grid(alpha=0.3)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncol=2, frameon=False)
    fig.tight_layout(rect=(0, 0.13, 1, 1))
    fig.savefig(path, dpi=110)


if __name__ == "__main__":
    plot(by_regime(), by_length(), DOCS / "numerics.png")

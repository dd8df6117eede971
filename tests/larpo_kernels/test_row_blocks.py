"""Rows of logits on a CPU: whatever a mask leaves is computed in the same few calls, to the same bits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import larpo_kernels as lk
from larpo_kernels.backends.pytorch import rows

IGNORE = -100


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def problem(S, T, V, mask, seed=0):
    draw = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(S, T + 1, V, generator=draw)
    labels = torch.randint(V, (S, T), generator=draw)
    if mask == "every other":
        labels[:, 1::2] = IGNORE
    elif mask == "prompts":
        labels[:, : T // 2] = IGNORE
    elif mask == "random":
        labels[torch.rand(S, T, generator=draw) < 0.5] = IGNORE
    return logits, labels


def both(logits, labels):
    """logps and d logits of the rows that count."""
    logits = logits.detach().requires_grad_()
    out = lk.token_logps(logits, labels, backend="torch")
    upstream = torch.linspace(-1, 2, labels.numel()).view(labels.shape)
    (out * upstream).sum().backward()
    return out.detach(), logits.grad


@pytest.mark.parametrize("view", [False, True], ids=["whole", "view"])
@pytest.mark.parametrize("mask", ["none", "every other", "prompts", "random"])
@pytest.mark.parametrize("gathered", [0, 1 << 30], ids=["runs copied", "rows gathered"])
@pytest.mark.parametrize("scratch", [3 * 7 * 4, 1 << 20], ids=["small blocks", "one block"])
def test_any_mask_gives_the_bits_of_the_same_tokens_packed(mask, view, gathered, scratch, monkeypatch):
    monkeypatch.setattr(rows, "GATHERED_ROW_BYTES", gathered)
    monkeypatch.setattr(rows, "SCRATCH_BYTES", scratch)
    logits, labels = problem(5, 6, 7, mask)
    logits = logits[:, :-1] if view else logits[:, :-1].contiguous()
    keep = labels != IGNORE
    found, grad = both(logits, labels)
    upstream = torch.linspace(-1, 2, labels.numel()).view(labels.shape)[keep]
    packed = logits[keep].detach().requires_grad_()
    alone = lk.token_logps(packed, labels[keep], backend="torch")
    (alone * upstream).sum().backward()
    assert torch.equal(found[keep], alone.detach()) and torch.equal(found[~keep], torch.zeros_like(found[~keep]))
    assert torch.equal(grad[keep], packed.grad) and torch.equal(grad[~keep], torch.zeros_like(grad[~keep]))


@pytest.mark.parametrize("view", [False, True], ids=["whole", "view"])
def test_the_number_of_calls_does_not_follow_the_runs_of_a_mask(view):
    counts = []
    for S, mask in ((4, "none"), (256, "none"), (256, "every other"), (256, "random")):
        logits, labels = problem(S, 6, 7, mask)
        with Calls() as calls:
            both(logits[:, :-1] if view else logits[:, :-1].contiguous(), labels)
        counts.append(calls.count)
    assert max(counts) <= min(counts) + 10

"""The calls that are tuned, timed and profiled: ops on random inputs, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import larpo_kernels as lk
from benchmarks.core.problem import SCHEDULES, WANTED
from benchmarks.gpu import device


def of_rows(n: int, v: int, dtype: torch.dtype) -> tuple[Tensor, dict[str, Callable]]:
    """Random logits [n, v], and `token_logps` of them forward and backward."""
    logits = torch.empty(n, v, dtype=dtype, device=device.name()).normal_().requires_grad_()
    labels, upstream = torch.randint(v, (n,), device=device.name()), torch.randn(n, device=device.name())
    logps, values = lk.token_logps(logits, labels), logits.detach()
    return values, {
        "forward": lambda: lk.token_logps(values, labels),
        "backward": lambda: torch.autograd.grad(logps, logits, upstream, retain_graph=True),
    }


def head_inputs(n: int, h: int, v: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, labels, and the gradient of each token's log-probability."""
    torch.manual_seed(0)
    hidden = torch.randn(n, h, device=device.name()).bfloat16()
    weight = (torch.randn(v, h, device=device.name()) / h**0.5).bfloat16()
    return hidden, weight, torch.randint(v, (n,), device=device.name()), torch.randn(n, device=device.name())


def of_head(schedule: str, hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor, ignore_index=None) -> Callable:
    """`linear_token_logps` by a schedule, and the gradients that it is for. By default every label counts: the host need not
    wait for the number of those that do."""
    wanted = WANTED[SCHEDULES[schedule][0]]
    x, w = hidden.detach().requires_grad_("hidden" in wanted), weight.detach().requires_grad_("weight" in wanted)

    def run():
        logps = lk.linear_token_logps(x, w, labels, schedule=schedule, ignore_index=ignore_index)
        return torch.autograd.grad(logps, [t for t in (x, w) if t.requires_grad], upstream) if wanted else logps

    return run

"""What the ops return, by name."""

from __future__ import annotations

from typing import NamedTuple

import torch


class TokenLogps(NamedTuple):
    """Per-token results, each of the labels' shape, 0 where ignored."""

    logps: torch.Tensor  # log p(label), differentiable
    entropy: torch.Tensor  # nats of the whole distribution, no gradient
    top1: torch.Tensor  # 1.0 where no other token has a larger logit than the label, else 0.0; no gradient


class ListwiseLossOutput(NamedTuple):
    """Result of the fused losses. Only `loss` carries gradient."""

    loss: torch.Tensor  # scalar, or [lists] for reduction="none"
    logps: torch.Tensor  # [S] log-likelihood of each candidate (per token if length_normalized)
    scores: torch.Tensor  # [S] beta * (logps - ref_logps), the implicit reward
    entropy: torch.Tensor | None = None  # labels' shape, only with return_stats
    top1: torch.Tensor | None = None  # labels' shape, only with return_stats

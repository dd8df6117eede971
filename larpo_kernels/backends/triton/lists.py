"""Launches of kernels/lists.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels import lists
from .launch import on_device, options

TOKENS = 1024  # token log-probs per step: 4 KB, one load per thread and vector at 4 warps
PAIRS, PAIR_WARPS = (64, 16), 8  # a tile of pairs, four a thread: lists of up to 64 are one row of tiles


def candidate_logps(logps: Tensor, counted: Tensor | None, cu_tokens: Tensor | None) -> tuple[Tensor, Tensor]:
    out, share, _ = _candidates(logps, counted, cu_tokens)
    return out, share


def _candidates(logps, counted, cu_tokens, ref_logps=None, beta=None) -> tuple[Tensor, Tensor, Tensor | None]:
    """-> L [S], dL/dl of each candidate's tokens [S], and with beta the scores [S]."""
    s = logps.shape[0] if cu_tokens is None else cu_tokens.shape[0] - 1
    out, share = logps.new_empty(s), logps.new_empty(s)
    scores = None if beta is None else torch.empty_like(out)
    if s:
        with on_device(logps):
            lists.candidate_logps[(s,)](
                logps.contiguous(), None if counted is None else counted.contiguous().view(torch.int8),
                _contiguous(cu_tokens), _contiguous(ref_logps), out, share, scores,
                logps.numel(), logps.numel() // s, 1.0 if beta is None else beta, TOKENS=TOKENS, **options(logps),
            )  # fmt: skip
    return out, share, scores


def list_stage(
    logps: Tensor,
    counted: Tensor | None,
    cu_tokens: Tensor | None,
    cu_lists: Tensor | None,
    list_size: int,
    relevance: Tensor,
    ref_logps: Tensor | None,
    beta: float,
    objective: str,
    weighting: str,
    k: int,
    temperature: float,
    ties: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    candidates, share, scores = _candidates(logps.float(), counted, cu_tokens, ref_logps, beta)
    s, (i, j) = relevance.shape[0], PAIRS
    num_lists = s // list_size if cu_lists is None else cu_lists.shape[0] - 1
    loss, work = scores.new_empty(num_lists), scores.new_empty(3 * s)
    c = torch.empty_like(scores) if cu_lists is None else torch.zeros_like(scores)  # wrong borders leave some out
    if num_lists:
        with on_device(scores):
            lists.list_losses[(num_lists,)](
                scores, _contiguous(cu_lists), relevance.contiguous(), loss, share, c, work, s, list_size, beta, temperature, k,
                OBJECTIVE=objective, WEIGHTING=weighting, TIES=ties, I=i, J=j, **options(scores, PAIR_WARPS, registers=255),
            )  # fmt: skip
    return loss, candidates, scores, c


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()

"""Launches of kernels/lists.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels import lists
from .launch import on_device, options

TOKENS = 1024  # token log-probs per step: 4 KB, one load per thread and vector at 4 warps
PAIRS, PAIR_WARPS = 16, 8  # a tile of 16 x 16 pairs, one a thread: most lists are one tile


def candidate_logps(logps: Tensor, counted: Tensor | None, cu_tokens: Tensor | None) -> tuple[Tensor, Tensor]:
    cu_tokens = _borders(cu_tokens, logps)
    logps, cu_tokens = logps.contiguous(), cu_tokens.contiguous()
    s = cu_tokens.shape[0] - 1
    out, share = logps.new_empty(s), logps.new_empty(s)
    if s:
        with on_device(logps):
            lists.candidate_logps[(s,)](
                logps, _int8(counted, logps), cu_tokens, out, share, logps.numel(), MEAN=counted is not None, TOKENS=TOKENS,
                **options(logps),
            )  # fmt: skip
    return out, share


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
    if cu_lists is None:
        cu_lists = torch.arange(0, relevance.shape[0] + 1, list_size, device=logps.device)
    if logps.dim() == 2:
        cu_tokens = _borders(cu_tokens, logps)
    logps, cu_lists, relevance = logps.float().contiguous(), cu_lists.contiguous(), relevance.contiguous()
    cu_tokens, ref_logps = (None if x is None else x.contiguous() for x in (cu_tokens, ref_logps))
    num_lists, s = cu_lists.shape[0] - 1, relevance.shape[0]
    loss = logps.new_zeros(num_lists)
    candidates, scores, c = logps.new_zeros(s), logps.new_zeros(s), logps.new_zeros(s)
    work = logps.new_empty(3 * s)
    if num_lists:
        with on_device(logps):
            lists.list_stage[(num_lists,)](
                logps, _int8(counted, logps), cu_lists if cu_tokens is None else cu_tokens, cu_lists, relevance,
                relevance if ref_logps is None else ref_logps, loss, candidates, scores, c, work,
                logps.numel(), s, beta, temperature, k,
                TOKEN_IS_CANDIDATE=cu_tokens is None, MEAN=counted is not None, HAS_REF=ref_logps is not None,
                OBJECTIVE=objective, WEIGHTING=weighting, TIES=ties, TOKENS=TOKENS, M=PAIRS,
                **options(logps, PAIR_WARPS, registers=255),
            )  # fmt: skip
    return loss, candidates, scores, c


def _borders(cu_tokens: Tensor | None, logps: Tensor) -> Tensor:
    if cu_tokens is not None:
        return cu_tokens
    s, t = logps.shape
    return torch.arange(s + 1, device=logps.device) * t


def _int8(counted: Tensor | None, like: Tensor) -> Tensor:
    return like if counted is None else counted.contiguous().view(torch.int8)

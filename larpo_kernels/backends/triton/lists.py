"""Launches of kernels/lists.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import CandidateArguments, ListwiseArguments
from .kernels import lists
from .launch import on_device, options

TOKENS = 1024  # token log-probs per step: 4 KB, one load per thread and vector at 4 warps
PAIRS, PAIR_WARPS = (64, 16), 8  # a tile of pairs, four a thread: lists of up to 64 are one row of tiles


def candidate_logps(call: CandidateArguments) -> tuple[Tensor, Tensor]:
    out, share, _ = _candidates(call)
    return out, share


def _candidates(
    call: CandidateArguments | ListwiseArguments, ref_logps: Tensor | None = None, beta: float | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """-> L [S], dL/dl of each candidate's tokens [S], and with beta the scores [S]."""
    logps, mean_mask, cu_tokens = call.logps.float(), call.mean_mask, call.cu_tokens
    s = logps.shape[0] if cu_tokens is None else cu_tokens.shape[0] - 1
    out, share = logps.new_empty(s), logps.new_empty(s)
    scores = None if beta is None else torch.empty_like(out)
    if s:
        with on_device(logps):
            lists.candidate_logps[(s,)](
                logps.contiguous(),
                None if mean_mask is None else mean_mask.contiguous().view(torch.int8),
                *(_contiguous(cu_tokens), _contiguous(ref_logps), out, share, scores),
                *(logps.numel(), logps.numel() // s, 1.0 if beta is None else beta),
                TOKENS=TOKENS,
                **options(logps),
            )
    return out, share, scores


def scores_and_listwise_loss(call: ListwiseArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    candidates, share, scores = _candidates(call, call.ref_logps, call.beta)
    s, cu_lists = call.relevance.shape[0], call.cu_lists
    num_lists = s // call.list_size if cu_lists is None else cu_lists.shape[0] - 1
    loss, work = scores.new_empty(num_lists), scores.new_empty(3 * s)
    c = torch.empty_like(scores) if cu_lists is None else torch.zeros_like(scores)  # wrong borders leave some out
    if num_lists:
        with on_device(scores):
            lists.list_losses[(num_lists,)](
                *(scores, _contiguous(cu_lists), call.relevance.contiguous(), loss, share, c, work, s),
                *(call.list_size, call.beta, call.temperature, call.k),
                OBJECTIVE=call.objective,
                WEIGHTING=call.weighting,
                TIES=call.ties,
                I=PAIRS[0],
                J=PAIRS[1],
                **options(scores, PAIR_WARPS, registers=255),
            )
    return loss, candidates, scores, c


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()

"""The same numbers when a head, a list or a candidate is spread over processes.

Three cuts, each exchanging one number per token or per candidate (the head also rows of d hidden):

    vocabulary   every rank owns rows of the head          `linear_sequence_logps`, `fused_linear_listwise_loss`, ...
    list         every rank runs some of its candidates    `gather_logps`, then `larpo_kernels.listwise_loss`
    candidate    every rank runs some of its tokens        `sum_logps`, then the same

All ranks of the group compute the same loss, and each gets the gradient of that one loss, not of a sum over ranks.

Vocabulary: hidden states, labels and everything on the list side are replicated: the same on every rank of the group. So
is d hidden, whole on every rank; d weight and d bias are those of the rank's own rows. Nothing is left to be summed.

List and candidate: each rank's backward goes through its own candidates or tokens only, so the gradient of a parameter
is the sum over the ranks of the group. DistributedDataParallel and FSDP average over ranks: multiply the loss by the
number of ranks in the group before backward.

Every function here is collective: all ranks of the group call it, in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from . import backends, ops, validation
from .fused_listwise_loss import Lists
from .linear.vocab_shard import VocabShard, process_group
from .logps import LinearTokens, counted
from .objectives import Objective
from .outputs import ListwiseLossOutput

__all__ = [
    "VocabShard",
    "fused_linear_listwise_loss",
    "fused_listwise_loss",
    "gather_logps",
    "linear_sequence_logps",
    "linear_token_logps",
    "sequence_logps",
    "sum_logps",
    "token_logps",
]


# --- a vocabulary over ranks ------------------------------------------------------------------------------------


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    shard: VocabShard | None = None,
    bias: Tensor | None = None,
    schedule: str = "auto",
    memory_budget: int | None = None,
    tail_threshold: float | None = None,
    ignore_index: int | None = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    backend: Literal["torch", "triton"] | None = None,
) -> Tensor:
    """`larpo_kernels.linear_token_logps` where each rank owns some rows of the head.

    Args:
        hidden, labels: replicated; labels are those of the whole vocabulary.
        weight: [V_r, H], the rows that this rank owns, or a DTensor of the whole [V, H] with placement Shard(0).
        shard: which rows those are (`VocabShard.of` or `.even`); None for a DTensor, which says it itself.
        bias: [V_r] or None; a DTensor with Shard(0) if weight is one.
        others: as in `larpo_kernels.linear_token_logps`. The schedule is chosen for this rank's rows.

    Returns:
        As there, the same on every rank. d hidden is summed over the ranks in float32 (frozen_head does so in the
        forward); d weight and d bias are this rank's.
    """
    head = _head(hidden, weight, labels, shard, bias, None, schedule, memory_budget, tail_threshold, ignore_index,
                 logit_scale, softcap, backend, candidates=False)  # fmt: skip
    return head.sharded_logps()


def linear_sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    shard: VocabShard | None = None,
    bias: Tensor | None = None,
    schedule: str = "auto",
    memory_budget: int | None = None,
    tail_threshold: float | None = None,
    cu_seqlens: Tensor | None = None,
    length_normalized: bool = False,
    ignore_index: int | None = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    backend: Literal["torch", "triton"] | None = None,
) -> Tensor:
    """`larpo_kernels.linear_sequence_logps` where each rank owns some rows of the head: [S], the same on every rank.

    Arguments as in `linear_token_logps` here and as there.
    """
    head = _head(hidden, weight, labels, shard, bias, cu_seqlens, schedule, memory_budget, tail_threshold, ignore_index,
                 logit_scale, softcap, backend)  # fmt: skip
    return _candidates(head.sharded_logps(), head.tokens, ignore_index, length_normalized, head.backend)


def fused_linear_listwise_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    relevance: Tensor,
    *,
    list_sizes: int | Sequence[int] | Tensor,
    shard: VocabShard | None = None,
    bias: Tensor | None = None,
    schedule: str = "auto",
    memory_budget: int | None = None,
    tail_threshold: float | None = None,
    cu_seqlens: Tensor | None = None,
    objective: str | Objective = "contrastive",
    ref_logps: Tensor | None = None,
    beta: float = 0.1,
    length_normalized: bool = False,
    ignore_index: int | None = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    backend: Literal["torch", "triton"] | None = None,
) -> ListwiseLossOutput:
    """`larpo_kernels.fused_linear_listwise_loss` where each rank owns some rows of the head.

    Arguments as in `linear_token_logps` here and as there; relevance and ref_logps are replicated. The output is the
    same on every rank.
    """
    head = _head(hidden, weight, labels, shard, bias, cu_seqlens, schedule, memory_budget, tail_threshold, ignore_index,
                 logit_scale, softcap, backend)  # fmt: skip
    lists = Lists(head.tokens, relevance, list_sizes, ref_logps, objective, beta, reduction)
    return _loss(lists, head.sharded_logps(), head.tokens, ignore_index, length_normalized, head.backend)


def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    shard: VocabShard,
    ignore_index: int | None = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    backend: Literal["torch", "triton"] | None = None,
) -> Tensor:
    """`larpo_kernels.token_logps` of logits whose vocabulary axis is cut over ranks.

    Args:
        logits: [S, T, V_r] or [N, V_r], the columns that `shard` describes.
        labels: [S, T] or [N], replicated, of the whole vocabulary.
        others: as in `larpo_kernels.token_logps`.

    Returns:
        As there, the same on every rank; the gradient is that of this rank's logits. Beside the reads of one device the
        forward looks for each token's largest logit. The linear functions are leaner where the hidden states are at hand.
    """
    tokens = _logits(logits, labels, shard, None, ignore_index, logit_scale, softcap, candidates=False)
    return _token_logps(tokens, shard, ignore_index, logit_scale, softcap, backends.pick(backend, logits))


def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    shard: VocabShard,
    cu_seqlens: Tensor | None = None,
    length_normalized: bool = False,
    ignore_index: int | None = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    backend: Literal["torch", "triton"] | None = None,
) -> Tensor:
    """`larpo_kernels.sequence_logps` of logits whose vocabulary axis is cut over ranks: [S]; see `token_logps` here."""
    tokens = _logits(logits, labels, shard, cu_seqlens, ignore_index, logit_scale, softcap)
    backend = backends.pick(backend, logits)
    logps = _token_logps(tokens, shard, ignore_index, logit_scale, softcap, backend)
    return _candidates(logps, tokens, ignore_index, length_normalized, backend)


def fused_listwise_loss(
    logits: Tensor,
    labels: Tensor,
    relevance: Tensor,
    *,
    list_sizes: int | Sequence[int] | Tensor,
    shard: VocabShard,
    cu_seqlens: Tensor | None = None,
    objective: str | Objective = "contrastive",
    ref_logps: Tensor | None = None,
    beta: float = 0.1,
    length_normalized: bool = False,
    ignore_index: int | None = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    backend: Literal["torch", "triton"] | None = None,
) -> ListwiseLossOutput:
    """`larpo_kernels.fused_listwise_loss` of logits whose vocabulary axis is cut over ranks; see `token_logps` here."""
    tokens = _logits(logits, labels, shard, cu_seqlens, ignore_index, logit_scale, softcap)
    lists = Lists(tokens, relevance, list_sizes, ref_logps, objective, beta, reduction)
    backend = backends.pick(backend, logits)
    logps = _token_logps(tokens, shard, ignore_index, logit_scale, softcap, backend)
    return _loss(lists, logps, tokens, ignore_index, length_normalized, backend)


def _head(hidden, weight, labels, shard, bias, *options, candidates=True) -> LinearTokens:
    weight, bias, shard = _own_rows(weight, bias, shard)
    if isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[0] != shard.rows:
        raise ValueError(f"weight must be [{shard.rows}, H], the rows of its shard, got shape {validation.shape(weight)}")
    return LinearTokens(hidden, weight, labels, bias, *options, candidates=candidates, shard=shard)


def _own_rows(weight, bias, shard) -> tuple[Tensor, Tensor | None, VocabShard]:
    if not hasattr(weight, "device_mesh"):
        if not isinstance(shard, VocabShard):
            raise TypeError(f"shard must be a VocabShard (its rows of the vocabulary), got {type(shard).__name__}")
        return weight, bias, shard
    if shard is not None:
        raise ValueError("shard is given, but weight is a DTensor, which knows its shard: leave shard out")
    mesh = weight.device_mesh
    for name, x in (("weight", weight), ("bias", bias)):
        placements = None if x is None else getattr(x, "placements", "none")
        if x is not None and (mesh.ndim != 1 or placements == "none" or not x.placements[0].is_shard(0)):
            raise ValueError(f"{name} must be a DTensor with placements (Shard(0),) on a mesh of one axis, got {placements}")
    shard = VocabShard.even(weight.shape[0], mesh.get_group())
    return weight.to_local(), None if bias is None else bias.to_local(), shard


def _logits(logits, labels, shard, cu_seqlens, ignore_index, logit_scale, softcap, candidates=True) -> validation.Tokens:
    if not isinstance(shard, VocabShard):
        raise TypeError(f"shard must be a VocabShard (its rows of the vocabulary), got {type(shard).__name__}")
    tokens = validation.tokens(
        logits, labels, cu_seqlens, name="logits", vocab_size=shard.size, ignore_index=ignore_index, need_candidates=candidates
    )
    if logits.shape[-1] != shard.rows:
        raise ValueError(f"logits must have {shard.rows} columns, those of its shard, got shape {validation.shape(logits)}")
    validation.check_options(logit_scale=logit_scale, softcap=softcap)
    return tokens


def _token_logps(tokens, shard, ignore_index, logit_scale, softcap, backend) -> Tensor:
    logps = ops.sharded_token_logps(
        tokens.values,
        shard.local_labels(tokens.labels, ignore_index),
        logit_scale=logit_scale,
        softcap=softcap,
        group=shard.name,
        backend=backend,
    )
    return shard.nan_where_out_of_range(logps, tokens.labels, ignore_index)


def _candidates(logps, tokens, ignore_index, length_normalized, backend) -> Tensor:
    op, args = ops.candidate_step(counted(tokens.labels, ignore_index, length_normalized), tokens.cu_tokens, backend)
    return ops.run(op, (logps, *args))[0]


def _loss(lists, logps, tokens, ignore_index, length_normalized, backend) -> ListwiseLossOutput:
    op, args = lists.step(counted(tokens.labels, ignore_index, length_normalized), backend)
    return ListwiseLossOutput(*ops.run(op, (logps, *args)))


# --- a list, or a candidate, over ranks -------------------------------------------------------------------------


def gather_logps(logps: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """One number per candidate, from all ranks in rank order: [S_0 + S_1 + ...]; differentiable.

    logps: [S_r], any floating dtype, as many as this rank has (0 too). The same call gathers relevance and ref_logps.

    Each rank computes the loss of whole lists from the gathered numbers; backward hands a rank its own slice of the
    gradient, without communication. Gradients of parameters are then to be summed over the group (see this module's
    docstring for DDP).

    >>> # rank 0 ran 3 candidates of a prompt, rank 1 the other 5
    >>> scores = beta * (gather_logps(logps) - gather_logps(ref_logps))                                # doctest: +SKIP
    >>> loss = listwise_loss(scores, gather_logps(relevance), list_sizes=8)                            # doctest: +SKIP
    >>> (loss * torch.distributed.get_world_size()).backward()  # under DDP, which averages            # doctest: +SKIP
    """
    validation.check_floats("logps", logps, (1,), "[S], one per candidate")
    return _Gather.apply(logps, process_group(group))


def sum_logps(logps: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sums over ranks of one number per candidate, [S] on each: a candidate whose tokens lie on several ranks.

    logps: each rank's sums over its own tokens (`sequence_logps` of them), 0 for a candidate without tokens here. Means
    over tokens are sums of logps over sums of counts. Backward hands each rank the gradient of the sum; see
    `gather_logps` for what that means under DDP.
    """
    validation.check_floats("logps", logps, (1,), "[S], one per candidate")
    return _Sum.apply(logps, process_group(group))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ranks = dist.get_world_size(group)
        counts = [x.new_empty(1, dtype=torch.int64) for _ in range(ranks)]
        dist.all_gather(counts, torch.tensor([x.shape[0]], device=x.device), group=group)
        counts = torch.cat(counts).tolist()
        padded = x.new_zeros(max(counts))  # collectives want one shape
        padded[: x.shape[0]] = x
        parts = [torch.empty_like(padded) for _ in range(ranks)]
        dist.all_gather(parts, padded, group=group)
        start = sum(counts[: dist.get_rank(group)])
        ctx.own = slice(start, start + x.shape[0])
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.own], None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):
        return grad, None

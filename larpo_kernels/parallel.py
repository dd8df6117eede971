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
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

from . import logps as single
from . import validation
from .fused_listwise_loss import fused_linear_listwise_loss as single_linear_loss
from .fused_listwise_loss import fused_listwise_loss as single_loss
from .linear.vocab_shard import Sharded, VocabShard, process_group
from .objectives import Objective
from .outputs import ListwiseLossOutput

if TYPE_CHECKING:
    from typing_extensions import Unpack

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


class LogitOptions(TypedDict, total=False):
    """Options as in `larpo_kernels.token_logps`."""

    ignore_index: int | None
    logit_scale: float
    softcap: float | None
    backend: Literal["torch", "triton"] | None


class CandidateOptions(LogitOptions, total=False):
    """Options as in `larpo_kernels.sequence_logps`."""

    cu_seqlens: Tensor | None
    length_normalized: bool


class ListOptions(CandidateOptions, total=False):
    """Options as in `larpo_kernels.fused_listwise_loss`; ref_logps are replicated."""

    objective: str | Objective
    ref_logps: Tensor | None
    beta: float
    reduction: Literal["mean", "sum", "none"]


class ScheduleOptions(TypedDict, total=False):
    """Options as in `larpo_kernels.linear_token_logps`; a schedule is chosen for this rank's rows."""

    schedule: str
    memory_budget: int | None
    tail_threshold: float | None


class HeadOptions(ScheduleOptions, LogitOptions, total=False):
    """Options as in `larpo_kernels.linear_token_logps`."""


class HeadCandidateOptions(ScheduleOptions, CandidateOptions, total=False):
    """Options as in `larpo_kernels.linear_sequence_logps`."""


class HeadListOptions(ScheduleOptions, ListOptions, total=False):
    """Options as in `larpo_kernels.fused_linear_listwise_loss`."""


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    shard: VocabShard | None = None,
    bias: Tensor | None = None,
    **options: Unpack[HeadOptions],
) -> Tensor:
    """`larpo_kernels.linear_token_logps` where each rank owns some rows of the head.

    Args:
        hidden: replicated.
        weight: [V_r, H], the rows that this rank owns, or a DTensor of the whole [V, H] with placement Shard(0).
        labels: replicated, of the whole vocabulary.
        shard: which rows those are (`VocabShard.of` or `.even`); None for a DTensor, which knows its rows.
        bias: [V_r] or None; a DTensor with Shard(0) if weight is one.
        **options: keywords of `larpo_kernels.linear_token_logps` but return_stats; its defaults are the defaults.

    Returns:
        As there, the same on every rank. d hidden is summed over the ranks in float32 (frozen_head does so in the
            forward); d weight and d bias are this rank's.
    """
    weight, bias = _own_rows(weight, bias, shard)
    return single.linear_token_logps(hidden, weight, labels, bias=bias, **options)


def linear_sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    shard: VocabShard | None = None,
    bias: Tensor | None = None,
    **options: Unpack[HeadCandidateOptions],
) -> Tensor:
    """`larpo_kernels.linear_sequence_logps` where each rank owns some rows of the head: [S], the same on every rank.

    Args:
        hidden: replicated.
        weight: this rank's rows, or a DTensor; see `linear_token_logps` here.
        labels: replicated, of the whole vocabulary.
        shard: which rows those are; None for a DTensor.
        bias: this rank's, or a DTensor.
        **options: keywords of `larpo_kernels.linear_sequence_logps`; its defaults are the defaults.
    """
    weight, bias = _own_rows(weight, bias, shard)
    return single.linear_sequence_logps(hidden, weight, labels, bias=bias, **options)


def fused_linear_listwise_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    relevance: Tensor,
    *,
    list_sizes: int | Sequence[int] | Tensor,
    shard: VocabShard | None = None,
    bias: Tensor | None = None,
    **options: Unpack[HeadListOptions],
) -> ListwiseLossOutput:
    """`larpo_kernels.fused_linear_listwise_loss` where each rank owns some rows of the head: the same on every rank.

    Args:
        hidden: replicated.
        weight: this rank's rows, or a DTensor; see `linear_token_logps` here.
        labels: replicated, of the whole vocabulary.
        relevance: replicated.
        list_sizes: candidates per list, replicated.
        shard: which rows those are; None for a DTensor.
        bias: this rank's, or a DTensor.
        **options: keywords of `larpo_kernels.fused_linear_listwise_loss` but return_stats; its defaults are the defaults.
    """
    weight, bias = _own_rows(weight, bias, shard)
    return single_linear_loss(hidden, weight, labels, relevance, list_sizes=list_sizes, bias=bias, **options)


def token_logps(logits: Tensor, labels: Tensor, *, shard: VocabShard, **options: Unpack[LogitOptions]) -> Tensor:
    """`larpo_kernels.token_logps` of logits whose vocabulary axis is cut over ranks.

    Beside the reads of one device the forward looks for each token's largest logit: the linear functions are leaner where
    the hidden states are at hand.

    Args:
        logits: [S, T, V_r] or [N, V_r], the columns that `shard` describes.
        labels: [S, T] or [N], replicated, of the whole vocabulary.
        shard: which columns those are.
        **options: keywords of `larpo_kernels.token_logps` but return_stats and inplace_backward.

    Returns:
        As there, the same on every rank; the gradient is that of this rank's logits.
    """
    return single.token_logps(_own_columns(logits, shard), labels, **options)


def sequence_logps(logits: Tensor, labels: Tensor, *, shard: VocabShard, **options: Unpack[CandidateOptions]) -> Tensor:
    """`larpo_kernels.sequence_logps` of logits whose vocabulary axis is cut over ranks: [S], the same on every rank.

    Args:
        logits: [S, T, V_r] or [N, V_r], the columns that `shard` describes.
        labels: [S, T] or [N], replicated, of the whole vocabulary.
        shard: which columns those are.
        **options: keywords of `larpo_kernels.sequence_logps` but inplace_backward.
    """
    return single.sequence_logps(_own_columns(logits, shard), labels, **options)


def fused_listwise_loss(
    logits: Tensor,
    labels: Tensor,
    relevance: Tensor,
    *,
    list_sizes: int | Sequence[int] | Tensor,
    shard: VocabShard,
    **options: Unpack[ListOptions],
) -> ListwiseLossOutput:
    """`larpo_kernels.fused_listwise_loss` of logits whose vocabulary axis is cut over ranks: the same on every rank.

    Args:
        logits: [S, T, V_r] or [N, V_r], the columns that `shard` describes.
        labels: [S, T] or [N], replicated, of the whole vocabulary.
        relevance: replicated.
        list_sizes: candidates per list, replicated.
        shard: which columns those are.
        **options: keywords of `larpo_kernels.fused_listwise_loss` but return_stats and inplace_backward.
    """
    return single_loss(_own_columns(logits, shard), labels, relevance, list_sizes=list_sizes, **options)


def _own_rows(weight: Any, bias: Any, shard: Any) -> tuple[Sharded, Tensor | None]:
    if not hasattr(weight, "device_mesh"):
        _check_shard(shard)
        if isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[0] != shard.rows:
            raise ValueError(f"weight must be [{shard.rows}, H], the rows of its shard, got shape {validation.shape(weight)}")
        return Sharded(weight, shard), bias
    if shard is not None:
        raise ValueError("shard is given, but weight is a DTensor, which knows its shard: leave shard out")
    mesh = weight.device_mesh
    for name, x in (("weight", weight), ("bias", bias)):
        placements = None if x is None else getattr(x, "placements", "none")
        if x is not None and (mesh.ndim != 1 or placements == "none" or not x.placements[0].is_shard(0)):
            raise ValueError(f"{name} must be a DTensor with placements (Shard(0),) on a mesh of one axis, got {placements}")
    shard = VocabShard.even(weight.shape[0], mesh.get_group())
    return Sharded(weight.to_local(), shard), None if bias is None else bias.to_local()


def _own_columns(logits: Any, shard: Any) -> Sharded:
    _check_shard(shard)
    if isinstance(logits, Tensor) and logits.dim() in (2, 3) and logits.shape[-1] != shard.rows:
        raise ValueError(f"logits must have {shard.rows} columns, those of its shard, got shape {validation.shape(logits)}")
    return Sharded(logits, shard)


def _check_shard(shard: Any) -> None:
    if not isinstance(shard, VocabShard):
        raise TypeError(f"shard must be a VocabShard (its rows of the vocabulary), got {type(shard).__name__}")


# --- a list, or a candidate, over ranks -------------------------------------------------------------------------


def gather_logps(logps: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """One number per candidate, from all ranks in rank order; differentiable. It gathers relevance and ref_logps as well.

    Each rank computes the loss of whole lists from the gathered numbers; backward hands a rank its own slice of the
    gradient, without communication. Gradients of parameters are then to be summed over the group (see this module's
    docstring for DDP).

    Args:
        logps: [S_r], any floating dtype, as many as this rank has (0 too).
        group: None for all processes.

    Returns:
        [S_0 + S_1 + ...], the same on every rank.

    >>> # rank 0 ran 3 candidates of a prompt, rank 1 the other 5
    >>> scores = beta * (gather_logps(logps) - gather_logps(ref_logps))                                # doctest: +SKIP
    >>> loss = listwise_loss(scores, gather_logps(relevance), list_sizes=8)                            # doctest: +SKIP
    >>> (loss * torch.distributed.get_world_size()).backward()  # under DDP, which averages            # doctest: +SKIP
    """
    validation.check_floats("logps", logps, (1,), "[S], one per candidate")
    return _Gather.apply(logps, process_group(group))


def sum_logps(logps: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sums over ranks of one number per candidate, [S] on each: a candidate whose tokens lie on several ranks.

    Means over tokens are sums of logps over sums of counts. Backward hands each rank the gradient of the sum; see
    `gather_logps` for what that means under DDP.

    Args:
        logps: [S], each rank's sums over its own tokens (`sequence_logps` of them), 0 for a candidate without tokens here.
        group: None for all processes.
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

"""Log-likelihoods as ops of their own: per token and per candidate, from logits or from hidden states x weight."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from . import backends, ops, validation
from .linear import schedules
from .linear.vocab_shard import IGNORED
from .outputs import TokenLogps


def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int | None = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_stats: bool = False,
    inplace_backward: bool = False,
    backend: Literal["torch", "triton"] | None = None,
) -> Tensor | TokenLogps:
    """Log-probability of each label: l_t = z[t, y_t] - logsumexp(z[t]), in one read of the logits.

    z = logit_scale * logits, then z = softcap * tanh(z / softcap) if softcap is given. Statistics are float32 whatever
    the dtype of the logits; float64 logits compute in float64.

    Args:
        logits: [S, T, V] or [N, V]; float32, bfloat16, float16 or float64. Any view with unit stride on V is read in
            place (`model_logits[:, :-1]` costs no copy).
        labels: [S, T] or [N], any integer dtype, aligned with the logits (already shifted).
        ignore_index: tokens with this label give 0 and exactly zero gradient; their logits are never read. None: every
            label counts.
        logit_scale, softcap: what a model does to its logits after the head.
        return_stats: also per-token entropy and top-1 hit, from the same read, without gradient.
        inplace_backward: write the gradient over the logits instead of allocating it. The logits are lost then, and
            autograd raises if anything else still needs them. Under torch.compile it has no effect. On a GPU programs
            share a row only where it is not overwritten: below some hundreds of tokens memory is all that it saves.
        backend: "torch", "triton" or None for the best one on this device.

    Returns:
        [S, T] or [N] float32 (float64 for float64 logits), never above 0; with return_stats a `TokenLogps`.
        A target logit of -inf gives -inf and no gradient. On a GPU a label out of range gives NaN.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it should be.

    >>> logits = torch.tensor([[1.0, 1.0, 1.0, 1.0], [9.0, 0.0, 0.0, 0.0]])
    >>> token_logps(logits, torch.tensor([2, -100]))
    tensor([-1.3863,  0.0000])
    """
    tokens = validation.tokens(logits, labels, None, name="logits", ignore_index=ignore_index, need_candidates=False)
    validation.check_options(logit_scale=logit_scale, softcap=softcap)
    step = ops.token_step(
        tokens,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        stats=return_stats,
        inplace_backward=inplace_backward,
        backend=backends.pick(backend, logits),
    )
    out = ops.run(*step)
    return TokenLogps(*out) if return_stats else out[0]


def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    length_normalized: bool = False,
    ignore_index: int | None = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
    backend: Literal["torch", "triton"] | None = None,
) -> Tensor:
    """Log-likelihood of each candidate: L_s = sum of `token_logps` over its tokens. Differentiable, for any loss.

    Args:
        logits, labels: padded [S, T, V] with [S, T], or packed [N, V] with [N] and cu_seqlens.
        cu_seqlens: [S+1] integer borders of the candidates in packed input, from 0 to N, not decreasing.
        length_normalized: the mean over the tokens that count instead of the sum.
        others: as in `token_logps`.

    Returns:
        [S] float32 (float64 for float64 logits); 0 for a candidate without tokens.

    >>> logits = torch.zeros(2, 3, 10)
    >>> labels = torch.tensor([[1, 2, 3], [4, -100, -100]])
    >>> sequence_logps(logits, labels)
    tensor([-6.9078, -2.3026])
    """
    tokens = validation.tokens(logits, labels, cu_seqlens, name="logits", ignore_index=ignore_index)
    validation.check_options(logit_scale=logit_scale, softcap=softcap)
    backend = backends.pick(backend, logits)
    step = ops.token_step(
        tokens,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        inplace_backward=inplace_backward,
        backend=backend,
    )
    mean_over = counted(tokens.labels, ignore_index, length_normalized)
    return ops.run(*step, *ops.candidate_step(mean_over, tokens.cu_tokens, backend))[0]


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    schedule: str = "auto",
    memory_budget: int | None = None,
    tail_threshold: float | None = None,
    ignore_index: int | None = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_stats: bool = False,
    backend: Literal["torch", "triton"] | None = None,
) -> Tensor | TokenLogps:
    """`token_logps` of logits = hidden @ weight^T + bias that never exist: a walk over tiles (see `plan`).

    Ignored tokens (prompt, padding) are dropped before the GEMM. Under torch.compile and while a CUDA graph is
    captured shapes must not depend on labels: there every token is walked, and ignored ones get weight 0. On a GPU
    dropping them waits for the device once, to learn how many count. Tokens that were packed beforehand and
    ignore_index=None avoid both: then every label counts, and one that names no row of the head gives NaN (an error on
    a CPU).

    Args:
        hidden: [S, T, H] or [N, H], what the head is applied to (after the final norm).
        weight: [V, H], the head as `torch.nn.Linear` stores it; tied embeddings work. It may have a wider dtype than
            hidden: tiles of it are cast one at a time. Under autocast tiles are computed in the autocast dtype.
        labels: [S, T] or [N], aligned with hidden (already shifted).
        bias: [V] or None.
        schedule: "auto", "score_only", "frozen_head", "list_hold" or "recompute"; `plan` tells what auto picks and why.
            It looks at free memory: where an op runs a second time (torch.utils.checkpoint), name a schedule or a budget.
            Under torch.compile and while a CUDA graph is captured it looks at neither memory nor budget: with a head that
            is trained it takes recompute.
        memory_budget: bytes that `auto` may use beyond the gradients; by default half of what is free.
        tail_threshold: a probability, such as 2**-12: gradients come from the rows of the vocabulary that some token of a
            block gives more, and the rest merged, which costs a fraction of the GEMMs and of what is held where the model
            is sure of itself (docs/numerics.md has the errors). The log-probs stay exact; None: the gradients too. Where a
            block has too little of a tail, under torch.compile and while a CUDA graph is captured all is exact. On a GPU
            the host waits for the device once a block.
        others: as in `token_logps`.

    Returns:
        As `token_logps`. Gradients come in the dtype of what they belong to, summed up in float32.
    """
    head = LinearTokens(
        hidden, weight, labels, bias, None, schedule, memory_budget, tail_threshold, ignore_index, logit_scale, softcap,
        backend, candidates=False,
    )  # fmt: skip
    out = ops.run(*head.step(return_stats))
    return TokenLogps(*out) if return_stats else out[0]


def linear_sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
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
    """`sequence_logps` straight from hidden states and the head: [S], differentiable in hidden, weight and bias.

    Arguments as in `linear_token_logps` and `sequence_logps`. Under torch.no_grad() it scores (one GEMM), for example
    the reference policy.

    >>> hidden, weight = torch.zeros(2, 3, 8), torch.zeros(10, 8)
    >>> labels = torch.tensor([[1, 2, 3], [4, -100, -100]])
    >>> linear_sequence_logps(hidden, weight, labels)
    tensor([-6.9078, -2.3026])
    """
    head = LinearTokens(
        hidden, weight, labels, bias, cu_seqlens, schedule, memory_budget, tail_threshold, ignore_index, logit_scale, softcap,
        backend,
    )  # fmt: skip
    mean_over = counted(head.tokens.labels, ignore_index, length_normalized)
    return ops.run(*head.step(), *ops.candidate_step(mean_over, head.tokens.cu_tokens, head.backend))[0]


def plan(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    schedule: str = "auto",
    memory_budget: int | None = None,
    tail_threshold: float | None = None,
    ignore_index: int | None = -100,
) -> schedules.Plan:
    """The schedule that the linear ops would take for these tensors, why, and what it costs in GEMMs and bytes.

    With tail_threshold these are the most that it can cost: how many rows of the vocabulary count is known once they are
    formed, and `TailShares` tells it then.

    >>> hidden, weight = torch.randn(64, 32, requires_grad=True), torch.randn(1000, 32)
    >>> print(plan(hidden, weight, torch.zeros(64, dtype=torch.int64)))  # doctest: +ELLIPSIS
    frozen_head: 2 GEMMs, ... MiB extra (only hidden requires grad)
    """
    return LinearTokens(
        hidden, weight, labels, bias, None, schedule, memory_budget, tail_threshold, ignore_index, 1.0, None, None,
        candidates=False,
    ).plan  # fmt: skip


class LinearTokens:
    """The vocabulary side of the linear ops: checked and planned when made, a step for `ops.run` on demand.

    shard: weight and bias are the rows of this `shards.VocabShard`; labels are of the whole vocabulary.
    """

    def __init__(
        self, hidden, weight, labels, bias, cu_seqlens, schedule, memory_budget, tail_threshold, ignore_index, logit_scale,
        softcap, backend, candidates=True, shard=None,
    ):  # fmt: skip
        validation.check_head(hidden, weight, bias)
        self.tokens = validation.tokens(
            hidden, labels, cu_seqlens, name="hidden", vocab_size=weight.shape[0] if shard is None else shard.size,
            ignore_index=ignore_index,
            need_candidates=candidates,
        )  # fmt: skip
        validation.check_options(logit_scale=logit_scale, softcap=softcap)
        if tail_threshold is not None:
            validation.probability("tail_threshold", tail_threshold)
        self.weight, self.bias, self.shard, self.ignore_index = weight, bias, shard, ignore_index
        self.labels, self.keep = self.tokens.labels, self.tokens.keep
        compute = schedules.dtype_of_tiles(hidden, weight, sharded=shard is not None)
        self.backend = backends.pick(backend, hidden, compute)
        self.options = dict(ignore_index=ignore_index, logit_scale=logit_scale, softcap=softcap, backend=self.backend)
        if not self.tokens.checked:
            self.keep = ops.counted_tokens(self.labels, ignore_index)
        if shard is not None:
            self.labels = shard.local_labels(self.labels, ignore_index)
            self.options |= dict(ignore_index=None if ignore_index is None else IGNORED, group=shard.name)
        num_tokens = self.labels.numel() if self.keep is None else self.keep.shape[0]
        self.plan = schedules.plan_for(
            hidden, weight, bias, num_tokens, schedule, memory_budget, tail_threshold, None if shard is None else shard.size,
            one_tile=self.tokens.checked and self.backend == "torch" and shard is None,
        )  # fmt: skip

    def step(self, stats: bool = False) -> ops.Step:
        """logps, entropy, top1 of the labels' shape."""
        return ops.linear_step(
            self.tokens.values, self.weight, self.bias, self.labels, self.keep, self.tokens.checked, self.plan, stats=stats,
            **self.options,
        )  # fmt: skip

    def sharded_logps(self) -> Tensor:
        """What the step gives on each of the ranks that share the vocabulary."""
        logps, _, _ = ops.run(*self.step())
        return self.shard.nan_where_out_of_range(logps, self.tokens.labels, self.ignore_index)


def counted(labels: Tensor, ignore_index: int | None, length_normalized: bool) -> Tensor | None:
    """Which tokens a mean runs over; None for a sum."""
    return validation.counted(labels, ignore_index) if length_normalized else None

"""Log-likelihoods as ops of their own: per token and per candidate, from logits or from hidden states x weight."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .linear.schedules import Plan, Request
from .outputs import TokenLogps
from .vocabulary_side import LinearHeadCall, LogitsCall, LogitTransform


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
        logit_scale: the number that the model multiplies its logits by, after the head.
        softcap: the bound of the model's soft cap, if it has one.
        return_stats: also per-token entropy and top-1 hit, from the same read, without gradient.
        inplace_backward: write the gradient over the logits instead of allocating it. The logits are lost then, and
            autograd raises if anything else still needs them. Under torch.compile it has no effect. On a GPU programs
            share a row only where it is not overwritten: below some hundreds of tokens memory is all that it saves.
        backend: "torch", "triton" or None for the best one on this device.

    Returns:
        [S, T] or [N] float32 (float64 for float64 logits), never above 0; with return_stats a `TokenLogps`.
            A target logit of -inf gives -inf and no gradient. On a GPU a label out of range gives NaN.

    Raises:
        TypeError: an argument has the wrong type or dtype; the message names it.
        ValueError: an argument has the wrong shape or value; the message names it, and says what it should be.

    >>> logits = torch.tensor([[1.0, 1.0, 1.0, 1.0], [9.0, 0.0, 0.0, 0.0]])
    >>> token_logps(logits, torch.tensor([2, -100]))
    tensor([-1.3863,  0.0000])
    """
    transform = LogitTransform(ignore_index, logit_scale, softcap)
    return LogitsCall(logits, labels, None, transform, backend, inplace_backward, candidates=False).token_logps(return_stats)


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
        logits: [S, T, V] padded, or [N, V] packed with cu_seqlens; see `token_logps`.
        labels: [S, T] or [N], any integer dtype, aligned with the logits (already shifted).
        cu_seqlens: [S+1] integer borders of the candidates in packed input, from 0 to N, not decreasing.
        length_normalized: the mean over the tokens that count instead of the sum.
        ignore_index: tokens with this label do not count; None: every label counts.
        logit_scale: the number that the model multiplies its logits by, after the head.
        softcap: the bound of the model's soft cap, if it has one.
        inplace_backward: write the gradient over the logits, which are lost then; see `token_logps`.
        backend: "torch", "triton" or None for the best one on this device.

    Returns:
        [S] float32 (float64 for float64 logits); 0 for a candidate without tokens.

    >>> logits = torch.zeros(2, 3, 10)
    >>> labels = torch.tensor([[1, 2, 3], [4, -100, -100]])
    >>> sequence_logps(logits, labels)
    tensor([-6.9078, -2.3026])
    """
    transform = LogitTransform(ignore_index, logit_scale, softcap)
    return LogitsCall(logits, labels, cu_seqlens, transform, backend, inplace_backward).sequence_logps(length_normalized)


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
        schedule: "auto", "score_only", "frozen_head", "list_hold" or "recompute"; `plan` reports what auto picks, and why.
            It looks at free memory: where an op runs a second time (torch.utils.checkpoint), name a schedule or a budget.
            Under torch.compile and while a CUDA graph is captured it looks at neither memory nor budget: with a head that
            is trained it takes recompute.
        memory_budget: bytes that `auto` may use beyond the gradients; by default half of what is free.
        tail_threshold: a probability, such as 2**-12. Rows of the vocabulary to which no token of a block gives more are
            merged into one when gradients are formed. Where the model is sure of itself that costs a fraction of the GEMMs
            and of the memory (docs/numerics.md has the errors). The log-probs stay exact. With None the gradients are exact
            too, as they are where a block has too little of a tail, under torch.compile and while a CUDA graph is captured.
            On a GPU the host waits for the device once a block.
        ignore_index: tokens with this label give 0 and exactly zero gradient; None: every label counts.
        logit_scale: the number that the model multiplies its logits by, after the head.
        softcap: the bound of the model's soft cap, if it has one.
        return_stats: also per-token entropy and top-1 hit, from the same walk, without gradient.
        backend: "torch", "triton" or None for the best one on this device.

    Returns:
        As `token_logps`. Gradients come in the dtype of what they belong to, summed up in float32.
    """
    transform, asked = LogitTransform(ignore_index, logit_scale, softcap), Request(schedule, memory_budget, tail_threshold)
    head = LinearHeadCall(hidden, weight, labels, bias, None, asked, transform, backend, candidates=False)
    return head.token_logps(return_stats)


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
    """`sequence_logps` straight from hidden states and the head, differentiable in hidden, weight and bias.

    Under torch.no_grad() it scores (one GEMM), for example the reference policy.

    Args:
        hidden: [S, T, H] padded, or [N, H] packed with cu_seqlens; what the head is applied to.
        weight: [V, H], the head as `torch.nn.Linear` stores it.
        labels: [S, T] or [N], aligned with hidden (already shifted).
        bias: [V] or None.
        schedule: what is kept for the backward; see `linear_token_logps` and `plan`.
        memory_budget: bytes that `auto` may use beyond the gradients; by default half of what is free.
        tail_threshold: a probability below which rows are merged in the gradients; see `linear_token_logps`.
        cu_seqlens: [S+1] integer borders of the candidates in packed input, from 0 to N, not decreasing.
        length_normalized: the mean over the tokens that count instead of the sum.
        ignore_index: tokens with this label do not count; None: every label counts.
        logit_scale: the number that the model multiplies its logits by, after the head.
        softcap: the bound of the model's soft cap, if it has one.
        backend: "torch", "triton" or None for the best one on this device.

    Returns:
        [S] float32 (float64 for float64 operands); 0 for a candidate without tokens.

    >>> hidden, weight = torch.zeros(2, 3, 8), torch.zeros(10, 8)
    >>> labels = torch.tensor([[1, 2, 3], [4, -100, -100]])
    >>> linear_sequence_logps(hidden, weight, labels)
    tensor([-6.9078, -2.3026])
    """
    transform, asked = LogitTransform(ignore_index, logit_scale, softcap), Request(schedule, memory_budget, tail_threshold)
    head = LinearHeadCall(hidden, weight, labels, bias, cu_seqlens, asked, transform, backend)
    return head.sequence_logps(length_normalized)


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
) -> Plan:
    """The schedule that the linear ops would take for these tensors, why, and what it costs in GEMMs and bytes.

    With tail_threshold these are upper bounds: how many rows of the vocabulary count is known only after the forward, and
    `TailShares` reports it.

    Args:
        hidden: [S, T, H] or [N, H], requiring grad if the call's will.
        weight: [V, H], requiring grad if the call's will.
        labels: [S, T] or [N]; ignored tokens cost nothing.
        bias: [V] or None.
        schedule: "auto", or the one to be priced.
        memory_budget: bytes that `auto` may use beyond the gradients; by default half of what is free.
        tail_threshold: see `linear_token_logps`.
        ignore_index: label of tokens that do not count; None: every label counts.

    >>> hidden, weight = torch.randn(64, 32, requires_grad=True), torch.randn(1000, 32)
    >>> print(plan(hidden, weight, torch.zeros(64, dtype=torch.int64)))  # doctest: +ELLIPSIS
    frozen_head: 2 GEMMs, ... MiB extra (only hidden requires grad)
    """
    transform, asked = LogitTransform(ignore_index), Request(schedule, memory_budget, tail_threshold)
    return LinearHeadCall(hidden, weight, labels, bias, None, asked, transform, None, candidates=False).plan

"""The headline ops: the listwise ranking loss of a policy over candidate lists, from logits or from hidden x weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from . import ops, validation
from .linear.schedules import Request
from .objectives import Objective, checked_relevance, resolve
from .outputs import ListwiseLossOutput
from .vocabulary_side import LinearHeadCall, LogitsCall, LogitTransform


def fused_listwise_loss(
    logits: Tensor,
    labels: Tensor,
    relevance: Tensor,
    *,
    list_sizes: int | Sequence[int] | Tensor,
    cu_seqlens: Tensor | None = None,
    objective: str | Objective = "contrastive",
    ref_logps: Tensor | None = None,
    beta: float = 0.1,
    length_normalized: bool = False,
    ignore_index: int | None = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    return_stats: bool = False,
    inplace_backward: bool = False,
    backend: Literal["torch", "triton"] | None = None,
) -> ListwiseLossOutput:
    """LarPO's loss from logits: objective(g; relevance) per list with g_s = beta * (L_s - Lref_s), forward and backward.

    One read of the logits forward; one read and one write backward; no float32 copy of them ever exists.

    Args:
        logits: [S, T, V] padded, or [N, V] packed with cu_seqlens. float32, bfloat16, float16 or float64; any view
            with unit stride on V. Left intact unless inplace_backward.
        labels: [S, T] or [N], integer, aligned with the logits (already shifted); ignore_index where not counted
            (prompt, padding).
        relevance: [S] reward of each candidate, higher is better.
        list_sizes: candidates per list: an int m (S = lists * m), or sizes (sequence or int tensor) that sum to S.
        cu_seqlens: [S+1] integer token borders of packed candidates, from 0 to N.
        objective: "pairwise", "contrastive", "listmle", "lambdarank", "listnet", or an objective object.
        ref_logps: [S] log-likelihood of each candidate under the reference policy (see `sequence_logps`); None for a
            reference-free loss. With length_normalized it must be normalised too.
        beta: scale of the implicit reward, > 0.
        length_normalized: L_s is the mean over a candidate's tokens instead of the sum (the paper sums).
        ignore_index: tokens with this label do not count; None: every label counts.
        logit_scale: the number that the model multiplies its logits by, after the head.
        softcap: the bound of the model's soft cap, if it has one.
        reduction: over lists; the terms inside a list are summed.
        return_stats: also per-token entropy and top-1 hit, from the same read, without gradient.
        inplace_backward: write the gradient over the logits, which are lost then; see `token_logps`.
        backend: "torch", "triton" or None for the best one on this device.

    Returns:
        A `ListwiseLossOutput`. Its loss is differentiable in the logits; logps and scores [S] are detached; entropy and top1
            have the labels' shape with return_stats, and are None without.

    Raises:
        TypeError: an argument has the wrong type or dtype; the message names it. Nothing was computed yet.
        ValueError: an argument has the wrong shape or value; the message names it, and says what it should be. On a GPU
            values are not inspected (that would stop the host): there a label out of range, or lists that do not cover the
            candidates, give NaN.

    Source: "LLM Alignment as Retriever Optimization", arXiv 2502.03699, table 1 and algorithm 1.

    >>> _ = torch.manual_seed(0)
    >>> logits = torch.randn(4, 5, 100, requires_grad=True)  # 2 prompts x 2 candidates, 5 tokens each
    >>> labels = torch.randint(100, (4, 5))
    >>> out = fused_listwise_loss(logits, labels, torch.tensor([1.0, 0.0, 0.2, 0.9]), list_sizes=2, objective="listmle")
    >>> out.loss.backward()
    >>> tuple(out.scores.shape), tuple(logits.grad.shape)
    ((4,), (4, 5, 100))
    """
    transform = LogitTransform(ignore_index, logit_scale, softcap)
    call = LogitsCall(logits, labels, cu_seqlens, transform, backend, inplace_backward)
    return _loss_of(call, relevance, list_sizes, ref_logps, objective, beta, reduction, length_normalized, return_stats)


def fused_linear_listwise_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    relevance: Tensor,
    *,
    list_sizes: int | Sequence[int] | Tensor,
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
    return_stats: bool = False,
    backend: Literal["torch", "triton"] | None = None,
) -> ListwiseLossOutput:
    """LarPO's loss straight from hidden states and the head: `fused_listwise_loss` of logits that never exist.

    In bfloat16 it is also closer to float64 than the loss of materialised logits: every token is centred on its target
    before anything is rounded.

    Args:
        hidden: [S, T, H] padded, or [N, H] packed with cu_seqlens; what the head is applied to.
        weight: [V, H], the head as `torch.nn.Linear` stores it.
        labels: [S, T] or [N], integer, aligned with hidden (already shifted); ignore_index where not counted.
        relevance: [S] reward of each candidate, higher is better.
        list_sizes: candidates per list: an int m (S = lists * m), or sizes (sequence or int tensor) that sum to S.
        bias: [V] or None.
        schedule: what is kept for the backward; see `linear_token_logps` and `plan`.
        memory_budget: bytes that schedule "auto" may use beyond the gradients; by default half of what is free.
        tail_threshold: a probability below which rows are merged in the gradients; see `linear_token_logps`.
        cu_seqlens: [S+1] integer token borders of packed candidates, from 0 to N.
        objective: "pairwise", "contrastive", "listmle", "lambdarank", "listnet", or an objective object.
        ref_logps: [S] log-likelihood of each candidate under the reference policy; None for a reference-free loss.
        beta: scale of the implicit reward, > 0.
        length_normalized: L_s is the mean over a candidate's tokens instead of the sum (the paper sums).
        ignore_index: tokens with this label do not count; None: every label counts.
        logit_scale: the number that the model multiplies its logits by, after the head.
        softcap: the bound of the model's soft cap, if it has one.
        reduction: over lists; the terms inside a list are summed.
        return_stats: also per-token entropy and top-1 hit, from the same walk, without gradient.
        backend: "torch", "triton" or None for the best one on this device.

    Returns:
        As `fused_listwise_loss`; loss is differentiable in hidden, weight and bias. What does not require grad costs
            neither a GEMM nor a buffer.

    >>> _ = torch.manual_seed(0)
    >>> hidden, weight = torch.randn(4, 5, 16, requires_grad=True), torch.randn(100, 16, requires_grad=True)
    >>> labels = torch.randint(100, (4, 5))
    >>> out = fused_linear_listwise_loss(hidden, weight, labels, torch.tensor([1.0, 0.0, 0.2, 0.9]), list_sizes=2)
    >>> out.loss.backward()
    >>> tuple(weight.grad.shape)
    (100, 16)
    """
    transform, asked = LogitTransform(ignore_index, logit_scale, softcap), Request(schedule, memory_budget, tail_threshold)
    call = LinearHeadCall(hidden, weight, labels, bias, cu_seqlens, asked, transform, backend)
    return _loss_of(call, relevance, list_sizes, ref_logps, objective, beta, reduction, length_normalized, return_stats)


def _loss_of(
    call: LogitsCall | LinearHeadCall, relevance, list_sizes, ref_logps, objective, beta, reduction, length_normalized, stats
) -> ListwiseLossOutput:
    """The list side: validated, and run behind the call."""
    validation.check_options(beta=beta, reduction=reduction)
    tokens, objective = call.tokens, resolve(objective)
    n = tokens.num_candidates
    cu_lists, list_size = validation.lists(list_sizes, n, tokens.values.device)
    relevance = checked_relevance(relevance, objective, cu_lists, tokens.values, n)
    ref_logps = validation.ref_logps(ref_logps, n, tokens.values)
    lists = (cu_lists, list_size, relevance, ref_logps, objective)
    mean_mask = call.mean_mask(length_normalized)
    step = ops.list_step(mean_mask, tokens.cu_tokens, *lists, beta=beta, reduction=reduction, backend=call.backend)
    return ListwiseLossOutput(*call.run(step, stats)[: 5 if stats else 3])

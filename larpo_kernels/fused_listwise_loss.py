"""The headline ops: the listwise ranking loss of a policy over candidate lists, from logits or from hidden x weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from . import backends, ops, validation
from .logps import LinearTokens, counted
from .objectives import Objective, checked_relevance, resolve
from .outputs import ListwiseLossOutput


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
        reduction: over lists; the terms inside a list are summed.
        others: as in `token_logps`.

    Returns:
        ListwiseLossOutput(loss, logps, scores, entropy, top1): loss differentiable in logits; logps and scores [S]
        detached; entropy and top1 of the labels' shape with return_stats, else None.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it should be, before anything is computed. On a
        GPU values are not inspected (that would stop the host): a label out of range or lists that do not cover the
        candidates give NaN.

    Source: "LLM Alignment as Retriever Optimization", arXiv 2502.03699, table 1 and algorithm 1.

    >>> _ = torch.manual_seed(0)
    >>> logits = torch.randn(4, 5, 100, requires_grad=True)  # 2 prompts x 2 candidates, 5 tokens each
    >>> labels = torch.randint(100, (4, 5))
    >>> out = fused_listwise_loss(logits, labels, torch.tensor([1.0, 0.0, 0.2, 0.9]), list_sizes=2, objective="listmle")
    >>> out.loss.backward()
    >>> tuple(out.scores.shape), tuple(logits.grad.shape)
    ((4,), (4, 5, 100))
    """
    tokens = validation.tokens(logits, labels, cu_seqlens, name="logits", ignore_index=ignore_index)
    validation.check_options(logit_scale=logit_scale, softcap=softcap)
    lists = Lists(tokens, relevance, list_sizes, ref_logps, objective, beta, reduction)
    backend = backends.pick(backend, logits)
    step = ops.token_step(
        tokens,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        stats=return_stats,
        inplace_backward=inplace_backward,
        backend=backend,
    )
    mean_over = counted(tokens.labels, ignore_index, length_normalized)
    return ListwiseLossOutput(*ops.run(*step, *lists.step(mean_over, backend))[: 5 if return_stats else 3])


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
        weight: [V, H], the head as `torch.nn.Linear` stores it. bias: [V] or None.
        schedule, memory_budget, tail_threshold: what is kept for the backward, and whether gradients are those of all rows of
            the head; see `linear_token_logps` and `plan`.
        others: as in `fused_listwise_loss`.

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
    head = LinearTokens(
        hidden, weight, labels, bias, cu_seqlens, schedule, memory_budget, tail_threshold, ignore_index, logit_scale, softcap,
        backend,
    )  # fmt: skip
    lists = Lists(head.tokens, relevance, list_sizes, ref_logps, objective, beta, reduction)
    mean_over = counted(head.tokens.labels, ignore_index, length_normalized)
    out = ops.run(*head.step(return_stats), *lists.step(mean_over, head.backend))
    return ListwiseLossOutput(*out[: 5 if return_stats else 3])


class Lists:
    """The list side of a fused loss: checked when made, a step for `ops.run` on demand."""

    def __init__(self, tokens, relevance, list_sizes, ref_logps, objective, beta, reduction):
        validation.check_options(beta=beta, reduction=reduction)
        n = tokens.num_candidates
        self.objective, self.beta, self.reduction = resolve(objective), beta, reduction
        self.cu_tokens = tokens.cu_tokens
        self.cu_lists, self.list_size = validation.lists(list_sizes, n, tokens.values.device)
        self.relevance = checked_relevance(relevance, self.objective, self.cu_lists, tokens.values, n)
        self.ref_logps = validation.ref_logps(ref_logps, n, tokens.values)

    def step(self, counted, backend) -> ops.Step:
        """loss, logps, scores of token log-probs; counted: the tokens that a mean runs over, None for a sum."""
        return ops.list_step(
            counted,
            self.cu_tokens,
            self.cu_lists,
            self.list_size,
            self.relevance,
            self.ref_logps,
            self.objective,
            beta=self.beta,
            reduction=self.reduction,
            backend=backend,
        )

"""Log-likelihoods as ops of their own: per token and per candidate, from logits or from hidden states x weight."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from . import layout, ops
from .outputs import TokenLogps


def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
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
        ignore_index: tokens with this label give 0 and exactly zero gradient; their logits are never read.
        logit_scale, softcap: what a model does to its logits after the head.
        return_stats: also per-token entropy and top-1 hit, from the same read, without gradient.
        inplace_backward: write the gradient over the logits instead of allocating it. The logits are lost then, and
            autograd raises if anything else still needs them. Under torch.compile it has no effect.
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
    tokens = layout.tokens(logits, labels, None, name="logits", ignore_index=ignore_index, need_candidates=False)
    layout.check_options(logit_scale=logit_scale, softcap=softcap)
    out = ops.token_logps(
        tokens,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        stats=return_stats,
        inplace_backward=inplace_backward,
        backend=backend,
    )
    return _token_output(out, labels, return_stats)


def _token_output(out: tuple[Tensor, Tensor, Tensor], labels: Tensor, return_stats: bool) -> Tensor | TokenLogps:
    if return_stats:
        return TokenLogps(*(x.view(labels.shape) for x in out))
    return out[0].view(labels.shape)


def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    length_normalized: bool = False,
    ignore_index: int = -100,
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
    tokens = layout.tokens(logits, labels, cu_seqlens, name="logits", ignore_index=ignore_index)
    layout.check_options(logit_scale=logit_scale, softcap=softcap)
    logps, _, _ = ops.token_logps(
        tokens,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        inplace_backward=inplace_backward,
        backend=backend,
    )
    return ops.candidate_logps(logps, counted(labels, ignore_index, length_normalized), tokens.cu_tokens, backend)


def counted(labels: Tensor, ignore_index: int, length_normalized: bool) -> Tensor | None:
    """Which tokens a mean runs over, [N] bool; None for a sum."""
    return (labels != ignore_index).reshape(-1) if length_normalized else None

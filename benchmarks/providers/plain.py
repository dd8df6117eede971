"""The list loss by the shortest plain code: what autograd and the arithmetic cost in a hand-written Function.

No checks, no options, one list size, float32, all logits at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.core.problem import BETA, IGNORE, Problem
from benchmarks.providers.pytorch import PLAIN_GEMMS
from benchmarks.providers.registry import Output, provider


def _loss(logits, labels, relevance, ref_logps, m):
    """loss, logps [S], and the logits made its gradient, in their own memory."""
    keep = labels != IGNORE
    at = labels.clamp(min=0)[..., None]
    lse = logits.logsumexp(-1, keepdim=True)
    logps = ((logits.gather(-1, at) - lse)[..., 0] * keep).sum(-1)
    scores = (BETA * (logps - ref_logps)).view(-1, m)
    best = relevance.view_as(scores).argmax(-1, keepdim=True)
    log_of_sum = scores.logsumexp(-1, keepdim=True)
    loss = (log_of_sum - scores.gather(-1, best)).mean()
    c = (scores - log_of_sum).exp_()
    c = c.scatter_add_(-1, best, torch.full_like(best, -1, dtype=c.dtype)).mul_(BETA / len(scores))
    c = (c.view(-1, 1) * keep)[..., None]  # d loss / d logp of each token
    gradient = logits.sub_(lse).exp_().mul_(-c).scatter_add_(-1, at, c)
    return loss, logps, gradient


class FromLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, *rest):
        loss, logps, gradient = _loss(logits.clone(), *rest)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(logps)
        return loss, logps

    @staticmethod
    def backward(ctx, upstream, _):
        return ctx.saved_tensors[0].mul_(upstream), None, None, None, None


class FromHidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, *rest):
        loss, logps, gradient = _loss(F.linear(hidden, weight), *rest)
        ctx.save_for_backward(hidden, weight, gradient)
        ctx.mark_non_differentiable(logps)
        return loss, logps

    @staticmethod
    def backward(ctx, upstream, _):
        hidden, weight, gradient = ctx.saved_tensors
        rows = gradient.mul_(upstream).flatten(0, 1)
        return (rows @ weight).view_as(hidden), rows.T @ hidden.flatten(0, 1), None, None, None, None


def _rest(problem: Problem):
    return problem.labels, problem.relevance, problem.ref_logps, problem.list_sizes[0]


@provider("plain Function", "logits", modes=("train",), dtypes=(torch.float32,), small=True)
def from_logits(problem: Problem) -> Output:
    return Output(*FromLogits.apply(problem.logits, *_rest(problem)))


@provider("plain Function", "linear", modes=("trainable",), gemms=PLAIN_GEMMS, dtypes=(torch.float32,), small=True)
def from_hidden(problem: Problem) -> Output:
    return Output(*FromHidden.apply(problem.hidden, problem.weight, *_rest(problem)))

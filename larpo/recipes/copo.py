"""COPO, count-based online preference optimisation (arXiv 2501.12735, eq. 16): a bonus for completions seldom seen.

    loss = base(s) - alpha * E_{y ~ pi} stopgrad(bonus(y)) * log pi(y),        bonus(y) = 1 / sqrt(N(y))

N is a pseudo-count, so that a completion that resembles many seen ones counts as seen. The paper reads it off a coin-flipping
network (eq. 18): regression of random signs on features, whose mean squared output tends to 1 / N. For a linear network that
limit is known, and is what `PseudoCounts` computes:

    1 / N(y) = phi(y)^T (ridge I + sum_seen phi phi^T)^-1 phi(y)

the same quantity as in the upper confidence bound that the paper starts from. phi is the bag of the completion's tokens, of
unit length; with one-hot features N is the count itself plus the ridge.

The expectation is over the round's own candidates, drawn from the policy before its first step. Bonuses are positive, so every
candidate is pulled up a little, on top of what tells seldom ones from common ones. `centred` takes each list's mean bonus off:
as E_pi grad log pi = 0, the expected gradient is at first the same up to a factor 1 - 1 / k, without the common pull.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .harness.lists import list_means
from .harness.online import Exploration
from .harness.recipe import Arm, Row, commands
from .harness.trainer import ObjectiveTrainer
from .objectives import Numbers, larpo

Features = Callable[[Sequence[Tensor]], Tensor]  # completions' token ids -> [S, F]


def bag_of_tokens(completions: Sequence[Tensor], vocabulary: int) -> Tensor:
    """[S, V] float64: how often each token occurs, scaled to unit length; zeros for no tokens.

    >>> bag_of_tokens([torch.tensor([0, 2]), torch.tensor([1])], vocabulary=3).round(decimals=2).tolist()
    [[0.71, 0.0, 0.71], [0.0, 1.0, 0.0]]
    """
    counts = torch.stack([torch.bincount(ids, minlength=vocabulary) for ids in completions]).double()
    return torch.nn.functional.normalize(counts, dim=1)


class PseudoCounts:
    """How often completions like these were seen.

    >>> counts = PseudoCounts(lambda completions: bag_of_tokens(completions, 3), ridge=1.0)
    >>> counts.add([torch.tensor([0])] * 3)
    >>> counts.bonus([torch.tensor([0]), torch.tensor([2])]).tolist()
    [0.5, 1.0]
    """

    def __init__(self, features: Features, ridge: float = 1.0):
        if not ridge > 0:
            raise ValueError(f"ridge must be above 0, got {ridge}")
        self.features, self.ridge = features, ridge
        self.seen: Tensor | None = None  # [F, F]: the sum of phi phi^T

    def add(self, completions: Sequence[Tensor]) -> None:
        """Remembers completions, each a tensor of token ids."""
        phi = self.features(completions)
        self.seen = phi.T @ phi + (0 if self.seen is None else self.seen)

    def bonus(self, completions: Sequence[Tensor]) -> Tensor:
        """[S] float64: 1 / sqrt(N)."""
        phi = self.features(completions)
        seen = phi.new_zeros(phi.shape[1], phi.shape[1]) if self.seen is None else self.seen
        gram = seen + self.ridge * torch.eye(len(seen), dtype=seen.dtype)
        return (phi * torch.linalg.solve(gram, phi.T).T).sum(1).clamp(min=0).sqrt()


def copo(
    logps, ref_logps, num_tokens, relevance, list_sizes, bonus, *, alpha: float, beta=0.1, objective="pairwise", centred=False
) -> Numbers:
    """With the bonus [S] of each candidate; gradients do not reach it."""
    loss, scores = larpo(logps, ref_logps, num_tokens, relevance, list_sizes, objective=objective, beta=beta)
    weight = bonus.detach().to(logps)
    if centred:
        weight = weight - list_means(weight, list_sizes).repeat_interleave(list_sizes)
    return loss - alpha * list_means(weight * logps, list_sizes).mean(), scores


def completions_of(inputs: Mapping[str, Any]) -> list[Tensor]:
    """Token ids of every candidate of a trainer's batch, in its order, whatever the layout of its rows."""
    return [ids for rows in inputs["rows"] for ids in rows["labels"].split(rows["cu_seqlens"].diff().tolist())]


class CountTrainer(ObjectiveTrainer):
    """Hands each candidate's bonus to the loss."""

    def __init__(self, *args, counts: PseudoCounts, **kwargs):
        self.counts = counts
        super().__init__(*args, **kwargs)

    def list_loss(self, logps, ref_logps, inputs):
        bonus = self.counts.bonus(completions_of(inputs)[: len(logps)])
        return self.loss(logps, ref_logps, inputs["num_tokens"], inputs["relevance"], inputs["list_sizes"], bonus)


@dataclass
class Copo(Exploration):
    """Rounds of DPO on the best and worst of k completions of the naming task: without the bonus, with it, and centred."""

    name = "copo"
    alpha: float = 0.1

    def arms(self) -> dict[str, Arm]:
        return {
            "alpha = 0": partial(self.with_bonus, alpha=0.0),
            f"alpha = {self.alpha:g}": partial(self.with_bonus, alpha=self.alpha),
            f"alpha = {self.alpha:g}, centred": partial(self.with_bonus, alpha=self.alpha, centred=True),
        }

    def with_bonus(self, start: tuple[Any, Any], seed: int, *, alpha: float, centred: bool = False) -> Row:
        counts = PseudoCounts(partial(bag_of_tokens, vocabulary=len(start[0])))

        def remembered(sampler, lists, seed):
            counts.add([torch.tensor(c.completion_ids) for one in lists for c in one.candidates])
            return lists, {}

        loss = partial(copo, alpha=alpha, centred=centred)
        return self.explored(start, seed, loss=loss, source=remembered, trainer=partial(CountTrainer, counts=counts))


run, main = commands(Copo)

if __name__ == "__main__":
    main()

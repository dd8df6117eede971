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
from functools import partial
from typing import Any

import torch
from torch import Tensor

import larpo_kernels as lk

from .harness import report
from .harness.lists import implicit_rewards, list_means

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
    logps: Tensor,
    ref_logps: Tensor,
    num_tokens: Tensor,
    relevance: Tensor,
    list_sizes: Tensor,
    bonus: Tensor,
    *,
    alpha: float,
    beta: float = 0.1,
    objective: str = "pairwise",
    centred: bool = False,
) -> tuple[Tensor, Tensor]:
    """A `harness.trainer.Loss`, with the bonus [S] of each candidate beside it; gradients do not reach the bonus."""
    scores = implicit_rewards(logps, ref_logps, beta)
    loss = lk.listwise_loss(scores, relevance, list_sizes=list_sizes, objective=objective)
    weight = bonus.detach().to(logps)
    if centred:
        weight = weight - list_means(weight, list_sizes).repeat_interleave(list_sizes)
    return loss - alpha * list_means(weight * logps, list_sizes).mean(), scores


def completions_of(inputs: Mapping[str, Any]) -> list[Tensor]:
    """Token ids of every candidate of a trainer's batch, in its order, whatever the layout of its rows."""
    return [ids for rows in inputs["rows"] for ids in rows["labels"].split(rows["cu_seqlens"].diff().tolist())]


def make_trainer():
    """The trainer class: ObjectiveTrainer that hands each candidate's bonus to the loss."""
    from .harness.trainer import ObjectiveTrainer

    class CountTrainer(ObjectiveTrainer):
        def __init__(self, *args, counts: PseudoCounts, **kwargs):
            self.counts = counts
            super().__init__(*args, **kwargs)

        def list_loss(self, logps, ref_logps, inputs):
            bonus = self.counts.bonus(completions_of(inputs)[: len(logps)])
            return self.loss(logps, ref_logps, inputs["num_tokens"], inputs["relevance"], inputs["list_sizes"], bonus)

    return CountTrainer


# --- the run -----------------------------------------------------------------------------------------------------


def run(
    seeds: Sequence[int] = (0, 1, 2),
    *,
    alpha: float = 0.1,
    rounds: int = 12,
    k: int = 8,
    steps: int = 8,
    learning_rate: float = 1e-3,
    fit_steps: int = 300,
) -> dict[str, Any]:
    """Rounds of DPO on the best and worst of k completions on the naming task: without the bonus, with it, and centred."""
    from .harness import online
    from .harness.trainer import train
    from .tasks import naming

    trainer = make_trainer()

    def arm(alpha: float, centred: bool = False):
        def trained_by(model, tokenizer):
            counts = PseudoCounts(partial(bag_of_tokens, vocabulary=len(tokenizer)))

            def one_round(lists, seed):
                counts.add([torch.tensor(c.completion_ids) for one in lists for c in one.candidates])
                return train(
                    model, tokenizer, lists, partial(copo, alpha=alpha, centred=centred), steps=steps,
                    batch_size=len(naming.PROMPTS), learning_rate=learning_rate, seed=seed, trainer=trainer, counts=counts,
                )  # fmt: skip

            return one_round

        return trained_by

    arms = {"alpha = 0": arm(0.0), f"alpha = {alpha:g}": arm(alpha), f"alpha = {alpha:g}, centred": arm(alpha, centred=True)}
    return {
        "settings": dict(rounds=rounds, k=k, steps=steps, learning_rate=learning_rate, alpha=alpha),
        **online.compare(arms, seeds, rounds=rounds, k=k, fit_steps=fit_steps, name="copo"),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    from .harness.online import plot

    return report.main(argv, name="copo", doc=__doc__, run=run, plot=plot)


if __name__ == "__main__":
    main()

"""SELM, self-exploring language models (arXiv 2405.19332): a preference loss that is optimistic about what it has not seen.

    loss = base(s) + alpha * E_{y ~ pi_ref} s(y),        s(y) = beta (log pi(y) - log pi_ref(y))

The base is DPO's loss in the paper, any list objective here. The second term falls as the policy moves likelihood away from
what the reference says, which is where an implicit reward that fits the data may still be high: its mean over the reference
is -beta KL(pi_ref || pi), and it has no lower bound, so alpha is small.

In an on-policy loop the reference is the policy that sampled the round's completions. So each list is itself a draw from the
reference, and the mean of s over its candidates estimates the expectation; the paper samples one further completion for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

import larpo_kernels as lk

from .harness import report
from .harness.lists import implicit_rewards, list_means


def selm(
    logps: Tensor,
    ref_logps: Tensor,
    num_tokens: Tensor,
    relevance: Tensor,
    list_sizes: Tensor,
    *,
    alpha: float,
    beta: float = 0.1,
    objective: str = "pairwise",
) -> tuple[Tensor, Tensor]:
    """A `larpo.recipes.harness.trainer.Loss` for lists whose candidates were all sampled from the reference."""
    scores = implicit_rewards(logps, ref_logps, beta)
    loss = lk.listwise_loss(scores, relevance, list_sizes=list_sizes, objective=objective)
    return loss + alpha * list_means(scores, list_sizes).mean(), scores


# --- the run -----------------------------------------------------------------------------------------------------


def run(
    seeds: Sequence[int] = (0, 1, 2),
    *,
    alphas: Sequence[float] = (0.0, 0.1, 0.5),
    rounds: int = 12,
    k: int = 8,
    steps: int = 8,
    learning_rate: float = 1e-3,
    fit_steps: int = 300,
) -> dict[str, Any]:
    """Rounds of DPO on the best and worst of k completions, with and without optimism, on the naming task."""
    from .harness import online
    from .harness.trainer import train
    from .tasks import naming

    def arm(alpha: float):
        def trained_by(model, tokenizer):
            return lambda lists, seed: train(
                model, tokenizer, lists, partial(selm, alpha=alpha), steps=steps, batch_size=len(naming.PROMPTS),
                learning_rate=learning_rate, seed=seed,
            )  # fmt: skip

        return trained_by

    arms = {f"alpha = {alpha:g}": arm(alpha) for alpha in alphas}
    return {
        "settings": dict(rounds=rounds, k=k, steps=steps, learning_rate=learning_rate, alphas=list(alphas)),
        **online.compare(arms, seeds, rounds=rounds, k=k, fit_steps=fit_steps, name="selm"),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    from .harness.online import plot

    return report.main(argv, name="selm", doc=__doc__, run=run, plot=plot)


if __name__ == "__main__":
    main()

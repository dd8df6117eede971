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
from dataclasses import dataclass
from functools import partial

from .harness.lists import list_means
from .harness.online import Exploration
from .harness.recipe import Arm, commands
from .objectives import Numbers, larpo


def selm(logps, ref_logps, num_tokens, relevance, list_sizes, *, alpha: float, beta=0.1, objective="pairwise") -> Numbers:
    """For lists whose candidates were all sampled from the reference."""
    loss, scores = larpo(logps, ref_logps, num_tokens, relevance, list_sizes, objective=objective, beta=beta)
    return loss + alpha * list_means(scores, list_sizes).mean(), scores


@dataclass
class Selm(Exploration):
    """Rounds of DPO on the best and worst of k completions of the naming task, with and without optimism."""

    name = "selm"
    alphas: Sequence[float] = (0.0, 0.1, 0.5)

    def arms(self) -> dict[str, Arm]:
        return {f"alpha = {alpha:g}": partial(self.explored, loss=partial(selm, alpha=alpha)) for alpha in self.alphas}


run, main = commands(Selm)

if __name__ == "__main__":
    main()

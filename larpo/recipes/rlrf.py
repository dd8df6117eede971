"""RLRF, reinforcement learning from reflective feedback (arXiv 2403.14238): answers refined by the policy itself, then learned.

    y ~ pi(. | x),   y' ~ pi(. | x, y, feedback(x, y)),   loss(x) = list loss of pi(. | x) over all y and y' ranked by r(x, .)

The feedback is fine-grained: it says what is wrong with an answer, where the reward r is one number. It stands in the prompt
that y' is sampled behind, and nowhere else: the list is trained on behind the original prompt x, so that the policy learns to
give at once what took it two turns. The feedback of the paper is a model's, on aspects such as factuality; only promising
answers are refined, and DPO trains on pairs out of both kinds. `larpo.recipes.refinements.refine` makes the lists for any
feedback and objective; a list's best and worst are DPO's pair.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from larpo.candidates import PromptList, deduplicate, rank
from larpo.sampling import Sampler

from .harness.online import Exploration
from .harness.recipe import Arm, Columns, Row, commands
from .harness.report import over_seeds
from .objectives import OBJECTIVES
from .refinements import ORIGINAL, REFINEMENT, refine
from .tasks import naming, naming_feedback


def naming_reward(*, prompts: Sequence[str], completions: Sequence[str], **_) -> list[float]:
    return [naming.reward(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def ranked_answers(sampler: Sampler, lists: list[PromptList], seed: int) -> tuple[list[PromptList], dict[str, float]]:
    """A source without refinements: the answers, ranked and deduplicated as the lists of the other sources are."""
    return rank(deduplicate(lists)[0])[0], {}


def refined(
    sampler: Sampler, lists: list[PromptList], seed: int, *, blank: bool = False, promising: int | None = None
) -> tuple[list[PromptList], dict[str, float]]:
    """A source of equally many candidates: the first half of the answers, and as many refinements."""
    half, draw = len(lists[0].candidates) // 2, random.Random(seed)
    answers = [replace(one, candidates=tuple(replace(c, source=ORIGINAL) for c in one.candidates[:half])) for one in lists]
    found = refine(
        sampler,
        answers,
        lambda prompt, candidate: naming_feedback.ask(prompt, candidate.completion, blank=blank),
        naming_reward,
        k=half // (promising or half),
        promising=promising,
        seed=seed + 500,  # none of the seeds of first answers
    )
    rewritten = [
        naming.reward(one.prompt, naming_feedback.rewritten(one.prompt, c.completion, draw, blank=blank)) - c.score
        for one in answers
        for c in one.candidates
    ]
    measures = {
        "gain": statistics.fmean(found.gains),
        "better": statistics.fmean(gain > 0 for gain in found.gains),
        "on top": statistics.fmean(one.candidates[0].source == REFINEMENT for one in found.lists),
        "the speaker's gain": statistics.fmean(rewritten),  # what the policy was once fitted to, on all originals
    }
    return found.lists, measures | found.counts


ARMS = {
    "k answers": ranked_answers,
    "half refinements": refined,
    "half refinements, no marks": partial(refined, blank=True),
    "half refinements of the best": partial(refined, promising=1),
}


@dataclass
class Rlrf(Exploration):
    """Rounds of DPO on the best and worst of k completions of the naming task, all of them answers or half refinements."""

    name = "rlrf"
    task = naming_feedback
    panels: ClassVar[dict[str, str]] = {
        "reward": "mean reward of first answers",
        "gain": "gain of a refinement",
        "worthy": "rewarded completions found",
    }
    rounds: int = 10
    learning_rate: float = 5e-4
    fit_steps: int = 600

    def __post_init__(self):
        if self.k < 2 or self.k % 2:
            raise ValueError(f"k must be even and at least 2, got {self.k}")

    def arms(self) -> dict[str, Arm]:
        dpo = OBJECTIVES["pairwise (DPO)"]
        return {name: partial(self.explored, loss=dpo, source=source) for name, source in ARMS.items()}

    def columns(self, row: Row) -> Columns:
        gain = row.get("gain", [None])
        return {
            **super().columns(row),
            "reward, mean of all rounds": statistics.fmean(row["reward"]),
            "gain of a refinement, first round": gain[0],
            "gain of a refinement, last round": gain[-1],
        }

    def notes(self, rows: Sequence[Row]) -> list[str]:
        sums = {
            name: sum(sum(row.get(name, [])[: self.rounds]) for row in rows) for name in ("refinements", "empty", "unchanged")
        }
        marked = [row["the speaker's gain"] for row in rows if row["arm"] == "half refinements"]
        first, last = (over_seeds([gains[t] for gains in marked]) for t in (0, -1))
        return [
            *super().notes(rows),
            f"Of {sums['refinements']} refinements trained on, {sums['empty']} were empty and {sums['unchanged']} repeated "
            "their original, which counts once.",
            f"The speaker, given the marked answers, would have gained {first} in the first round and {last} in the last.",
        ]


run, main = commands(Rlrf)

if __name__ == "__main__":
    main()

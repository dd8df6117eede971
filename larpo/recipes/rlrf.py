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
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from larpo.candidates import PromptList, deduplicate, rank
from larpo.sampling import Sampler

from .harness import report
from .refinements import ORIGINAL, REFINEMENT, refine

# --- the run -----------------------------------------------------------------------------------------------------


def naming_reward(*, prompts: Sequence[str], completions: Sequence[str], **_) -> list[float]:
    from .tasks import naming

    return [naming.reward(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def first_answers(sampler: Sampler, lists: list[PromptList], seed: int) -> tuple[list[PromptList], dict[str, float]]:
    """A source without refinements, ranked and without duplicates as the others."""
    return rank(deduplicate(lists)[0])[0], {}


def refined(
    sampler: Sampler, lists: list[PromptList], seed: int, *, blank: bool = False, promising: int | None = None
) -> tuple[list[PromptList], dict[str, float]]:
    """A source of as many candidates: the first half of the answers, and refinements in place of the others."""
    from .tasks import naming, naming_feedback

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
    "k answers": first_answers,
    "half refinements": refined,
    "half refinements, no marks": partial(refined, blank=True),
    "half refinements of the best": partial(refined, promising=1),
}


def run(
    seeds: Sequence[int] = (0, 1, 2),
    *,
    rounds: int = 10,
    k: int = 8,
    steps: int = 8,
    learning_rate: float = 5e-4,
    fit_steps: int = 600,
) -> dict[str, Any]:
    """Rounds of DPO on the best and worst of k completions on the naming task, all of them answers or half refinements."""
    if k < 2 or k % 2:
        raise ValueError(f"k must be even and at least 2, got {k}")
    from .harness import online
    from .harness.trainer import train
    from .objectives import OBJECTIVES
    from .tasks import naming, naming_feedback

    def trained_by(model, tokenizer):
        return lambda lists, seed: train(
            model, tokenizer, lists, OBJECTIVES["pairwise (DPO)"], steps=steps, batch_size=len(naming.PROMPTS),
            learning_rate=learning_rate, seed=seed,
        )  # fmt: skip

    found = online.compare(
        dict.fromkeys(ARMS, trained_by), seeds, rounds=rounds, k=k, fit_steps=fit_steps, name="rlrf",
        sources=ARMS, start=naming_feedback,
    )  # fmt: skip
    counts: Counter[str] = Counter()
    for row, runs in zip(found["table"], found["runs"].values(), strict=True):
        row["reward, mean of all rounds"] = report.over_seeds([statistics.fmean(one["reward"]) for one in runs])
        for when, t in (("first", 0), ("last", -1)):
            row[f"gain of a refinement, {when} round"] = (
                report.over_seeds([one["gain"][t] for one in runs]) if "gain" in runs[0] else ""
            )
        for name in ("refinements", "empty", "unchanged"):
            counts[name] += sum(sum(one.get(name, [])[:rounds]) for one in runs)
    marked = found["runs"]["half refinements"]
    first, last = (report.over_seeds([one["the speaker's gain"][t] for one in marked]) for t in (0, -1))
    return {
        "settings": dict(rounds=rounds, k=k, steps=steps, learning_rate=learning_rate, fit_steps=fit_steps),
        **found,
        "notes": [
            *found["notes"],
            f"Of {counts['refinements']} refinements trained on, {counts['empty']} were empty and {counts['unchanged']} "
            "repeated their original, which counts once.",
            f"The speaker, given the marked answers, would have gained {first} in the first round and {last} in the last.",
        ],
    }


def plot(figure, result: dict[str, Any]) -> None:
    from .harness import online

    *_, found = online.PANELS
    online.plot(figure, result, panels=[("reward", "mean reward of first answers"), ("gain", "gain of a refinement"), found])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    return report.main(argv, name="rlrf", doc=__doc__, run=run, plot=plot)


if __name__ == "__main__":
    main()

"""The on-policy loop of the exploration recipes: sample, reward, train against the policy as it was, again."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

from larpo.candidates import PromptList
from larpo.modeling.policy import detach
from larpo.sampling import Sampler, TransformersSampler

from ..tasks import naming
from .recipe import Columns, Recipe, Row
from .trainer import Loss, ObjectiveTrainer, counts_in_words, train

Train = Callable[[list[PromptList], int], dict[str, int]]  # (this round's lists, its seed) -> counts; trains in place
# (the policy's sampler, this round's lists of k first answers, its seed) -> (lists to train on, measures of the round)
Source = Callable[[Sampler, list[PromptList], int], tuple[list[PromptList], dict[str, float]]]


def first_answers(sampler: Sampler, lists: list[PromptList], seed: int) -> tuple[list[PromptList], dict[str, float]]:
    """The source that trains on first answers as they are."""
    return lists, {}


def explore(
    model,
    tokenizer,
    train: Train,
    *,
    rounds: int,
    k: int,
    seed: int,
    prompts: Sequence[str] = tuple(naming.PROMPTS),
    source: Source = first_answers,
) -> Row:
    """Rounds of k completions per prompt at temperature 1; what each round sampled, before it is trained on.

    source: makes the candidates that are trained on out of these first answers.

    Returns lists of rounds + 1 values: of the first answers reward (mean) and distinct (share of a round's completions that
    differ); of the candidates worthy (different rewarded completions found so far) and best (mean over prompts of the best
    reward found so far); and what the source measures; and counts.
    """
    curves: dict[str, list[float]] = {"reward": [], "distinct": [], "worthy": [], "best": []}
    counts: Counter[str] = Counter()
    found: dict[tuple[str, str], float] = {}
    for t in range(rounds + 1):
        sampler = TransformersSampler(detach(model), tokenizer, naming.MOST_WORDS + 1, batch_size=1024)
        lists = naming.scored(prompts, sampler(prompts, k, 1.0, seed=1000 * seed + t), source=str(t))
        drawn = [(one.prompt, c.completion, c.score) for one in lists for c in one.candidates]
        lists, measures = source(sampler, lists, 1000 * seed + t)
        found |= {(one.prompt, c.completion): c.score for one in lists for c in one.candidates}
        best = [max(score for (p, _), score in found.items() if p == prompt) for prompt in prompts]
        measures = {
            "reward": sum(score for *_, score in drawn) / len(drawn),
            "distinct": len({(prompt, text) for prompt, text, _ in drawn}) / len(drawn),
            "worthy": sum(score > 0 for score in found.values()),
            "best": sum(best) / len(best),
            **measures,
        }
        for name, value in measures.items():
            curves.setdefault(name, []).append(value)
        if t < rounds:
            counts.update(train(lists, 1000 * seed + t))
    return {**curves, "counts": dict(counts)}


@dataclass
class Exploration(Recipe):
    """Rounds of training on k completions a prompt of the naming task; all arms of a seed start from one policy."""

    rounds: int = 12
    k: int = 8
    steps: int = 8
    learning_rate: float = 1e-3
    fit_steps: int = 300
    task: ClassVar[ModuleType] = naming  # has `tokenizer` and `start_policy`
    panels: ClassVar[dict[str, str]] = {
        "reward": "mean reward",
        "distinct": "share of distinct completions",
        "worthy": "rewarded completions found",
    }
    x_label = "round"
    digits: ClassVar[dict[str, int]] = {"rewarded completions found": 0}

    def start(self, seed: int) -> tuple[Any, Any]:
        """The tokenizer and the start policy."""
        tokenizer = self.task.tokenizer()
        return tokenizer, self.task.start_policy(tokenizer, seed=seed, steps=self.fit_steps)

    def explored(
        self, start: tuple[Any, Any], seed: int, *, loss: Loss, source: Source = first_answers, trainer=ObjectiveTrainer
    ) -> Row:
        """An arm: rounds from the start policy with this loss."""
        tokenizer, policy = start[0], copy.deepcopy(start[1])
        settings = dict(max_steps=self.steps, per_device_train_batch_size=len(naming.PROMPTS), learning_rate=self.learning_rate)

        def one_round(lists: list[PromptList], seed: int) -> dict[str, int]:
            return train(policy, tokenizer, lists, loss, trainer=trainer, seed=seed, **settings)

        return explore(policy, tokenizer, one_round, rounds=self.rounds, k=self.k, seed=seed, source=source)

    def columns(self, row: Row) -> Columns:
        return {
            "reward, last round": row["reward"][-1],
            "distinct, last round": row["distinct"][-1],
            "rewarded completions found": row["worthy"][-1],
            "best found, mean over prompts": row["best"][-1],
        }

    def notes(self, rows: Sequence[Row]) -> list[str]:
        return [counts_in_words(row["counts"] for row in rows)]

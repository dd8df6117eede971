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

# (the policy's sampler, this round's lists of k first answers, its seed) -> (lists to train on, measures of the round)
Source = Callable[[Sampler, list[PromptList], int], tuple[list[PromptList], dict[str, float]]]


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
        self, start: tuple[Any, Any], seed: int, *, loss: Loss, source: Source | None = None, trainer=ObjectiveTrainer
    ) -> Row:
        """An arm: rounds from the start policy with this loss, each of k completions a prompt at temperature 1.

        Returns lists of rounds + 1 values, measured before a round is trained on: of the first answers reward (mean) and
        distinct (share of a round's completions that differ); of the candidates, which the source makes out of these answers
        (without one they are these answers), worthy (different rewarded completions found so far) and best (mean over prompts
        of the best reward found so far); what the source measures; and the counts of `train`.
        """
        tokenizer, policy = start[0], copy.deepcopy(start[1])
        settings = dict(max_steps=self.steps, per_device_train_batch_size=len(naming.PROMPTS), learning_rate=self.learning_rate)
        curves: dict[str, list[float]] = {}
        counts: Counter[str] = Counter()
        found: dict[tuple[str, str], float] = {}
        for t in range(self.rounds + 1):
            round_seed = 1000 * seed + t
            sampler = TransformersSampler(detach(policy), tokenizer, naming.MOST_WORDS + 1, batch_size=1024)
            lists = naming.scored(naming.PROMPTS, sampler(naming.PROMPTS, self.k, 1.0, seed=round_seed), source=str(t))
            drawn = [(one.prompt, c.completion, c.score) for one in lists for c in one.candidates]
            lists, measures = source(sampler, lists, round_seed) if source else (lists, {})
            found |= {(one.prompt, c.completion): c.score for one in lists for c in one.candidates}
            best = [max(score for (p, _), score in found.items() if p == prompt) for prompt in naming.PROMPTS]
            measures = {
                "reward": sum(score for *_, score in drawn) / len(drawn),
                "distinct": len({(prompt, text) for prompt, text, _ in drawn}) / len(drawn),
                "worthy": sum(score > 0 for score in found.values()),
                "best": sum(best) / len(best),
                **measures,
            }
            for name, value in measures.items():
                curves.setdefault(name, []).append(value)
            if t < self.rounds:
                counts.update(train(policy, tokenizer, lists, loss, trainer=trainer, seed=round_seed, **settings))
        return {**curves, "counts": dict(counts)}

    def columns(self, row: Row) -> Columns:
        return {
            "reward, last round": row["reward"][-1],
            "distinct, last round": row["distinct"][-1],
            "rewarded completions found": row["worthy"][-1],
            "best found, mean over prompts": row["best"][-1],
        }

    def notes(self, rows: Sequence[Row]) -> list[str]:
        return [counts_in_words(row["counts"] for row in rows)]

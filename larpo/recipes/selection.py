"""Self-Selection RAG (arXiv 2502.06148): a model answers with and without passages, and learns to select among its answers.

    answers   y_0 = answer(q), y_1 = answer(q, p_1), ..., y_K = answer(q, p_K)       p_k: the k-th passage of BM25
    select    argmax_y l(y | q, p_1 ... p_K) / n
    loss      -sum_{r_i > r_j} log sigmoid(s_i - s_j),   s = beta (l - l_ref),   r = 1 for a right answer, else 0

The distinct answers of a question are one list. The paper has two, one without passages and one with all of them, and trains
with DPO, which is this loss (LambdaRank without weights) for two candidates; its model also learns to write better answers, and
sees the answers with explanations when it selects. Here it is shown the question and the passages, and scores each answer.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

import larpo_kernels as lk
from larpo_kernels.objectives import implicit_rewards

from .harness import last_layers, report
from .harness.reader import Reader
from .harness.recipe import Arm, Columns, Row, commands
from .tasks import questions, reading


def selection_loss(logps: Tensor, ref_logps: Tensor, correct: Tensor, list_sizes: Tensor, *, beta: float) -> Tensor:
    """Mean over lists of the loss above; a list whose answers are all right or all wrong adds 0. All [S] but list_sizes [L]."""
    scores = implicit_rewards(logps, ref_logps, beta)
    return lk.listwise_loss(scores, correct, list_sizes=list_sizes, objective="lambdarank")


class Selection(NamedTuple):
    """The list of a question with M options, in which answers are places among the options."""

    answers: tuple[int, ...]  # without a passage, then with each
    candidates: tuple[int, ...]  # the distinct ones
    right: tuple[bool, ...]  # [M]
    rows: reading.Rows  # every option behind the question and all passages
    ref_logps: Tensor  # [M]: of the start policy, nats

    @property
    def teaches(self) -> bool:
        return len({self.right[place] for place in self.candidates}) > 1


Halves = tuple[list[Selection], list[Selection]]  # for training and for the test


def selected(one: Selection, logps: Tensor) -> int:
    """The candidate that is most likely per token. logps: [M]."""
    per_token = reading.per_token(logps, one.rows)
    return max(one.candidates, key=lambda place: float(per_token[place]))


def measured(lists: Sequence[Selection], logps: Sequence[Tensor]) -> dict[str, float | None]:
    """Shares of questions whose selected answer is right, among all and among those with right and wrong candidates; and of
    questions whose most likely option is right."""
    chosen = [one.right[selected(one, l)] for one, l in zip(lists, logps, strict=True)]
    decided = [value for value, one in zip(chosen, lists, strict=True) if one.teaches]
    free = [one.right[int(reading.per_token(l, one.rows).argmax())] for one, l in zip(lists, logps, strict=True)]
    return {"right": report.mean(chosen), "where it decides": report.mean(decided), "any option": report.mean(free)}


def kind(one: Selection) -> str:
    """Whether a list is trained on, or why it teaches nothing."""
    if one.teaches:
        return "trained on"
    return "one answer" if len(one.candidates) == 1 else "all right" if one.right[one.candidates[0]] else "all wrong"


@dataclass
class SelfSelection(Reader):
    """Each answer alone, the answer selected before and after training, and the oracle, which always selects a right one."""

    name = "selection"
    heading = "answer"
    panels: ClassVar[dict[str, str]] = {"right": "right answers, test half"}
    passages = 2

    @torch.no_grad()
    def prepare(self, model, tokenizer, asked: Sequence[questions.Question]) -> tuple[Any, list[Selection]]:
        """Runs the whole model once: for the answers with one passage or none, and for the lists."""
        batches = []
        for question in asked:
            for shown in ([()], [[passage] for passage in question.passages], [question.passages]):
                batches.append(reading.rows_of(tokenizer, question, shown, score_question=False))
        trained, batches = last_layers.cut(model, batches, self.layers, "selection: frozen layers")
        made = []
        for i, question in enumerate(asked):
            none, alone, together = batches[3 * i : 3 * i + 3]
            scored = torch.cat([reading.per_token(trained(rows=rows), rows) for rows in (none, alone)])
            answers = tuple(scored.view(-1, len(question.options)).argmax(1).tolist())
            right = tuple(value == 1 for value in reading.correct(question).tolist())
            made.append(Selection(answers, tuple(dict.fromkeys(answers)), right, together, trained(rows=together)))
        return trained, made

    def arms(self) -> dict[str, Arm]:
        answers = ("no passage", *(f"passage {k + 1} of BM25" for k in range(len(self.questions[0].passages))))
        return {
            **{answer: partial(self.alone, place=place) for place, answer in enumerate(answers)},
            "selected, before training": self.untrained,
            "selected, after training": self.trained,
            "oracle": self.oracle,
        }

    def alone(self, start: Halves, seed: int, *, place: int) -> Row:
        return {"right": statistics.fmean(one.right[one.answers[place]] for one in start[1])}

    def untrained(self, start: Halves, seed: int) -> Row:
        return measured(start[1], [one.ref_logps for one in start[1]])

    def trained(self, start: Halves, seed: int) -> Row:
        """Trains on the lists with right and wrong candidates; lists: how many of each `kind` there were."""
        training, test = start
        model = self.train([one for one in training if one.teaches], seed)
        with torch.no_grad():
            found = measured(test, [model(rows=one.rows) for one in test])
        return {**found, "lists": dict(Counter(kind(one) for one in training))}

    def loss(self, model, one: Selection) -> Tensor:
        places = torch.tensor(one.candidates)
        correct = torch.tensor([float(one.right[place]) for place in one.candidates])
        logps = model(rows=one.rows)[places]
        return selection_loss(logps, one.ref_logps[places], correct, torch.tensor([len(places)]), beta=self.beta)

    def oracle(self, start: Halves, seed: int) -> Row:
        right = statistics.fmean(any(one.right[place] for place in one.candidates) for one in start[1])
        return {"right": right, "where it decides": 1.0}

    def columns(self, row: Row) -> Columns:
        return {name: row.get(name) for name in ("right", "where it decides", "any option")}

    def notes(self, rows: Sequence[Row]) -> list[str]:
        counts = sum((Counter(row["lists"]) for row in rows if "lists" in row), Counter())
        return [
            f"Of {counts.total()} lists for training, {counts['trained on']} hold both right and wrong answers. The others "
            f"teach nothing and were left out: {counts['one answer']} have one distinct answer, in {counts['all right']} all "
            f"are right, in {counts['all wrong']} all are wrong. 'Where it decides': test lists that hold both. 'Any option': "
            "the likeliest of all options behind all passages, without a list."
        ]


run, main = commands(SelfSelection)

if __name__ == "__main__":
    main()

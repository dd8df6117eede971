"""A compound system of two lists: a retriever's choice of a passage and the choice of an answer, one policy and one loss.

A compound system is a graph of components (here: BM25, a retriever, an answerer) whose parameters are optimised for the metric
of what comes out at its end; the survey arXiv 2410.16392 writes it as empirical risk over a training set. Its optimisers are
LLMs that rewrite prompts; here both components are the same language model, and lists carry the end metric to each of them:

    passages p of BM25  s_p = l(q | p)              r_p = softmax_y(s_y) at the right answer, behind p
    options y           s_y = beta l(y | p*, q) / n r_y = 1 if right, else 0;  p* = argmax_p s_p
    loss = ListNet(s_p; r_p) + ListNet(s_y; r_y),   ListNet(s; r) = -sum softmax(r / temperature) log softmax(s)

l is a log-likelihood, n the option's tokens. A passage's reward is thus the expected correctness of the answer behind it, and
nobody tells the retriever which passage holds the answer. Both lists are one call of `listwise_loss`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

import larpo_kernels as lk

from .harness import last_layers, report
from .harness.reader import Reader
from .harness.recipe import Arm, Columns, Row, commands
from .tasks import questions, reading

ARMS = ("retriever", "answerer", "both")


def two_lists(lists: reading.Lists, right: Tensor, *, beta: float, temperature: float, arm: str = "both") -> Tensor:
    """The loss of one question.

    Args:
        lists: of K passages and M options behind each.
        right: [M], 1 for the right option, else 0.
        arm: which list counts, one of `ARMS`.
    """
    if arm not in ARMS:
        raise ValueError(f"arm must be one of {ARMS}, got {arm!r}")
    answers = beta * lists.options
    rewards = answers.detach().softmax(1) @ right.to(answers)  # [K]
    chosen = answers[int(lists.questions.detach().argmax())]
    scores, relevance = {
        "retriever": ([lists.questions], [rewards]),
        "answerer": ([chosen], [right.to(rewards)]),
        "both": ([lists.questions, chosen], [rewards, right.to(rewards)]),
    }[arm]
    sizes, objective = [len(one) for one in scores], lk.ListNet(temperature=temperature)
    return lk.listwise_loss(torch.cat(scores), torch.cat(relevance), list_sizes=sizes, objective=objective, reduction="sum")


class Case(NamedTuple):
    """A question, the rows that the model reads for it, and its scores before training."""

    question: questions.Question
    rows: reading.Rows
    at_start: reading.Lists


Halves = tuple[list[Case], list[Case]]  # for training and for the test


@torch.no_grad()
def read(model, question: questions.Question, rows: reading.Rows) -> reading.Lists:
    """The model's scores of a question and its options behind each passage."""
    return reading.as_lists(model(rows=rows), rows, len(question.passages))


def measured(cases: Sequence[Case], scores: Sequence[reading.Lists], first: bool = False) -> dict[str, float | None]:
    """Shares of questions; first: BM25's first passage takes the place of the retriever's choice.

    right: the system's answer is right. gold passage: the chosen passage holds the answer. right behind gold: of all passages
    that hold the answer, chosen or not, the share that leads to it.
    """
    answered, found, behind = [], [], []
    for (question, _, _), lists in zip(cases, scores, strict=True):
        right = reading.correct(question)[lists.options.argmax(1)].tolist()
        chosen = 0 if first else int(lists.questions.argmax())
        answered.append(right[chosen])
        found.append(float(question.gold[chosen]))
        behind += [value for value, gold in zip(right, question.gold, strict=True) if gold]
    return {"right": report.mean(answered), "gold passage": report.mean(found), "right behind gold": report.mean(behind)}


@dataclass
class Compound(Reader):
    """The system before training, with one of its two lists trained, and with both; all arms take equally many steps."""

    name = "compound"
    heading = "system"
    panels: ClassVar[dict[str, str]] = {
        "right": "right answers, test half",
        "gold passage": "chosen passage holds the answer",
    }
    passages = 3
    count: int = 76
    epochs: int = 1
    learning_rate: float = 2e-4
    beta: float = 5.0
    temperature: float = 0.1

    def prepare(self, model, tokenizer, asked: Sequence[questions.Question]) -> tuple[Any, list[Case]]:
        rows = [reading.rows_of(tokenizer, one, [[p] for p in one.passages], score_question=True) for one in asked]
        policy, rows = last_layers.cut(model, rows, self.layers, "compound: frozen layers")
        return policy, [Case(one, batch, read(policy, one, batch)) for one, batch in zip(asked, rows, strict=True)]

    def arms(self) -> dict[str, Arm]:
        untrained = {"BM25's first, start": partial(self.untrained, first=True), "start": self.untrained}
        return untrained | {f"{arm} trained": partial(self.trained, arm=arm) for arm in ARMS}

    def untrained(self, start: Halves, seed: int, *, first: bool = False) -> Row:
        """tied: how many passage lists for training have only passages that lead to right answers, or only to wrong ones."""
        training, test = start
        outcomes = [reading.correct(one.question)[one.at_start.options.argmax(1)] for one in training]
        tied = [bool(one[0]) for one in outcomes if len(one.unique()) == 1]
        reach = statistics.fmean(any(one.gold) for one in self.questions)
        counts = {"lists": len(training), "tied": len(tied), "tied right": sum(tied), "within reach": reach}
        return {**measured(test, [one.at_start for one in test], first), **counts}

    def trained(self, start: Halves, seed: int, *, arm: str) -> Row:
        model, test = self.train(start[0], seed, arm=arm), start[1]
        return measured(test, [read(model, one.question, one.rows) for one in test])

    def loss(self, model, one: Case, *, arm: str) -> Tensor:
        """The model in training chooses and rewards the passages."""
        lists = reading.as_lists(model(rows=one.rows), one.rows, len(one.question.passages))
        right = reading.correct(one.question)
        return two_lists(lists, right, beta=self.beta, temperature=self.temperature, arm=arm)

    def columns(self, row: Row) -> Columns:
        return {name: row[name] for name in ("right", "gold passage", "right behind gold")}

    def notes(self, rows: Sequence[Row]) -> list[str]:
        lists, tied, right = (
            sum(row[name] for row in rows if row["arm"] == "start") for name in ("lists", "tied", "tied right")
        )
        return [
            f"For a share of {rows[0]['within reach']:.3f} of the questions some passage of BM25 holds the answer.",
            f"Of {lists} passage lists trained on, {tied} led to equally right answers from all passages before training "
            f"({right} all right, {tied - right} all wrong); expected correctness still orders them. No answer list ties, as "
            "each has one right option. None was dropped.",
        ]


run, main = commands(Compound)

if __name__ == "__main__":
    main()

"""A language model reads questions: rows in which it scores the question behind each passage, and every option behind both.

One row is "Passage: ... Question: q Answer: option 1 option 2 ...", each option behind the prompt alone (see
`larpo.modeling.row_layouts.shared_rows`). On the way to them the same forward gives log p(q | passage), the query
likelihood that language models rank passages by.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from larpo.modeling import row_layouts

from .questions import Question, exact_match

Rows = dict[str, Any]


def rows_of(
    tokenizer: PreTrainedTokenizerBase, question: Question, shown: Sequence[Sequence[str]], *, score_question: bool
) -> Rows:
    """One batch: a row for every set of passages shown, () for none.

    Its candidates are, for E sets and M options, the options behind each set [E * M]; with `score_question`, the question
    behind each set [E] comes before them.
    """

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    asked, options = ids(f" {question.text}"), [ids(f" {option}") for option in question.options]
    before = [ids("".join(f"Passage: {passage}\n" for passage in one) + "Question:") for one in shown]
    behind = ids("\nAnswer:")
    prompts = [head + asked + behind for head in before]
    candidates = [row_layouts.TokenizedCandidate(p, option, i) for i, p in enumerate(prompts) for option in options]
    batch = row_layouts.shared_rows(candidates, tokenizer.pad_token_id, multiple=1)
    if not score_question:
        return batch
    width = batch["input_ids"].shape[1]
    at = [i * width + len(head) - 1 + j for i, head in enumerate(before) for j in range(len(asked))]
    borders = torch.arange(len(shown) + 1) * len(asked)
    return {
        **batch,
        "predictor_positions": torch.cat([torch.tensor(at), batch["predictor_positions"]]),
        "labels": torch.cat([torch.tensor(asked * len(shown)), batch["labels"]]),
        "cu_seqlens": torch.cat([borders, borders[-1] + batch["cu_seqlens"][1:]]),
    }


class Lists(NamedTuple):
    """A model's scores of a batch of `rows_of` with `score_question`, as two kinds of list."""

    questions: Tensor  # [E]: log p(question | passages)
    options: Tensor  # [E, M]: log p(option | passages, question) per token, by which options of several lengths compare


def as_lists(logps: Tensor, batch: Rows, sets: int) -> Lists:
    """logps [E + E * M], of all candidates, nats."""
    return Lists(logps[:sets], per_token(logps, batch)[sets:].view(sets, -1))


def per_token(logps: Tensor, batch: Rows) -> Tensor:
    """[S] log-likelihoods of a batch's candidates, nats per token."""
    return logps / batch["cu_seqlens"].diff()


def correct(question: Question) -> Tensor:
    """[M] float: 1 for the options that match the answer."""
    return torch.tensor([float(exact_match(option, question.answer)) for option in question.options])

"""The facts of a data set, from its lists as they are tokenised for training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import prompt_boundary
from ..converting import Read
from ..tokenization import TokenizationReport, parts_of, values_of
from .spread import Spread, spread_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

EXAMPLES = 3  # lists that are shown
ANSWERS = 8  # of each of them, the best
CHARACTERS = 3000  # of each text


@dataclass(frozen=True)
class LeftOutFor:
    """Rows or answers that are part of no list."""

    what: str  # "row" or "answer"
    reason: str
    count: int
    first: str  # where it was met first


@dataclass(frozen=True)
class Answer:
    """An answer as it is trained on. parts: (whether its tokens count, text)."""

    score: float
    tokens: int
    cut: int  # tokens that it has lost
    parts: tuple[tuple[bool, str], ...]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Answer:
        return cls(**dict(value) | {"parts": tuple(map(tuple, value["parts"]))})


@dataclass(frozen=True)
class Example:
    """A list as it is trained on, its best answers first."""

    row: int
    prompt: str
    prompt_tokens: int
    prompt_cut: int
    answers: tuple[Answer, ...]
    answers_not_shown: int

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Example:
        return cls(**dict(value) | {"answers": tuple(map(Answer.from_json, value["answers"]))})


@dataclass(frozen=True)
class DataSummary:
    """What is in data. `larpo.describe` makes it; `to_json` and `from_json` keep it."""

    # how it was read
    form: str  # by its name in docs/data.md
    scored_by: str
    left_out: tuple[LeftOutFor, ...]
    limits: dict[str, Any]  # max_length and the other settings by which it was tokenised
    refused: str | None  # why it cannot be trained on

    # the lists
    lists: int
    lists_read: int | None  # of which only the first `lists` are described; None: of a stream, nobody knows how many
    candidates: int
    sizes: Spread
    lists_of_one: int  # their loss is 0
    prompts_repeated: int  # lists whose prompt stood before
    completions_repeated: int  # answers whose text stood before in their list

    # scores
    scores: Spread
    lists_all_tied: int  # two answers or more, all with one score
    lists_some_tied: int  # some answers share a score, not all
    pairs: int
    pairs_tied: int
    best_is_longest: int  # lists whose one longest answer has the best score
    best_tokens: float | None  # mean length of answers with the best score of their list, and of those with the worst,
    worst_tokens: float | None  # where these differ

    # tokens, before anything is cut
    prompt_tokens: Spread
    completion_tokens: Spread

    # tokens, as they are trained on
    prompts_cut: int
    completions_cut: int
    completions_empty: int
    completions_equal: int  # answers whose tokens stood before in their list
    completions_with_turns: int  # strings in which a user speaks
    lists_all_equal: int  # they teach nothing
    tokens_counted: int  # of answers: the loss is of them
    tokens_read: int  # of answers, but not written by the policy: they do not count
    tokens_run: int  # through the model in an epoch, each answer with its prompt

    examples: tuple[Example, ...]

    def of(self, reads: Sequence[Read]) -> DataSummary:
        """The same of lists that were in another form before they came here, or that several sources were mixed into."""
        return replace(self, **_reading(reads))

    def of_stream(self) -> DataSummary:
        """The same of the first lists of a stream, whose form is not known any more where it is read."""
        return replace(self, lists_read=None, form="a stream of lists")

    def spreads(self) -> dict[str, Spread]:
        """What histograms are drawn of."""
        return {
            "Answers of a list": self.sizes,
            "Scores": self.scores,
            "Tokens of a prompt": self.prompt_tokens,
            "Tokens of an answer": self.completion_tokens,
        }

    def to_json(self) -> dict[str, Any]:
        """As objects and arrays of JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DataSummary:
        """What `to_json` gave. Raises ValueError where it is something else."""
        names = {one.name for one in fields(cls)}
        if not isinstance(value, Mapping) or set(value) != names:
            raise ValueError("expected a summary of data as this version of larpo writes it")
        spreads = ("sizes", "scores", "prompt_tokens", "completion_tokens")
        kept = {
            "left_out": tuple(LeftOutFor(**one) for one in value["left_out"]),
            "examples": tuple(map(Example.from_json, value["examples"])),
            **{name: Spread.from_json(value[name]) for name in spreads},
        }
        return cls(**dict(value) | kept)


def summarise(
    read: Read,
    tokenised: Dataset,
    report: TokenizationReport,
    tokenizer: PreTrainedTokenizerBase,
    limits: Mapping[str, Any],
    *,
    lists_read: int | None = None,
    refused: str | None = None,
) -> DataSummary:
    """The facts of data that has been tokenised: nothing is tokenised again, and no row but the examples is looked at.

    lists_read: how many lists there were, where only some are tokenised.
    """
    scores, sizes = values_of(tokenised, "scores"), lengths_of(tokenised, "scores")
    starts = np.cumsum(sizes) - sizes
    prompts, completions = np.asarray(report.prompt_lengths), np.asarray(report.completion_lengths)
    kept = int(lengths_of(tokenised, "completion_ids").sum())
    return DataSummary(
        **_reading([read]),
        limits=dict(limits),
        refused=refused,
        lists=report.lists,
        lists_read=report.lists if lists_read is None else lists_read,
        candidates=report.candidates,
        sizes=spread_of(sizes),
        lists_of_one=report.lists_of_one,
        prompts_repeated=report.lists - len(np.unique(report.prompt_hashes)),
        completions_repeated=report.completions_repeated,
        scores=spread_of(scores),
        lists_all_tied=report.lists_all_tied,
        **_ties(scores, sizes),
        **_lengths_and_scores(scores, completions, sizes, starts),
        prompt_tokens=spread_of(prompts),
        completion_tokens=spread_of(completions),
        prompts_cut=report.prompts_truncated,
        completions_cut=report.completions_truncated,
        completions_empty=report.completions_empty,
        completions_equal=report.completions_equal,
        completions_with_turns=report.completions_with_turns,
        lists_all_equal=report.lists_all_equal,
        tokens_counted=kept - report.tokens_read,
        tokens_read=report.tokens_read,
        tokens_run=kept + int(lengths_of(tokenised, "prompt_ids") @ sizes),
        examples=tuple(
            _example(tokenised[i], i, tokenizer, int(prompts[i]), completions[starts[i] : starts[i] + sizes[i]])
            for i in _shown(sizes)
        ),
    )


def lengths_of(tokenised: Dataset, column: str) -> np.ndarray:
    """How long each list of numbers in a column is; of lists of lists the inner ones, one after the other."""
    import pyarrow
    import pyarrow.compute

    values = tokenised.select_columns(column).with_format("arrow")[:][column]
    if not pyarrow.types.is_primitive(values.type.value_type):
        values = pyarrow.compute.list_flatten(values)
    return pyarrow.compute.list_value_length(values).to_numpy().astype(np.int64)


def _reading(reads: Sequence[Read]) -> dict[str, Any]:
    """What form each source had, what scores it, and what was left out of it."""
    left_out = (
        LeftOutFor(what, reason, n, read.left_out.first[reason])
        for read in reads
        for what, counts in (("row", read.left_out.rows), ("answer", read.left_out.answers))
        for reason, n in counts.most_common()
    )
    return {
        "form": ", ".join(dict.fromkeys(read.form.name for read in reads)),
        "scored_by": ", ".join(dict.fromkeys(str(read.reader.scores or "no scores").replace("`", "") for read in reads)),
        "left_out": tuple(left_out),
    }


def _ties(scores: np.ndarray, sizes: np.ndarray) -> dict[str, int]:
    """Runs of equal scores within a list, however long it is."""
    owner = np.repeat(np.arange(len(sizes)), sizes)
    order = np.lexsort((scores, owner))
    owner, scores = owner[order], scores[order]
    begins = np.flatnonzero(np.r_[True, (np.diff(owner) != 0) | (np.diff(scores) != 0)])
    runs = np.diff(np.r_[begins, len(scores)])
    largest = np.zeros(len(sizes), dtype=np.int64)
    np.maximum.at(largest, owner[begins], runs)
    return {
        "lists_some_tied": int(((largest > 1) & (largest < sizes)).sum()),
        "pairs": int((sizes * (sizes - 1) // 2).sum()),
        "pairs_tied": int((runs * (runs - 1) // 2).sum()),
    }


def _lengths_and_scores(scores: np.ndarray, lengths: np.ndarray, sizes: np.ndarray, starts: np.ndarray) -> dict[str, Any]:
    """Whether what is better is longer: a policy learns that first."""
    best, worst = (np.repeat(edge.reduceat(scores, starts), sizes) for edge in (np.maximum, np.minimum))
    differ = best > worst
    longest = lengths == np.repeat(np.maximum.reduceat(lengths, starts), sizes)
    alone = np.add.reduceat(longest.astype(np.int64), starts) == 1
    best_and_longest = np.add.reduceat((longest & differ & (scores == best)).astype(np.int64), starts) > 0
    return {
        "best_is_longest": int((alone & best_and_longest).sum()),
        "best_tokens": _mean(lengths[differ & (scores == best)]),
        "worst_tokens": _mean(lengths[differ & (scores == worst)]),
    }


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None


def _shown(sizes: np.ndarray) -> list[int]:
    """The first list, one in the middle and the last, of those in which something is compared, if there are any."""
    several = np.flatnonzero(sizes > 1)
    rows = several if several.size else np.arange(len(sizes))
    return sorted({int(rows[i]) for i in np.linspace(0, len(rows) - 1, EXAMPLES).astype(int)})


def _example(
    row: Mapping[str, Any], i: int, tokenizer: PreTrainedTokenizerBase, prompt_length: int, lengths: np.ndarray
) -> Example:
    order = sorted(range(len(row["scores"])), key=lambda k: -row["scores"][k])
    prompt = prompt_boundary.decode(tokenizer, row["prompt_ids"])
    return Example(
        row=i,
        prompt=("…" if len(prompt) > CHARACTERS else "") + prompt[-CHARACTERS:],
        prompt_tokens=len(row["prompt_ids"]),
        prompt_cut=prompt_length - len(row["prompt_ids"]),
        answers=tuple(
            Answer(
                score=row["scores"][k],
                tokens=len(row["completion_ids"][k]),
                cut=int(lengths[k]) - len(row["completion_ids"][k]),
                parts=_shortened(parts_of(tokenizer, row, k)),
            )
            for k in order[:ANSWERS]
        ),
        answers_not_shown=max(len(order) - ANSWERS, 0),
    )


def _shortened(parts: list[tuple[bool, str]]) -> tuple[tuple[bool, str], ...]:
    kept, room = [], CHARACTERS
    for counted, text in parts:
        if room <= 0:
            break
        kept.append((counted, text if len(text) <= room else text[:room] + "…"))
        room -= len(text)
    return tuple(kept)

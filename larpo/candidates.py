"""Candidate lists: what happens to them between sampling and training ("candidate list construction" in LarPO,
arXiv 2502.03699).

Pure functions from lists to lists, each named after its idea. None changes its input, and a function that removes or
adds candidates returns their number as its second value.

| idea | function |
|---|---|
| a candidate found twice counts once | `deduplicate` |
| retrieve, then rerank | `rank` |
| which candidates of a long list are trained on | `top_bottom`, `hard_negatives` |
| negatives from elsewhere, easy to hard | `random_negatives`, `negatives_of_related_prompt` |
| earlier iterations are remembered | `memorise` |
| a list without an order teaches nothing | `drop_uninformative` |
"""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from .data.json_text import read_message
from .data.validation import present
from .rewards import Text, text_of

# (top, bottom) of each objective in the paper's main experiment, out of k = 10; None stands for all the others.
PAPER_SUBSETS: dict[str, tuple[int, int | None]] = {
    "pairwise": (1, 1),
    "contrastive": (1, 3),
    "lambdarank": (2, 2),
    "listmle": (2, 2),
}
RELATED = "related prompt"  # `Candidate.source` of added negatives
RANDOM = "random prompt"


@dataclass(frozen=True)
class Candidate:
    """One completion of a prompt."""

    completion: Text  # a string, or messages
    score: float | None = None  # the reward, finite, higher is better; None: not scored, or no reward could
    source: str = ""  # the iteration or the kind of negative that it comes from
    completion_ids: tuple[int, ...] | None = None  # the exact tokens, as sampled
    ref_logp: float | None = None  # sum over its tokens under the reference, nats
    logp: float | None = None  # the same under the policy
    completion_mask: tuple[bool, ...] | None = None  # which of completion_ids count; None: all

    @property
    def num_tokens(self) -> int | None:
        """The tokens that ref_logp and logp are sums over; None where they are not known."""
        if self.completion_ids is None:
            return None
        return len(self.completion_ids) if self.completion_mask is None else sum(self.completion_mask)

    def __post_init__(self):
        if self.score is not None and not math.isfinite(self.score):
            raise ValueError(f"score must be finite, or None for a candidate without one; got {self.score}")


@dataclass(frozen=True)
class PromptList:
    """A prompt and its candidates."""

    prompt: Text
    candidates: tuple[Candidate, ...]
    prompt_ids: tuple[int, ...] | None = None

    def to_row(self) -> dict[str, Any]:
        """The data row: prompt, completions, scores, source, and prompt_ids, completion_ids, completion_mask, ref_logps,
        logps where known.

        `ref_logps` and `logps` are written if every candidate has one. Scores may hold None (`rank` drops such
        candidates before training). Raises ValueError where only some candidates have tokens, or the prompt has none
        beside them: text can't replace tokens.
        """
        candidates = self.candidates
        row: dict[str, Any] = {
            "prompt": self.prompt,
            "completions": [c.completion for c in candidates],
            "scores": [c.score for c in candidates],
            "source": [c.source for c in candidates],
        }
        with_tokens = sum(c.completion_ids is not None for c in candidates)
        if 0 < with_tokens < len(candidates):
            raise ValueError(
                f"{with_tokens} of {len(candidates)} candidates of {_shown(self)} have completion_ids; expected all or none"
            )
        if with_tokens:
            if self.prompt_ids is None:
                raise ValueError(f"the candidates of {_shown(self)} have completion_ids, but it has no prompt_ids")
            row["prompt_ids"] = list(self.prompt_ids)
            row["completion_ids"] = [list(c.completion_ids) for c in candidates]
            if any(c.completion_mask is not None for c in candidates):
                row["completion_mask"] = [list(c.completion_mask or (True,) * c.num_tokens) for c in candidates]
        for column, values in (("ref_logps", [c.ref_logp for c in candidates]), ("logps", [c.logp for c in candidates])):
            if values and None not in values:
                row[column] = values
        return row

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> PromptList:
        """The inverse of `to_row`. Optional columns may be absent or None; a score of NaN is read as None.

        Raises ValueError for a column with another number of values than `completions`.
        """
        completions = list(row["completions"])
        names = ("scores", "source", "completion_ids", "ref_logps", "logps", "completion_mask")
        columns = [_column(row, name, len(completions)) for name in names]
        prompt_ids = row.get("prompt_ids")
        return cls(
            prompt=_plain(row["prompt"]),
            candidates=tuple(
                Candidate(
                    completion=_plain(completion),
                    score=None if score is None or math.isnan(score) else float(score),
                    source=source or "",
                    completion_ids=None if ids is None else tuple(map(int, ids)),
                    ref_logp=None if ref_logp is None else float(ref_logp),
                    logp=None if logp is None else float(logp),
                    completion_mask=None if mask is None else tuple(map(bool, mask)),
                )
                for completion, score, source, ids, ref_logp, logp, mask in zip(completions, *columns, strict=True)
            ),
            prompt_ids=None if prompt_ids is None else tuple(map(int, prompt_ids)),
        )


def to_rows(lists: Iterable[PromptList]) -> list[dict[str, Any]]:
    """A row per list, all with the same columns: a column that some lists lack is None there."""
    rows = [one.to_row() for one in lists]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return [{column: row.get(column) for column in columns} for row in rows]


def from_rows(rows: Iterable[Mapping[str, Any]]) -> list[PromptList]:
    return [PromptList.from_row(row) for row in rows]


def _column(row: Mapping[str, Any], name: str, size: int) -> list:
    values = row.get(name)
    if values is None:
        return [None] * size
    if len(values) != size:
        raise ValueError(f"{name} has {len(values)} values; expected one for each of the {size} completions")
    return list(values)


def _plain(text: Any) -> Text:
    """A string or a list of messages; parquet through pandas gives arrays of messages, data sets give tool calls as text."""
    return text if isinstance(text, str) else [read_message(present(message)) for message in text]


def _key(text: Text) -> str:
    """What two equal texts share, and a string and a list of messages never."""
    if isinstance(text, str):
        return f"text {text}"
    return f"messages {json.dumps([present(message) for message in text], sort_keys=True)}"


# --- one list at a time ------------------------------------------------------------------------------------


def deduplicate(lists: Sequence[PromptList]) -> tuple[list[PromptList], int]:
    """Keep the first of candidates that are the same: same tokens if both have tokens, else same text.

    Returns:
        The lists, and the number of candidates removed.
    """
    kept = [replace(one, candidates=_distinct(one.candidates)) for one in lists]
    return kept, _count(lists) - _count(kept)


def _distinct(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    kept: list[Candidate] = []
    tokens: set[tuple[int, ...]] = set()
    texts: set[str] = set()  # of every kept candidate
    texts_only: set[str] = set()  # of those without tokens
    for candidate in candidates:
        text, ids = _key(candidate.completion), candidate.completion_ids
        if text in texts if ids is None else (ids in tokens or text in texts_only):
            continue
        kept.append(candidate)
        texts.add(text)
        if ids is None:
            texts_only.add(text)
        else:
            tokens.add(ids)
    return tuple(kept)


def rank(lists: Sequence[PromptList], unscored: Literal["drop", "last"] = "drop") -> tuple[list[PromptList], int]:
    """Sort every list by score, best first: the reranker's step. Equal scores keep their order.

    Args:
        lists: prompts with candidates in any order.
        unscored: "drop" removes candidates whose score is None, "last" keeps them behind the others.

    Returns:
        The lists, and the number of candidates without a score.
    """
    if unscored not in ("drop", "last"):
        raise ValueError(f"unscored must be 'drop' or 'last', got {unscored!r}")
    ranked, without = [], 0
    for one in lists:
        scored = sorted((c for c in one.candidates if c.score is not None), key=lambda c: -c.score)
        rest = [c for c in one.candidates if c.score is None]
        without += len(rest)
        ranked.append(replace(one, candidates=tuple(scored + rest if unscored == "last" else scored)))
    return ranked, without


def top_bottom_indices(scores: Sequence[float], top: int, bottom: int | None) -> list[int]:
    """Positions of the `top` best and the `bottom` worst, best first. Equal scores keep their order.

    Args:
        scores: of the candidates of one list, higher is better.
        top: how many of the best.
        bottom: how many of the worst; None for all the others: `top_bottom_indices(scores, 1, None)` is the best against the
            rest, that is, the whole list ranked.

    Returns:
        Positions in `scores`, none twice: of a list shorter than top + bottom, all of them.

    >>> top_bottom_indices([0.1, 0.9, 0.5, 0.7, 0.3], top=1, bottom=2)
    [1, 4, 0]
    """
    if top < 0 or (bottom is not None and bottom < 0) or (top == 0 and bottom == 0):
        raise ValueError(f"top and bottom must be at least 0 and not both 0, got top={top}, bottom={bottom}")
    if any(score is None or math.isnan(score) for score in scores):
        raise ValueError(f"scores must be numbers, got {list(scores)}; rank(...) drops candidates without one")
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    if bottom is None or top + bottom >= len(order):
        return order
    return order[:top] + order[len(order) - bottom :]


def top_bottom(lists: Sequence[PromptList], top: int, bottom: int | None) -> list[PromptList]:
    """The `top` best and the `bottom` worst of every list as one ranked list: the paper's subsets (see `PAPER_SUBSETS`).

    The paper trains contrastive on (1, 3), LambdaRank and ListMLE on (2, 2); (1, None) is the best against all others.

    Args:
        lists: prompts with scored candidates.
        top: how many of the best.
        bottom: how many of the worst; None for all the others.

    Raises:
        ValueError: a candidate has no score, or top and bottom are both 0.
    """
    return [_only(one, top_bottom_indices(_scores(one), top, bottom)) for one in lists]


class Informative(NamedTuple):
    """What `drop_uninformative` returns; every list is in exactly one of the three."""

    kept: list[PromptList]  # the lists to train on
    tied: list[PromptList]  # all scores are equal
    short: list[PromptList]  # fewer than two candidates have a score


def drop_uninformative(lists: Sequence[PromptList]) -> Informative:
    """Separate the lists that have an order to learn from those that have none."""
    parts = Informative([], [], [])
    for one in lists:
        scores = [c.score for c in one.candidates if c.score is not None]
        part = parts.short if len(scores) < 2 else parts.tied if min(scores) == max(scores) else parts.kept
        part.append(one)
    return parts


# --- negatives ---------------------------------------------------------------------------------------------


def hard_negatives(lists: Sequence[PromptList], top: int = 1, negatives: int = 3, low_reward: float = 0.5) -> list[PromptList]:
    """The best candidates, and those of low reward that the policy finds most likely (LarPO's hard negatives).

    Args:
        lists: prompts with scored candidates.
        top: how many of the best.
        negatives: how many of low reward. They are taken by `logp` per token, so that short candidates have no advantage;
            fewer if there are not so many.
        low_reward: which share of a list, rounded up, counts as of low reward.

    Returns:
        Ranked lists.

    Raises:
        ValueError: a candidate has no score, or one of low reward no logp or tokens.
    """
    if top < 0 or negatives < 1 or not 0 < low_reward <= 1:
        raise ValueError(
            "expected top >= 0, negatives >= 1 and 0 < low_reward <= 1, "
            f"got top={top}, negatives={negatives}, low_reward={low_reward}"
        )
    chosen = []
    for one in rank(lists, unscored="last")[0]:
        size = len(_scores(one))
        first = max(top, size - math.ceil(low_reward * size))
        likely = sorted(range(first, size), key=lambda i: -_logp_per_token(one, i))
        order = [*range(min(top, size)), *sorted(likely[:negatives])]
        chosen.append(_only(one, order))
    return chosen


def _logp_per_token(one: PromptList, i: int) -> float:
    candidate = one.candidates[i]
    if candidate.logp is None or candidate.completion_ids is None:
        raise ValueError(f"a candidate of {_shown(one)} lacks logp or completion_ids, which hard negatives are ranked by")
    return candidate.logp / candidate.num_tokens if candidate.num_tokens else -math.inf


def random_negatives(lists: Sequence[PromptList], n: int = 1, *, seed: int) -> tuple[list[PromptList], int]:
    """Add n candidates of other prompts, drawn at random: the easiest negatives.

    Their score is not a reward: all get the score of the list's worst candidate less 1.

    Args:
        lists: prompts with candidates.
        n: how many for each list.
        seed: of the draw.

    Returns:
        The lists, and the number of candidates added, which is below n per list if other prompts have too few that differ.
    """
    draw = random.Random(seed)
    keys = [_key(one.prompt) for one in lists]
    everything = [(key, candidate) for key, one in zip(keys, lists, strict=True) for candidate in one.candidates]
    own = Counter(key for key, _ in everything)
    result = []
    for key, one in zip(keys, lists, strict=True):
        # At most own[key] of the drawn are of this prompt; the slack is for texts that the list already holds.
        drawn = draw.sample(everything, min(len(everything), own[key] + 4 * n))
        result.append(_with_negatives(one, [candidate for other, candidate in drawn if other != key], n, RANDOM))
    return result, _count(result) - _count(lists)


def negatives_of_related_prompt(lists: Sequence[PromptList], n: int = 1) -> tuple[list[PromptList], int]:
    """Add the n best candidates of the most similar other prompt: good text that answers another question.

    These negatives are harder than `random_negatives`. To use both, add these first, so that they rank above the random ones.
    Their score is not a reward: all get the score of the list's worst candidate less 1.

    Returns:
        The lists, and the number of candidates added, which is 0 for a prompt that shares no word with another one.
    """
    ranked, _ = rank(lists, unscored="last")
    nearest = related_prompts([one.prompt for one in lists])
    result = [
        one if other is None else _with_negatives(one, ranked[other].candidates, n, RELATED)
        for one, other in zip(lists, nearest, strict=True)
    ]
    return result, _count(result) - _count(lists)


def _with_negatives(one: PromptList, others: Iterable[Candidate], n: int, source: str) -> PromptList:
    """`one` with the first n of `others` that it does not hold yet, as negatives.

    Their score is by rule, not by reward: 1 below the list's worst, all the same. Log-likelihoods are dropped,
    since they were measured behind another prompt.
    """
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}")
    worst = min(_scores(one), default=0.0)
    candidates = list(one.candidates)
    known = {_key(candidate.completion) for candidate in candidates}
    for other in others:
        if len(candidates) == len(one.candidates) + n:
            break
        if _key(other.completion) not in known:
            known.add(_key(other.completion))
            candidates.append(replace(other, score=worst - 1.0, source=source, ref_logp=None, logp=None))
    return replace(one, candidates=tuple(candidates))


def related_prompts(prompts: Sequence[Text]) -> list[int | None]:
    """For every prompt the position of the most similar other one by BM25 over lower-case words; None if none shares a word.

    Prompts that are equal are no relatives: their candidates answer the same question. Ties go to the first.
    (BM25 as Robertson and Zaragoza 2009, with k1 = 1.5, b = 0.75, and an idf that stays positive.)

    >>> related_prompts(["the capital of France", "a fish soup", "the capital of Peru", "how to cook fish"])
    [2, 3, 0, 1]
    """
    k1, b = 1.5, 0.75
    keys = [_key(prompt) for prompt in prompts]
    same: dict[str, list[int]] = {}
    for i, key in enumerate(keys):
        same.setdefault(key, []).append(i)
    words = [Counter(re.findall(r"\w+", text_of(prompt).lower())) for prompt in prompts]
    lengths = np.array([sum(counts.values()) for counts in words], float)
    norms = k1 * (1 - b + b * lengths / max(lengths.mean(), 1.0)) if prompts else lengths
    holders: dict[str, list[int]] = {}
    for i, counts in enumerate(words):
        for word in counts:
            holders.setdefault(word, []).append(i)
    weights = {}  # word -> (positions that hold it, what it adds to their score)
    for word, positions in holders.items():
        at = np.array(positions)
        often = np.array([words[i][word] for i in positions], float)
        idf = math.log1p((len(prompts) - len(at) + 0.5) / (len(at) + 0.5))
        weights[word] = at, idf * often * (k1 + 1) / (often + norms[at])
    nearest: list[int | None] = []
    for i, counts in enumerate(words):
        similarity = np.zeros(len(prompts))
        for word in counts:
            at, weight = weights[word]
            similarity[at] += weight
        similarity[same[keys[i]]] = 0.0
        best = int(similarity.argmax())
        nearest.append(best if similarity[best] > 0 else None)
    return nearest


# --- memory ------------------------------------------------------------------------------------------------


def memorise(old: Sequence[PromptList], new: Sequence[PromptList]) -> tuple[list[PromptList], int]:
    """Merge earlier iterations' lists with the new ones (algorithm 1, "memorisation"), prompt by prompt.

    The candidates of a prompt become one pool: deduplicated (the earlier one stays, with its source), re-ranked,
    unscored ones last. `ref_logp` and `logp` are dropped: they must be recomputed under the current reference and policy.
    Prompts that only one side has are kept. Choose the subset afterwards (`top_bottom`), because the best may be an old one.

    Returns:
        The lists, in order of first appearance, and the number of duplicates removed.
    """
    pools: dict[str, list[PromptList]] = {}
    for one in (*old, *new):
        pools.setdefault(_key(one.prompt), []).append(one)
    merged = [
        PromptList(
            prompt=same[0].prompt,
            candidates=tuple(replace(c, ref_logp=None, logp=None) for one in same for c in one.candidates),
            prompt_ids=next((one.prompt_ids for one in same if one.prompt_ids is not None), None),
        )
        for same in pools.values()
    ]
    distinct, duplicates = deduplicate(merged)
    return rank(distinct, unscored="last")[0], duplicates


# ---


def _only(one: PromptList, positions: Iterable[int]) -> PromptList:
    return replace(one, candidates=tuple(one.candidates[i] for i in positions))


def _count(lists: Iterable[PromptList]) -> int:
    return sum(len(one.candidates) for one in lists)


def _scores(one: PromptList) -> list[float]:
    scores = [candidate.score for candidate in one.candidates]
    if None in scores:
        raise ValueError(f"candidate {scores.index(None)} of {_shown(one)} has no score; rank(...) drops such candidates")
    return scores


def _shown(one: PromptList) -> str:
    prompt = str(one.prompt)
    return f"prompt {prompt[:57] + '...' if len(prompt) > 60 else prompt!r}"

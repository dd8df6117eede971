"""The scores that lists are ranked and trained by: rewards, weighted and adjusted as the settings say."""

from __future__ import annotations

from collections import defaultdict

from ..rewards import combined
from ..runs.files import Rows, plain
from .config import AlignConfig
from .prompts import key_of


def to_train_by(config: AlignConfig, rows: Rows) -> Rows:
    """The rows of candidates.parquet, of one iteration or several, with these scores. With normalise_rewards they are
    normalised over all candidates of a prompt, from any iteration; a number as `truncated` lowers those that have no end."""
    if config.normalise_rewards:
        rows = _normalised(config, rows)
    if config.truncated in ("keep", "exclude"):
        return rows
    return [row | {"scores": _lowered(row["scores"], row["finished"], config.truncated)} for row in rows]


def _normalised(config: AlignConfig, rows: Rows) -> Rows:
    lists = defaultdict(list)
    for i, row in enumerate(rows):
        lists[key_of({"prompt": plain(row["prompt"])})].append(i)  # files of two iterations may fill in other keys
    scores = {}
    for members in lists.values():
        said = [values for i in members for values in rows[i]["rewards"]]
        found = iter(combined(list(zip(*said, strict=True)), config.reward_weights, normalise=True))
        scores |= {i: [next(found) for _ in rows[i]["completions"]] for i in members}
    return [row | {"scores": scores[i]} for i, row in enumerate(rows)]


def _lowered(scores: list[float | None], finished: list[bool], penalty: float) -> list[float | None]:
    return [
        None if score is None else score if ended else score - penalty for score, ended in zip(scores, finished, strict=True)
    ]

"""What several rewards come to for each completion."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from .asked import Asked
from .judge import Judge, Reward, RewardError, name_of
from .memory import Memory, Values
from .text import Text

logger = logging.getLogger("larpo.rewards")

ROUNDING = 1e-9  # of sums of normalised rewards
NOISE = 1e-6  # rewards of a list that differ by less than this part of their size are taken for equal


def score(
    rewards: Reward | Sequence[Reward],
    weights: Sequence[float] | None,
    prompts: Sequence[Text],
    completions: Sequence[Text],
    *,
    on_error: Literal["raise", "skip"] = "raise",
    **columns,
) -> Values:
    """The weighted sum of the rewards of every completion.

    A reward that gives None for a completion has no opinion on it: its sum is over the other rewards, and is None where no
    reward has one. (Such a sum misses a term, so it is comparable within a list only if the reward has no opinion on the whole
    list. Drop the candidate if that matters.)

    Args:
        rewards: one reward or several.
        weights: one per reward; None for 1 each.
        prompts: the prompt of each completion, text or messages.
        completions: what is scored, text or messages.
        on_error: "raise", or "skip": a reward that fails has no opinion on any completion of this call; the failure
            and the number of completions go to the log as a warning.
        columns: handed to every reward; a list must have one value per completion.

    Raises:
        RewardError: a reward raised; it is named, and its exception is the cause. A RuntimeError.
        ValueError: a reward gave another number of values, or something else than finite numbers; lengths that don't fit.
    """
    rewards = list(rewards) if isinstance(rewards, Sequence) else [rewards]
    check_weights(weights, len(rewards))
    values = judged(rewards, prompts, completions, columns, on_error=on_error)
    return combined(values, weights)


def judged(
    rewards: Sequence[Reward],
    prompts: Sequence[Text],
    completions: Sequence[Text],
    columns: Mapping[str, Any],
    *,
    on_error: Literal["raise", "skip"] = "raise",
    memory: Memory | None = None,
) -> list[Values]:
    """The values of each reward for every completion; see `score`. memory: where values are looked up first, and kept."""
    if not rewards:
        raise ValueError("rewards is empty; expected at least one reward")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
    for name, column in {"prompts": prompts, **columns}.items():
        if isinstance(column, list) and len(column) != len(completions):
            raise ValueError(f"{name} has {len(column)} values; expected one for each of the {len(completions)} completions")
    if not completions:
        return [[] for _ in rewards]
    asked = Asked(prompts, completions, dict(columns))
    judges = [Judge.of(reward) for reward in rewards]
    if memory is not None:
        refuse_alike(judges)
    values = []
    for judge in judges:
        try:
            values.append(judge.values(asked, memory))
        except (RewardError, ValueError) as error:
            if on_error == "raise":
                raise
            logger.warning("%s; skipped for %d completions", error, len(completions))
            values.append([None] * len(completions))
    return values


def refuse_alike(judges: Sequence[Judge]) -> None:
    """Raises ValueError for two judges that are remembered under one identity: their answers would be mixed up."""
    known = [(judge, judge.identity) for judge in judges if judge.remember]
    for i, (judge, identity) in enumerate(known):
        if identity is not None and any(identity == other for _, other in known[:i]):
            raise ValueError(
                f"two rewards {name_of(judge)!r} have the same code and the same plain values, and what one has said would be "
                "taken for the other's: give one of them another `version`"
            )


def combined(values: Sequence[Values], weights: Sequence[float] | None = None, *, normalise: bool = False) -> Values:
    """The weighted sum over the rewards, for every completion: over those that have an opinion on it, None where none has.

    normalise: these are the completions of one list, and every reward is first brought to mean 0 and standard deviation 1 over
        it, so that no reward outweighs another by its scale, as in GDPO (arXiv 2601.05242; its last step, which normalises the
        sums over a batch, is left out: it changes no order within a list). A reward that gives all the same says nothing: 0.

    >>> combined([[1.0, 3.0], [0.0, None]], [1.0, 10.0])
    [1.0, 3.0]
    >>> combined([[1.0, 3.0], [700.0, 500.0]], [1.0, 0.5], normalise=True)
    [-0.5, 0.5]
    """
    check_weights(weights, len(values))
    weights = [1.0] * len(values) if weights is None else weights
    sums: Values = [None] * len(values[0])
    for weight, of_one in zip(weights, values, strict=True):
        for i, value in enumerate(_normalised(of_one) if normalise else of_one):
            if value is not None:
                sums[i] = (sums[i] or 0.0) + weight * value
    return _equal_up_to_rounding(sums, ROUNDING * sum(map(abs, weights))) if normalise else sums


def _equal_up_to_rounding(sums: Values, noise: float) -> Values:
    """Of rewards that cancel out, rounding would make an order."""
    known = sorted((i for i, value in enumerate(sums) if value is not None), key=lambda i: sums[i])
    for lower, i in itertools.pairwise(known):
        if sums[i] - sums[lower] <= noise:
            sums[i] = sums[lower]
    return sums


def _normalised(values: Values) -> Values:
    known = np.array([value for value in values if value is not None], float)
    if not len(known):
        return values
    mean, spread = float(known.mean()), float(known.std())
    if spread <= NOISE * float(np.abs(known).max()):
        return [None if value is None else 0.0 for value in values]
    return [None if value is None else (value - mean) / spread for value in values]


def check_weights(weights: Sequence[float] | None, n: int, name: str = "weights") -> None:
    if weights is not None and len(weights) != n:
        raise ValueError(f"{name} has {len(weights)} values; expected one for each of the {n} rewards")

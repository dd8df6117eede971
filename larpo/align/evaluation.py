"""Figures of a policy from its held-out completions: reward and KL always together, since a reward can be hacked."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import retrieval
from ..runs.files import Rows
from .config import AlignConfig


def metrics(rows: Rows, start: Rows, config: AlignConfig) -> dict[str, Any]:
    """The figures of a policy, out of the rows of its evaluation.parquet and those of the initial policy.

    reward, win_rate (against the start), kl (of the policy to the initial model, nats per completion) are at temperature 1,
    as {mean, low, high}; best_of_n and recall_at_n are {temperature: {n: value}}. Prompts where a completion has no
    score are left out of all but `reward`, which leaves out the completion. None: nothing is left.
    """
    ours, theirs = ([row for row in one if row["temperature"] == 1.0] for one in (rows, start))
    complete = [i for i, pair in enumerate(zip(ours, theirs, strict=True)) if all(None not in row["scores"] for row in pair)]
    scored = [[score for score in row["scores"] if score is not None] for row in ours]
    scored = [scores for scores in scored if scores]
    d = [np.subtract(row["logps"], row["initial_logps"]) for row in ours]
    kl = retrieval.kl_estimate([row["logps"] for row in ours], [row["initial_logps"] for row in ours])
    ends = [len(ids) for row in ours for ids in row["completion_ids"]]
    return {
        "prompts": len(ours),
        "reward": _estimate(retrieval.mean_reward(scored)) if scored else None,
        "win_rate": _estimate(retrieval.win_rate(_scores(ours, complete), _scores(theirs, complete))) if complete else None,
        "kl": _estimate(kl),
        "kl_per_token": float(np.sum(d) / max(sum(ends), 1)),
        "distinct": float(np.mean([len(set(map(tuple, row["completion_ids"]))) / len(row["completion_ids"]) for row in ours])),
        "tokens_per_completion": float(np.mean(ends)),
        "unscored": sum(score is None for row in rows for score in row["scores"]),
        "best_of_n": _by_temperature(rows, config, retrieval.best_of_n),
        "recall_at_n": None
        if config.solved_above is None
        else _by_temperature(rows, config, lambda rewards, ns: retrieval.recall_at_n(rewards > config.solved_above, ns)),
    }


def ns_up_to(k: int) -> list[int]:
    """1, 2, 4, ... and k.

    >>> ns_up_to(6)
    [1, 2, 4, 6]
    """
    return sorted({min(2**i, k) for i in range(k.bit_length() + 1)})


def _by_temperature(rows: Rows, config: AlignConfig, curve: Any) -> dict[str, dict[str, float]]:
    found = {}
    ns = ns_up_to(config.eval_k)
    for temperature in config.eval_temperatures:
        of = [row for row in rows if row["temperature"] == temperature]
        complete = [i for i, row in enumerate(of) if None not in row["scores"]]
        if complete:
            values = curve(_scores(of, complete), ns)
            found[f"{temperature:g}"] = {str(n): float(value) for n, value in zip(ns, values, strict=True)}
    return found


def _scores(rows: Rows, at: list[int]) -> np.ndarray:
    return np.array([rows[i]["scores"] for i in at], float)


def _estimate(estimate: retrieval.Estimate) -> dict[str, float | None]:
    return {name: None if np.isnan(value) else float(value) for name, value in estimate._asdict().items()}


def interval(estimate: dict[str, float | None]) -> str:
    """A mean with half the width of its interval.

    >>> interval({"mean": 0.5, "low": 0.25, "high": 0.75})
    '+0.50 ± 0.25'
    """
    half = "" if estimate["low"] is None else f" ± {(estimate['high'] - estimate['low']) / 2:.2f}"
    return f"{estimate['mean']:+.2f}{half}"

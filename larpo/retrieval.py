"""Evaluation as a retriever: how often is a right completion among N, how good is the best of N, how far did the policy move.

Rewards are arrays [prompts, k]: k independent completions per prompt, drawn at one temperature. Prompts are the unit of
every interval, since completions of one prompt resemble each other: means are taken per prompt first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A mean and its confidence interval; the bounds are NaN where one prompt alone allows none."""

    mean: float
    low: float
    high: float


# --- N completions per prompt ------------------------------------------------------------------------------


def expected_best(rewards: np.ndarray, ns: Sequence[int]) -> np.ndarray:
    """The expected maximum of n of a prompt's k rewards, drawn without replacement.

    Exact, from order statistics: the j-th smallest is the maximum of comb(j - 1, n - 1) of the comb(k, n) subsets.

    Args:
        rewards: [prompts, k], finite.
        ns: each in 1..k.

    Returns:
        [prompts, len(ns)] float64.

    >>> expected_best([[0.0, 3.0, 6.0]], ns=[1, 2, 3])
    array([[3., 5., 6.]])
    """
    ordered = np.sort(_matrix("rewards", rewards), axis=1)
    k = ordered.shape[1]
    for n in ns:
        if not 1 <= n <= k:
            raise ValueError(f"ns must lie in 1..{k}, the number of completions per prompt; got {n}")
    weights = [[math.comb(j - 1, n - 1) / math.comb(k, n) for n in ns] for j in range(1, k + 1)]
    return ordered @ np.array(weights).reshape(k, len(ns))


def best_of_n(rewards: np.ndarray, ns: Sequence[int]) -> np.ndarray:
    """The reward of best-of-n, averaged over prompts. Unbiased for independent completions.

    Args:
        rewards: [prompts, k], finite.
        ns: each in 1..k.

    Returns:
        [len(ns)] float64.
    """
    return expected_best(rewards, ns).mean(axis=0)


def recall_at_n(correct: np.ndarray, ns: Sequence[int]) -> np.ndarray:
    """The share of prompts that at least one of n completions solves: Recall@N or pass@n.

    The unbiased estimator 1 - comb(k - c, n) / comb(k, n) for c right ones of k (Chen et al. 2021, arXiv 2107.03374,
    eq. 1), which is the expected maximum of n zeros and ones.

    Args:
        correct: [prompts, k] bool, or 0 and 1.
        ns: each in 1..k.

    Returns:
        [len(ns)] float64.

    >>> recall_at_n([[True, False, False, False], [False, False, False, False]], ns=[1, 2, 4])
    array([0.125, 0.25 , 0.5  ])
    """
    hits = np.asarray(correct)
    if not np.isin(hits, (0, 1)).all():
        raise ValueError("correct must hold booleans (or 0 and 1) only")
    return expected_best(hits, ns).mean(axis=0)


# --- means -------------------------------------------------------------------------------------------------


def mean_reward(rewards: Sequence[Sequence[float]], confidence: float = 0.95) -> Estimate:
    """The mean over prompts of each prompt's mean reward; normal interval over prompts (clustered by prompt).

    Args:
        rewards: [prompts, k], or ragged: a sequence of rewards per prompt, none empty.
        confidence: of the interval, between 0 and 1.
    """
    for i, of_prompt in enumerate(rewards):
        if len(of_prompt) == 0:
            raise ValueError(f"rewards[{i}] is empty; leave out prompts without a scored completion")
    return _mean([_finite("rewards", of_prompt).mean() for of_prompt in rewards], confidence)


def win_rate(rewards_a: np.ndarray, rewards_b: np.ndarray, confidence: float = 0.95) -> Estimate:
    """How often a's completion has the higher reward than b's for the same prompt; a tie counts half.

    With several completions per prompt, every one of a meets every one of b. The interval is Wilson's score interval
    with prompts as trials: right for one completion per prompt, wide for more, and sensible at rates of 0 and 1.

    Args:
        rewards_a: [prompts] or [prompts, k_a].
        rewards_b: [prompts] or [prompts, k_b], of the same prompts.
        confidence: of the interval, between 0 and 1.
    """
    a, b = (_matrix(name, _rows(values)) for name, values in (("rewards_a", rewards_a), ("rewards_b", rewards_b)))
    if len(a) != len(b):
        raise ValueError(f"rewards_a has {len(a)} prompts and rewards_b {len(b)}; expected the same prompts")
    difference = a[:, :, None] - b[:, None, :]
    rate = float(np.mean((np.sign(difference) + 1) / 2))
    z, trials = _normal_quantile(confidence), len(a)
    centre = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)
    return Estimate(rate, max(0.0, centre - half), min(1.0, centre + half))


# --- KL to the reference -----------------------------------------------------------------------------------


def kl_estimate(logps_policy: np.ndarray, logps_ref: np.ndarray, confidence: float = 0.95) -> Estimate:
    """KL(policy || reference), nats per completion, from completions sampled from the policy at temperature 1, uncut.

    It is the mean of log pi(y|x) - log pi_ref(y|x): unbiased and of either sign (k1 of Schulman, "Approximating KL divergence",
    2020; k3 is useless for whole completions once policies differ: one that the reference likes by 20 nats more adds e^20).

    Args:
        logps_policy: [completions] or [prompts, k], sums of token log-probabilities under the policy, nats. In the second form
            the interval is over prompts.
        logps_ref: the same under the reference.
        confidence: of the interval, between 0 and 1.
    """
    policy, reference = _finite("logps_policy", logps_policy), _finite("logps_ref", logps_ref)
    if policy.shape != reference.shape or policy.ndim not in (1, 2) or not policy.size:
        raise ValueError(
            "logps_policy and logps_ref must have one shape, [completions] or [prompts, k], "
            f"got {policy.shape} and {reference.shape}"
        )
    return _mean(_rows(policy - reference).mean(axis=1), confidence)


# ---


def _mean(values: Sequence[float], confidence: float) -> Estimate:
    """Mean of independent values [n] with the normal interval."""
    values = np.asarray(values, np.float64)
    if not len(values):
        raise ValueError("got no prompts; a mean needs at least one")
    mean, z = float(values.mean()), _normal_quantile(confidence)
    if len(values) == 1:
        return Estimate(mean, math.nan, math.nan)
    half = z * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def _normal_quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _rows(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    return values[:, None] if values.ndim == 1 else values


def _matrix(name: str, values: np.ndarray) -> np.ndarray:
    values = _finite(name, values)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"{name} must be [prompts, k] with at least one of each, got shape {values.shape}")
    return values


def _finite(name: str, values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{name} must be finite; drop completions without a reward first")
    return values

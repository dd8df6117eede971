"""Evaluation as a retriever: estimators against what they estimate, intervals against their coverage."""

import itertools
import math

import numpy as np
import pytest

from larpo.retrieval import best_of_n, expected_best, kl_estimate, mean_reward, recall_at_n, win_rate
from tests.helpers.optional_hypothesis import given, st

# --- N completions per prompt


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=6))
def test_the_expected_best_is_the_mean_maximum_over_all_subsets(rewards):
    ns = range(1, len(rewards) + 1)
    expected = [np.mean([max(subset) for subset in itertools.combinations(rewards, n)]) for n in ns]
    np.testing.assert_allclose(expected_best([rewards], ns)[0], expected, atol=1e-10)


@given(st.integers(1, 12), st.integers(0, 12))
def test_recall_is_the_unbiased_estimator_of_its_paper(k, right):
    right = min(right, k)
    correct = [[i < right for i in range(k)]]
    ns = range(1, k + 1)
    expected = [1 - math.comb(k - right, n) / math.comb(k, n) for n in ns]
    np.testing.assert_allclose(recall_at_n(correct, ns), expected, atol=1e-12)


def test_recall_does_not_depend_on_how_many_more_completions_were_drawn():
    rng = np.random.default_rng(0)
    solved = rng.beta(0.5, 2.0, 4000)  # each prompt's own chance
    truth = np.mean(1 - (1 - solved) ** 5)
    for k in (5, 20):
        estimate = recall_at_n(rng.random((4000, k)) < solved[:, None], [5])[0]
        assert abs(estimate - truth) < 0.03


def test_plugging_the_share_of_right_ones_into_the_formula_would_be_biased():
    one_right_of_two = [[True, False]]
    assert recall_at_n(one_right_of_two, [2])[0] == 1.0  # not 1 - 0.5**2


def test_many_completions_neither_overflow_nor_lose_digits():
    correct = np.zeros((1, 2000), bool)
    correct[0, 7] = True
    np.testing.assert_allclose(recall_at_n(correct, [1, 1000, 2000]), [1 / 2000, 0.5, 1.0], rtol=1e-12)


def test_best_of_n_is_a_mean_over_prompts_and_rises_with_n():
    rewards = np.random.default_rng(0).normal(size=(50, 8))
    curve = best_of_n(rewards, range(1, 9))
    assert (np.diff(curve) > 0).all()
    assert curve[0] == pytest.approx(rewards.mean()) and curve[-1] == pytest.approx(rewards.max(axis=1).mean())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: best_of_n([[1.0, 2.0]], [3]), r"ns must lie in 1..2, .* got 3"),
        (lambda: best_of_n([[1.0, 2.0]], [0]), r"ns must lie in 1..2, .* got 0"),
        (lambda: best_of_n([1.0, 2.0], [1]), r"rewards must be \[prompts, k\] .* got shape \(2,\)"),
        (lambda: best_of_n([[1.0, float("nan")]], [1]), "rewards must be finite; drop completions without a reward"),
        (lambda: recall_at_n([[0.5, 1.0]], [1]), "correct must hold booleans"),
        (lambda: mean_reward([[1.0], []]), r"rewards\[1\] is empty"),
        (lambda: mean_reward([]), "at least one"),
        (lambda: mean_reward([[1.0]], confidence=95), "confidence must lie between 0 and 1, got 95"),
        (lambda: win_rate([1.0], [1.0, 2.0]), "rewards_a has 1 prompts and rewards_b 2"),
        (lambda: kl_estimate([1.0], [1.0, 2.0]), r"one shape, .* got \(1,\) and \(2,\)"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- means


def test_the_mean_reward_weighs_prompts_alike_and_its_interval_counts_prompts():
    assert mean_reward([[0.0] * 9, [1.0]]).mean == 0.5
    few = mean_reward([[0.0], [1.0], [2.0]])
    repeated = mean_reward([[0.0] * 50, [1.0] * 50, [2.0] * 50])
    assert repeated == pytest.approx(few)  # copies of a completion are no evidence
    assert few.high - few.mean == pytest.approx(1.959964 * 1.0 / math.sqrt(3))
    alone = mean_reward([[1.0, 2.0]])
    assert alone.mean == 1.5 and math.isnan(alone.low) and math.isnan(alone.high)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    trials, prompts, k = 400, 60, 4
    # completions of a prompt share the prompt's own level: an interval over completions would be far too narrow
    rewards = rng.normal(size=(trials, prompts, 1)) + 0.5 * rng.normal(size=(trials, prompts, k))
    hits = [low <= 0.0 <= high for _, low, high in (mean_reward(one) for one in rewards)]
    assert 0.90 < np.mean(hits) < 0.99
    others = rng.normal(size=(trials, prompts))
    hits = [
        low <= 0.5 <= high for _, low, high in (win_rate(a[:, 0] / 1.25**0.5, b) for a, b in zip(rewards, others, strict=True))
    ]
    assert 0.90 < np.mean(hits) < 0.99


def test_win_rate_counts_ties_half_and_meets_every_completion_with_every_other():
    assert win_rate([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, -1.0]).mean == (1 + 0.5 + 0 + 1) / 4
    assert win_rate([[0.0, 2.0]], [[1.0, 2.0, -1.0]]).mean == (1 / 3 + (1 + 0.5 + 1) / 3) / 2
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 20, 3))
    assert win_rate(a, b).mean == pytest.approx(1 - win_rate(b, a).mean)


def test_a_win_rate_of_one_is_not_certain():
    rate = win_rate(np.ones(10), np.zeros(10))
    assert rate.mean == rate.high == 1.0
    assert rate.low == pytest.approx(10 / (10 + 1.959964**2))  # Wilson's bound where all are won


# --- KL


def test_the_kl_estimate_is_right_for_a_known_pair_of_policies():
    rng = np.random.default_rng(0)
    policy, reference = np.log([0.5, 0.3, 0.2]), np.log([0.3, 0.3, 0.4])
    truth_per_token = float(np.sum(np.exp(policy) * (policy - reference)))
    tokens = rng.choice(3, p=np.exp(policy), size=(500, 40, 2))  # 500 prompts, 40 completions of 2 tokens
    kl = kl_estimate(policy[tokens].sum(-1), reference[tokens].sum(-1))
    assert kl.low < 2 * truth_per_token < kl.high
    assert kl.high - kl.low < 0.2 * truth_per_token


def test_the_kl_estimate_may_be_negative_and_is_0_for_equal_policies():
    assert kl_estimate([-1000.0, -10.0], [-10.0, -10.0]).mean == -495.0
    assert kl_estimate([-3.0, -0.5, 0.0], [-3.0, -0.5, 0.0]).mean == 0.0

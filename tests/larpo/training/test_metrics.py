"""Metrics of lists: against scipy, against brute force, and against arithmetic that a reader can check."""

from itertools import pairwise, permutations
from math import log2

import numpy as np
import pytest
import torch

from larpo.training.metrics import MetricMeans, list_metric_sums, list_metrics
from tests.helpers.optional_hypothesis import given, st


def of_list(scores, relevance, **options):
    """The metrics of a single list."""
    return list_metrics(torch.tensor(scores), torch.tensor(relevance), [len(scores)], **options)


def tau_b(x, y):
    """Kendall's tau-b as its definition reads; 0 where x says nothing, None where y has no order."""
    pairs = [(a, b) for b in range(len(x)) for a in range(b)]
    concordant = sum((x[a] - x[b]) * (y[a] - y[b]) > 0 for a, b in pairs)
    discordant = sum((x[a] - x[b]) * (y[a] - y[b]) < 0 for a, b in pairs)
    untied_x = sum(x[a] != x[b] for a, b in pairs)
    untied_y = sum(y[a] != y[b] for a, b in pairs)
    if not untied_y:
        return None
    return (concordant - discordant) / (untied_x * untied_y) ** 0.5 if untied_x else 0.0


def over_orders(scores, metric):
    """The mean of metric(order) over all orders of candidates by falling score, equal scores in any order."""
    orders = [order for order in permutations(range(len(scores))) if all(scores[a] >= scores[b] for a, b in pairwise(order))]
    return sum(map(metric, orders)) / len(orders)


# Few different values, so that ties are common; 0, which pads lists, is the best relevance and a middling score
LISTS = st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 0)), min_size=1, max_size=6)


# --- one list, by arithmetic


def test_trl_names_compare_the_best_candidate_with_all_others():
    metrics = of_list([0.3, -0.1, 0.7, 0.2], [2.0, 0.0, 5.0, 7.0], logps=torch.tensor([-1.0, -2.0, -3.0, -8.0]))
    assert metrics["rewards/chosen"] == pytest.approx(0.2)
    assert metrics["rewards/rejected"] == pytest.approx((0.3 - 0.1 + 0.7) / 3)
    assert metrics["rewards/margins"] == pytest.approx(0.2 - (0.3 - 0.1 + 0.7) / 3)
    assert metrics["rewards/accuracies"] == pytest.approx(1 / 3)
    assert metrics["logps/chosen"] == -8
    assert metrics["logps/rejected"] == -2
    assert metrics["mrr"] == pytest.approx(1 / 3)
    assert metrics["list/size"] == 4


def test_equals_of_the_best_are_chosen_as_their_mean():
    metrics = of_list([1.0, 9.0, 0.0], [3.0, 3.0, 1.0])
    assert metrics["rewards/chosen"] == 5
    assert metrics["rewards/rejected"] == 0
    assert metrics["rewards/accuracies"] == 1
    assert metrics["mrr"] == 1  # one that is as good comes first
    assert metrics["list/frac_tied"] == pytest.approx(1 / 3)


def test_the_order_of_equally_good_candidates_changes_no_metric():
    scores, relevance = [1.0, -1.0, 0.0], [3.0, 3.0, 1.0]
    metrics = of_list(scores, relevance)
    assert metrics == of_list([-1.0, 1.0, 0.0], relevance)
    assert metrics["rewards/margins"] == 0
    assert metrics["rewards/accuracies"] == 0.5  # one of the two is ahead of the other answer


def test_an_equal_score_is_not_a_win():
    assert of_list([1.0, 1.0, 0.0], [2.0, 1.0, 0.0])["rewards/accuracies"] == 0.5


def test_ndcg_by_arithmetic():
    # by score: the middle one, the best, the worst; gains 1/2, 1, 0
    metrics = of_list([2.0, 3.0, 1.0], [9.0, 4.0, -5.0], ndcg_k=1)
    assert metrics["ndcg"] == pytest.approx((0.5 + 1 / log2(3)) / (1 + 0.5 / log2(3)))
    assert metrics["ndcg@1"] == pytest.approx(0.5)


def test_ndcg_of_binary_relevance_is_the_usual_one():
    metrics = of_list([4.0, 3.0, 2.0, 1.0], [0, 1, 0, 1])
    assert metrics["ndcg"] == pytest.approx((1 / log2(3) + 1 / log2(5)) / (1 + 1 / log2(3)))


def test_ndcg_does_not_depend_on_the_scale_or_zero_of_the_reward_model():
    scores, rewards = torch.randn(40), torch.randn(40)
    expected = list_metrics(scores, rewards, 8, ndcg_k=3)
    for moved in (rewards - 100, rewards * 500, rewards.exp()):
        metrics = list_metrics(scores, moved, 8, ndcg_k=3)
        assert metrics["ndcg"] == pytest.approx(expected["ndcg"])
        assert metrics["ndcg@3"] == pytest.approx(expected["ndcg@3"])


def test_at_the_reference_no_order_of_the_data_looks_good():
    """All scores are 0 before the first step, and lists often come sorted by reward."""
    best_first, worst_first = of_list([0.0] * 4, [4.0, 3.0, 2.0, 1.0]), of_list([0.0] * 4, [1.0, 2.0, 3.0, 4.0])
    assert best_first["ndcg"] == pytest.approx(worst_first["ndcg"]) and best_first["ndcg"] < 0.9
    assert best_first["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4) == worst_first["mrr"]
    assert best_first["kendall_tau"] == worst_first["kendall_tau"] == 0


# --- any list, against brute force


@given(LISTS)
def test_metrics_of_any_list_are_what_their_definitions_say(pairs):
    scores, relevance = ([float(x) for x in column] for column in zip(*pairs, strict=True))
    m = len(scores)
    metrics = of_list(scores, relevance, ndcg_k=2)
    tau = tau_b(scores, relevance)
    assert metrics.get("kendall_tau") == (None if tau is None else pytest.approx(tau))
    if len(set(relevance)) == 1:
        assert not {"ndcg", "ndcg@2", "mrr", "rewards/chosen", "rewards/accuracies", "kendall_tau"} & set(metrics)
        return
    gains = [sum(other < mine for other in relevance) for mine in relevance]
    for k, name in ((m, "ndcg"), (2, "ndcg@2")):
        ideal = sum(gain / log2(rank + 2) for rank, gain in enumerate(sorted(gains, reverse=True)[:k]))
        dcg = over_orders(scores, lambda order, k=k: sum(gains[i] / log2(rank + 2) for rank, i in enumerate(order[:k])))
        assert metrics[name] == pytest.approx(dcg / ideal)
    best = {i for i in range(m) if relevance[i] == max(relevance)}
    first = over_orders(scores, lambda order: 1 / (1 + next(rank for rank, i in enumerate(order) if i in best)))
    assert metrics["mrr"] == pytest.approx(first)
    tied = sum(relevance[a] == relevance[b] for b in range(m) for a in range(b))
    assert metrics["list/frac_tied"] == pytest.approx(tied / (m * (m - 1) / 2))


def test_kendall_tau_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    for m in (2, 5, 16):
        scores = torch.randint(4, (m,), generator=generator).double()
        relevance = torch.cat([torch.arange(2.0), torch.randint(3, (m - 2,), generator=generator).float()])
        scores[:2] = torch.tensor([0.0, 1.0])
        expected = stats.kendalltau(scores.numpy(), relevance.numpy(), variant="b").statistic
        assert list_metrics(scores, relevance, m)["kendall_tau"] == pytest.approx(expected)


@given(st.lists(LISTS, min_size=1, max_size=5))
def test_ragged_lists_average_over_the_lists_that_define_a_metric(lists):
    alone = [of_list([float(g) for g, _ in one], [float(r) for _, r in one], ndcg_k=1) for one in lists]
    flat = [pair for one in lists for pair in one]
    scores, relevance = torch.tensor([float(g) for g, _ in flat]), torch.tensor([r for _, r in flat])
    for sizes in ([len(one) for one in lists], torch.tensor([len(one) for one in lists])):
        together = list_metrics(scores, relevance, sizes, ndcg_k=1)
        assert set(together) == {name for one in alone for name in one}
        for name, value in together.items():
            values = [one[name] for one in alone if name in one]
            assert value == pytest.approx(sum(values) / len(values))


def test_a_rank_is_not_rounded_to_float32():
    assert of_list([3.0, 2.0, 1.0], [0.0, 0.0, 1.0])["mrr"] == 1 / 3


# --- what lists can be


def test_lists_of_one_and_tied_lists_only_count_where_they_mean_something():
    metrics = list_metrics(torch.tensor([5.0, 1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 7.0, 7.0, 2.0, 1.0]), [1, 2, 2])
    assert metrics["rewards/chosen"] == 3  # of the third list alone
    assert metrics["rewards/accuracies"] == 0
    assert metrics["list/size"] == pytest.approx(5 / 3)
    assert metrics["list/frac_tied"] == 0.5  # a list of one has no pairs
    assert set(of_list([5.0], [1.0])) == {"list/size"}


def test_no_lists_give_no_metrics():
    assert list_metrics(torch.empty(0), torch.empty(0), []) == {}
    assert list_metrics(torch.empty(0), torch.empty(0), 4) == {}


def test_a_diverged_score_is_seen_in_the_log():
    metrics = of_list([float("nan"), 1.0], [1.0, 0.0])
    assert metrics["rewards/chosen"] != metrics["rewards/chosen"]


def test_impossible_candidates_are_last_and_equal():
    metrics = of_list([float("-inf"), float("-inf"), 0.0], [0.0, 1.0, 2.0])
    assert metrics["kendall_tau"] == pytest.approx(2 / (2 * 3) ** 0.5)
    assert metrics["mrr"] == 1


def test_graph_and_low_precision_scores_are_fine():
    scores = torch.tensor([1.0, 0.0], dtype=torch.bfloat16, requires_grad=True)
    assert list_metrics(scores, torch.tensor([1, 0]), 2)["rewards/margins"] == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(4), torch.zeros(3), 2), ValueError, r"relevance must be \[S\].*got \[3\] \(scores: \[4\]\)"),
        ((torch.zeros(2, 2), torch.zeros(4), 2), ValueError, r"scores must be \[S\].*\[2, 2\]"),
        ((torch.zeros(4), [0.0] * 4, 2), TypeError, "relevance must be a real tensor.*list"),
        ((torch.zeros(4), torch.zeros(4), 3), ValueError, "list_sizes=3 must divide .* 4"),
        ((torch.zeros(4), torch.zeros(4), [3, 2]), ValueError, "sum to the number of candidates, 4; they sum to 5"),
        ((torch.zeros(4), torch.zeros(4), torch.tensor([4, 0])), ValueError, "must all be >= 1"),
        ((torch.zeros(4), torch.zeros(4), torch.tensor([2.0, 2.0])), TypeError, "list_sizes must be .* integer dtype"),
        ((torch.zeros(4), torch.zeros(4), 2, None, 0), ValueError, "ndcg_k must be None or an int >= 1, got 0"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        list_metrics(*arguments)


def test_sizes_may_be_numpys():
    scores, relevance = torch.tensor([0.3, 0.1, 0.2, 0.5]), torch.tensor([1.0, 0.0, 2.0, 3.0])
    expected = list_metrics(scores, relevance, [2, 2])
    for sizes in (np.array([2, 2]), [np.int64(2), 2], (2, 2), torch.tensor([2, 2])):
        assert list_metrics(scores, relevance, sizes) == expected


# --- means over steps


def test_means_over_steps_are_those_of_one_big_step():
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(14, generator=generator)
    relevance = torch.randint(2, (14,), generator=generator).float()
    sizes = [1, 4, 2, 3, 2, 2]
    means = MetricMeans()
    means.add_sums(list_metric_sums(scores[:5], relevance[:5], sizes[:2]))
    means.add_sums(list_metric_sums(scores[5:], relevance[5:], sizes[2:]))
    assert means.pop() == pytest.approx(list_metrics(scores, relevance, sizes))
    assert means.pop() == {}


def test_means_weigh_steps_by_their_lists():
    means = MetricMeans()
    means.add({"mrr": 1.0}, lists=3)
    means.add({"mrr": 0.0, "ndcg": 0.25}, lists=1)
    assert means.pop() == {"mrr": 0.75, "ndcg": 0.25}

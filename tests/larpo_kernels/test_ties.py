"""Candidates of equal relevance: what each rule for ties makes of them."""

from math import exp, log

import pytest
import torch

import larpo_kernels as lk
from tests.helpers import slow_loop
from tests.helpers.list_losses import OBJECTIVES, RELEVANCE, SCORES, TIES, graded_lists
from tests.helpers.optional_hypothesis import given, st

TIED = [2.0, 1.0, 1.0, 0.0, 2.0], [0.3, -0.8, 1.2, 0.1, -0.4]  # relevance and scores: two best, one worst


@pytest.fixture(params=TIES)
def tie_rule(request):
    return TIES[request.param]


def test_mean_of_a_contrastive_list_is_over_its_tied_best(loss_of):
    relevance, scores = TIED
    expected = log(sum(map(exp, scores))) - (0.3 - 0.4) / 2
    assert loss_of(scores, relevance, lk.Contrastive(ties="mean")) == pytest.approx(expected)


def test_mean_of_a_pairwise_list_is_over_pairs_of_its_tied_best_and_worst(loss_of):
    scores, relevance = [0.3, -0.8, 1.2, 0.1], [2.0, 2.0, 0.0, 0.0]
    pairs = [(0.3, 1.2), (0.3, 0.1), (-0.8, 1.2), (-0.8, 0.1)]
    expected = sum(log(1 + exp(worse - better)) for better, worse in pairs) / 4
    assert loss_of(scores, relevance, lk.Pairwise(ties="mean")) == pytest.approx(expected)


def test_mean_of_a_pair_of_equals_is_over_both_ways_round(loss_of, gradient_of):
    both = (log(1 + exp(1.5)) + log(1 + exp(-1.5))) / 2
    for objective in (lk.Pairwise(ties="mean"), lk.Contrastive(ties="mean")):
        assert loss_of([0.5, 2.0], [1.0, 1.0], objective) == pytest.approx(both)
        assert gradient_of([0.5, 0.5], [1.0, 1.0], objective) == pytest.approx([0, 0], abs=1e-7)


def test_efron_draws_a_tied_candidate_from_what_is_left_of_its_equals_on_average(loss_of):
    scores, relevance = [0.3, -0.8, 1.2], [1.0, 1.0, 0.0]
    tied, below = exp(0.3) + exp(-0.8), exp(1.2)
    expected = log(tied + below) + log(tied / 2 + below) - (0.3 - 0.8)
    assert loss_of(scores, relevance, lk.ListMLE(ties="efron")) == pytest.approx(expected)


def test_efron_is_listmle_where_tied_candidates_score_the_same(loss_of, gradient_of):
    scores, relevance = [0.5, 0.5, 0.5, -1.0, 2.0, 2.0], [3.0, 3.0, 3.0, 1.0, 0.0, 0.0]
    assert loss_of(scores, relevance, lk.ListMLE(ties="efron")) == pytest.approx(loss_of(scores, relevance, "listmle"))
    tied = gradient_of(scores, relevance, "listmle")  # of one order; by symmetry the mean over orders is that of each block
    expected = [sum(tied[:3]) / 3] * 3 + tied[3:4] + [sum(tied[4:]) / 2] * 2
    assert gradient_of(scores, relevance, lk.ListMLE(ties="efron")) == pytest.approx(expected, abs=1e-6)


def test_efron_is_at_least_the_mean_over_orders():
    for seed in range(20):
        scores, relevance = graded_lists([5], seed)
        mean = slow_loop.mean_over_orders(scores, relevance.tolist(), "listmle")
        efron = lk.listwise_loss(scores, relevance, list_sizes=5, objective=lk.ListMLE(ties="efron"), backend="torch")
        assert efron >= mean - 1e-12


@pytest.mark.parametrize(
    ("objective", "relevance", "is_used"),
    [
        ("contrastive", [2, 1, 1, 0, 0], True),
        ("contrastive", [2, 2, 1, 0, 0], False),
        ("pairwise", [2, 1, 1, 1, 0], True),
        ("pairwise", [2, 2, 1, 1, 0], False),
        ("pairwise", [2, 1, 1, 0, 0], False),
        ("listmle", [4, 3, 2, 1, 0], True),
        ("listmle", [4, 2, 2, 1, 0], False),
    ],
)
def test_skip_leaves_out_lists_whose_order_is_open_where_it_matters(loss_of, gradient_of, objective, relevance, is_used):
    scores = TIED[1]
    skipping = type(OBJECTIVES[objective])(ties="skip")
    assert loss_of(scores, relevance, skipping) == (loss_of(scores, relevance, objective) if is_used else 0)
    assert gradient_of(scores, relevance, skipping) == (gradient_of(scores, relevance, objective) if is_used else [0] * 5)


def test_a_skipped_list_counts_in_the_mean(backend, device):
    scores, relevance = torch.zeros(4, device=device), torch.tensor([1.0, 1.0, 1.0, 0.0], device=device)
    loss = lk.listwise_loss(scores, relevance, list_sizes=2, objective=lk.Contrastive(ties="skip"), backend=backend)
    assert loss.item() == pytest.approx((0 + log(2)) / 2)


@given(order=st.permutations(range(5)), name=st.sampled_from(sorted(TIES)), seed=st.integers(0, 10**6))
def test_the_order_of_candidates_changes_nothing_but_under_the_rule_order(order, name, seed):
    scores, relevance = graded_lists([5], seed)

    def loss_and_gradient(scores, relevance):
        scores = scores.clone().requires_grad_()
        loss = lk.listwise_loss(scores, relevance, list_sizes=5, objective=TIES[name], backend="torch")
        return loss.detach(), torch.autograd.grad(loss, scores)[0]

    loss, grad = loss_and_gradient(scores, relevance)
    permuted_loss, permuted_grad = loss_and_gradient(scores[order], relevance[order])
    torch.testing.assert_close(permuted_loss, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(permuted_grad, grad[order], rtol=1e-12, atol=1e-12)


def test_a_tie_rule_changes_nothing_without_ties(loss_of, gradient_of, tie_rule):
    assert loss_of(SCORES, RELEVANCE, tie_rule) == pytest.approx(loss_of(SCORES, RELEVANCE, tie_rule.name))
    assert gradient_of(SCORES, RELEVANCE, tie_rule) == pytest.approx(gradient_of(SCORES, RELEVANCE, tie_rule.name))


@pytest.mark.parametrize("objective", [lk.Contrastive(ties="mean"), lk.Pairwise(ties="mean"), lk.ListMLE(ties="efron")])
def test_lists_of_nothing_but_ties_teach_no_order_at_equal_scores(gradient_of, objective):
    assert gradient_of([0.7] * 4, [1.0] * 4, objective) == pytest.approx([0] * 4, abs=1e-6)


@pytest.mark.parametrize(
    ("objective", "ties", "said"),
    [
        (lk.Contrastive, "average", "'order', 'skip' or 'mean', got 'average'"),
        (lk.Pairwise, "efron", "'order', 'skip' or 'mean', got 'efron'"),
        (lk.ListMLE, None, "'order', 'skip' or 'efron', got None"),
        (lk.ListMLE, "mean", "2\\^k terms. 'efron' bounds it"),
    ],
)
def test_a_tie_rule_that_an_objective_does_not_have_is_refused(objective, ties, said):
    with pytest.raises(ValueError, match=f"{objective.__name__} ties must .*{said}"):
        objective(ties=ties)

"""SELM and COPO: losses and gradients against their formulas in float64, pseudo-counts against counting."""

from functools import partial

import pytest
import torch
from torch.nn.functional import logsigmoid

from larpo.recipes.copo import PseudoCounts, bag_of_tokens, completions_of, copo
from larpo.recipes.selm import selm
from tests.helpers.written_out import assert_equal_losses

SIZES = [3, 1, 2]
RELEVANCE = torch.tensor([0.2, 0.9, 0.1, 1.0, 0.3, 0.4])
LOGPS = torch.tensor([-1.0, -2.5, -0.7, -3.0, -1.2, -2.2], dtype=torch.float64)
REF_LOGPS = torch.tensor([-1.3, -2.0, -0.9, -2.0, -1.9, -2.4], dtype=torch.float64)
BEST_WORST = [(1, 2), None, (5, 4)]  # of RELEVANCE, list by list
LISTS = [[0, 1, 2], [3], [4, 5]]
BETA = 0.1


def dpo(l):
    s = BETA * (l - REF_LOGPS)
    return sum(-logsigmoid(s[pair[0]] - s[pair[1]]) for pair in BEST_WORST if pair) / len(LISTS)


def test_selm_adds_the_mean_implicit_reward_of_the_references_completions():
    alpha = 0.3

    def expected(l):
        s = BETA * (l - REF_LOGPS)
        return dpo(l) + alpha * sum(sum(s[i] for i in one) / len(one) for one in LISTS) / len(LISTS)

    sizes = torch.tensor(SIZES)
    assert_equal_losses(lambda l: selm(l, REF_LOGPS, None, RELEVANCE, sizes, alpha=alpha, beta=BETA)[0], expected, LOGPS)
    assert_equal_losses(lambda l: selm(l, REF_LOGPS, None, RELEVANCE, sizes, alpha=0.0, beta=BETA)[0], dpo, LOGPS)


@pytest.mark.parametrize("centred", [False, True])
def test_copo_takes_off_bonus_times_log_likelihood_and_leaves_the_bonus_alone(centred):
    alpha, bonus = 0.3, torch.tensor([0.5, 0.1, 0.9, 1.0, 0.2, 0.7], requires_grad=True)

    def expected(l):
        total = 0.0
        for one in LISTS:
            mean = sum(bonus[i].item() for i in one) / len(one) if centred else 0.0
            total = total + sum((bonus[i].item() - mean) * l[i] for i in one) / len(one)
        return dpo(l) - alpha * total / len(LISTS)

    def ours(l):
        return copo(l, REF_LOGPS, None, RELEVANCE, torch.tensor(SIZES), bonus, alpha=alpha, beta=BETA, centred=centred)[0]

    assert_equal_losses(ours, expected, LOGPS, rtol=1e-6, atol=1e-7)  # the bonus is float32
    ours(LOGPS.clone().requires_grad_()).backward()
    assert bonus.grad is None


def test_one_hot_features_count_exactly():
    def one_hot(completions):
        return torch.eye(4, dtype=torch.float64)[[int(c[0]) for c in completions]]

    counts = PseudoCounts(one_hot, ridge=0.5)
    counts.add([torch.tensor([0])] * 3 + [torch.tensor([1])])
    counts.add([torch.tensor([0])])
    found = counts.bonus([torch.tensor([i]) for i in range(3)])
    torch.testing.assert_close(found, torch.tensor([4.5, 1.5, 0.5], dtype=torch.float64) ** -0.5)


def test_pseudo_counts_are_the_limit_of_a_coin_flipping_network():
    """Eq. 18 of COPO: features regressed (by ridge) on fresh random signs; the mean squared output is 1 / N."""
    generator = torch.Generator().manual_seed(0)
    completions = [torch.randint(0, 6, (3,), generator=generator) for _ in range(300)]
    phi = bag_of_tokens(completions, 6)
    signs = torch.randint(0, 2, (300, 20_000), generator=generator).double() * 2 - 1
    network = torch.linalg.solve(phi.T @ phi + 1e-6 * torch.eye(6), phi.T @ signs)
    counts = PseudoCounts(partial(bag_of_tokens, vocabulary=6), ridge=1e-6)
    counts.add(completions)
    flips = (phi @ network).square().mean(1).sqrt()
    torch.testing.assert_close(counts.bonus(completions), flips, rtol=0.03, atol=0)


def test_nothing_seen_yet_and_an_empty_completion_have_finite_bonuses():
    counts = PseudoCounts(partial(bag_of_tokens, vocabulary=3))
    assert counts.bonus([torch.tensor([1]), torch.tensor([], dtype=torch.int64)]).tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="ridge must be above 0, got 0"):
        PseudoCounts(bag_of_tokens, ridge=0)


def test_completions_are_read_from_a_batch_in_its_order():
    from larpo.data.collator import ListCollator

    rows = [
        {"prompt_ids": [5, 6], "completion_ids": [[1, 2], [3]], "scores": [1.0, 0.0]},
        {"prompt_ids": [7], "completion_ids": [[4, 4, 4]], "scores": [1.0]},
    ]
    for layout in ("padded", "packed", "shared"):
        found = completions_of(ListCollator(0, layout, slice_size=2)(rows))
        assert [ids.tolist() for ids in found] == [[1, 2], [3], [4, 4, 4]]

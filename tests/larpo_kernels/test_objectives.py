"""The list side: scores and relevance in, losses out. Expected values are arithmetic to be checked by eye."""

import warnings
from decimal import Decimal, localcontext
from math import exp, inf, log, log2, nan

import pytest
import torch

import larpo_kernels as lk
from larpo_kernels.backends.pytorch import list_losses
from tests.helpers import slow_loop
from tests.helpers.optional_hypothesis import given, st

OBJECTIVES = {
    "pairwise": lk.Pairwise(),
    "contrastive": lk.Contrastive(),
    "listmle": lk.ListMLE(),
    "lambdarank": lk.LambdaRank(),
    "lambdarank_dcg": lk.LambdaRank(weighting="dcg"),
    "lambdarank_dcg_k": lk.LambdaRank(weighting="dcg", k=2),
    "lambdarank_dcg2": lk.LambdaRank(weighting="dcg2"),
    "lambdarank_dcg2_k": lk.LambdaRank(weighting="dcg2", k=2),
    "listnet": lk.ListNet(),
    "listnet_cold": lk.ListNet(temperature=0.25),
}
TIES = {
    "pairwise_skip": lk.Pairwise(ties="skip"),
    "pairwise_mean": lk.Pairwise(ties="mean"),
    "contrastive_skip": lk.Contrastive(ties="skip"),
    "contrastive_mean": lk.Contrastive(ties="mean"),
    "listmle_skip": lk.ListMLE(ties="skip"),
    "listmle_efron": lk.ListMLE(ties="efron"),
}
EVERY = {**OBJECTIVES, **TIES}
PLAIN = ["pairwise", "contrastive", "listmle", "lambdarank"]  # the paper's: relevance only orders the list


def slow_losses(scores, relevance, list_sizes, name):
    """The same objective from slow_loop, whose keywords are the objective objects' fields."""
    return slow_loop.listwise_losses(scores, relevance, list_sizes, EVERY[name].name, **vars(EVERY[name]))


def graded_lists(list_sizes, seed=0, dtype=torch.float64):
    """scores and relevance grades 0..3 (ties included) of the given lists."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(sum(list_sizes), generator=generator, dtype=torch.float64)
    relevance = torch.randint(0, 4, (sum(list_sizes),), generator=generator)
    return scores.to(dtype), relevance.to(dtype)


@pytest.fixture(params=[name for name in OBJECTIVES if name not in ("lambdarank_dcg_k", "lambdarank_dcg2_k", "listnet_cold")])
def name(request):
    """Each objective once; cut-offs and temperatures are compared with the loops."""
    return request.param


@pytest.fixture
def loss_of(backend, device):
    """One list of plain numbers -> its loss as a plain number."""

    def loss_of(scores, relevance, objective):
        scores, relevance = (torch.tensor(x, dtype=torch.float32, device=device) for x in (scores, relevance))
        return lk.listwise_loss(scores, relevance, list_sizes=len(scores), objective=objective, backend=backend).item()

    return loss_of


@pytest.fixture
def gradient_of(backend, device):
    """One list of plain numbers -> the gradient of its loss, a list of plain numbers."""

    def gradient_of(scores, relevance, objective):
        scores, relevance = (torch.tensor(x, dtype=torch.float32, device=device) for x in (scores, relevance))
        scores.requires_grad_()
        lk.listwise_loss(scores, relevance, list_sizes=len(scores), objective=objective, backend=backend).backward()
        return scores.grad.tolist()

    return gradient_of


# Three candidates; by falling relevance their scores are 1, 3, 2.
SCORES, RELEVANCE = [2.0, 1.0, 3.0], [0.1, 0.9, 0.5]


def test_pairwise_is_best_against_worst(loss_of):
    assert loss_of(SCORES, RELEVANCE, "pairwise") == pytest.approx(-log(exp(1) / (exp(1) + exp(2))))


def test_contrastive_is_best_against_all(loss_of):
    assert loss_of(SCORES, RELEVANCE, "contrastive") == pytest.approx(-log(exp(1) / (exp(1) + exp(3) + exp(2))))


def test_listmle_is_best_against_rest_then_second_against_rest(loss_of):
    first = -log(exp(1) / (exp(1) + exp(3) + exp(2)))
    second = -log(exp(3) / (exp(3) + exp(2)))
    assert loss_of(SCORES, RELEVANCE, "listmle") == pytest.approx(first + second)


def test_lambdarank_sums_all_pairs(loss_of):
    pairs = [(1, 3), (1, 2), (3, 2)]  # scores of (better, worse)
    expected = sum(log(1 + exp(worse - better)) for better, worse in pairs)
    assert loss_of(SCORES, RELEVANCE, "lambdarank") == pytest.approx(expected)


def test_listnet_is_cross_entropy_of_two_softmaxes(loss_of):
    scores, relevance = [1.0, 0.0], [log(3), 0.0]  # softmax of the relevance: 3/4, 1/4
    expected = -3 / 4 * log(exp(1) / (exp(1) + 1)) - 1 / 4 * log(1 / (exp(1) + 1))
    assert loss_of(scores, relevance, "listnet") == pytest.approx(expected)


def test_listnet_temperature_divides_the_relevance_only(loss_of):
    scores, relevance = [1.0, 0.0], [2 * log(3), 0.0]  # softmax of the relevance / 2: 3/4, 1/4
    expected = -3 / 4 * log(exp(1) / (exp(1) + 1)) - 1 / 4 * log(1 / (exp(1) + 1))
    assert loss_of(scores, relevance, lk.ListNet(temperature=2.0)) == pytest.approx(expected)


def test_dcg_weights_a_pair_by_what_swapping_it_changes_in_ndcg(loss_of):
    scores, relevance = [0.0, 5.0], [2.0, 1.0]  # gains 2^r - 1: 3 and 1; ranks by score: 2 and 1
    ideal = 3 / log2(2) + 1 / log2(3)
    weight = abs(3 - 1) / ideal * abs(1 / log2(3) - 1 / log2(2))
    assert loss_of(scores, relevance, lk.LambdaRank(weighting="dcg")) == pytest.approx(weight * log(1 + exp(5)))


def test_dcg_cut_off_counts_only_the_first_k_ranks(loss_of):
    scores, relevance = (
        [0.0, 5.0],
        [2.0, 1.0],
    )  # with k = 1, rank 2 has no discount and the ideal is one candidate
    weight = abs(3 - 1) / 3 * abs(0 - 1 / log2(2))
    assert loss_of(scores, relevance, lk.LambdaRank(weighting="dcg", k=1)) == pytest.approx(weight * log(1 + exp(5)))


def test_dcg2_weights_a_pair_by_how_far_apart_its_ranks_are(loss_of):
    scores, relevance = [0.0, 5.0, -1.0], [2.0, 1.0, 1.0]  # ranks 2, 1, 3; the tied two form no pair
    ideal = 3 / log2(2) + 1 / log2(3) + 1 / log2(4)
    weight = abs(3 - 1) / ideal * abs(1 / log2(2) - 1 / log2(3))  # both pairs are one rank apart
    expected = weight * log(1 + exp(5)) + weight * log(1 + exp(-1))
    assert loss_of(scores, relevance, lk.LambdaRank(weighting="dcg2")) == pytest.approx(expected)


def test_dcg_weights_carry_no_gradient(gradient_of):
    scores, relevance = [0.0, 5.0], [2.0, 1.0]
    weight = abs(3 - 1) / (3 / log2(2) + 1 / log2(3)) * abs(1 / log2(3) - 1 / log2(2))
    slope = weight * exp(5) / (1 + exp(5))
    assert gradient_of(scores, relevance, lk.LambdaRank(weighting="dcg")) == pytest.approx([-slope, slope])


def test_dcg_of_a_list_whose_gains_are_all_zero_is_zero(loss_of):
    assert loss_of([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], lk.LambdaRank(weighting="dcg")) == 0
    assert loss_of([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], lk.LambdaRank(weighting="dcg2")) == 0


@pytest.mark.parametrize("objective", PLAIN)
def test_two_candidates_are_dpo_under_every_objective(loss_of, gradient_of, objective):
    dpo = -log(1 / (1 + exp(-(0.25 - 1.5))))  # better one scores 0.25
    slope = 1 / (1 + exp(0.25 - 1.5))
    assert loss_of([1.5, 0.25], [-1.0, 2.0], objective) == pytest.approx(dpo)
    assert gradient_of([1.5, 0.25], [-1.0, 2.0], objective) == pytest.approx([slope, -slope])


def test_gradient_of_contrastive_is_softmax_minus_one_hot(gradient_of):
    total = exp(2) + exp(1) + exp(3)
    expected = [exp(2) / total, exp(1) / total - 1, exp(3) / total]
    assert gradient_of(SCORES, RELEVANCE, "contrastive") == pytest.approx(expected, abs=1e-7)


def test_tied_candidates_form_no_lambdarank_pair(loss_of):
    assert loss_of([0.0, 1.0, 2.0], [5.0, 5.0, 5.0], "lambdarank") == 0
    only_pairs_with_the_worst = log(1 + exp(2 - 0)) + log(1 + exp(2 - 1))
    assert loss_of([0.0, 1.0, 2.0], [5.0, 5.0, 1.0], "lambdarank") == pytest.approx(only_pairs_with_the_worst)


def test_ties_for_best_and_worst_are_broken_by_input_order(loss_of):
    scores, relevance = [0.0, 1.0, 2.0, 4.0], [1.0, 1.0, 0.0, 0.0]  # best is the first, worst the last
    assert loss_of(scores, relevance, "pairwise") == pytest.approx(log(1 + exp(4 - 0)))
    assert loss_of(scores, relevance, "contrastive") == pytest.approx(log(exp(0) + exp(1) + exp(2) + exp(4)) - 0)


def test_a_list_of_equal_relevance_keeps_its_order_in_listmle(loss_of):
    in_order = log((1 + exp(1) + exp(2)) / 1) + log((exp(1) + exp(2)) / exp(1))
    assert loss_of([0.0, 1.0, 2.0], [7.0, 7.0, 7.0], "listmle") == pytest.approx(in_order)


def test_relevance_is_compared_in_its_own_precision(backend, device):
    scores = torch.tensor([0.0, 3.0], device=device)
    relevance = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64, device=device)  # one number in float32
    loss = lk.listwise_loss(scores, relevance, list_sizes=2, objective="contrastive", backend=backend)
    assert loss.item() == pytest.approx(log(1 + exp(0 - 3)))


@pytest.mark.parametrize("objective", PLAIN)
def test_infinite_relevance_orders_like_any_other(loss_of, objective):
    assert loss_of(SCORES, [-inf, inf, 0.5], objective) == loss_of(SCORES, RELEVANCE, objective)


def test_a_list_of_one_has_no_loss_and_no_gradient(loss_of, gradient_of, name):
    assert loss_of([3.0], [1.0], OBJECTIVES[name]) == 0
    assert gradient_of([3.0], [1.0], OBJECTIVES[name]) == [0.0]


def test_a_list_of_one_counts_in_the_mean(backend, device):
    scores, relevance = (
        torch.tensor([3.0, 0.0, 0.0], device=device),
        torch.tensor([0.0, 1.0, 0.0], device=device),
    )
    loss = lk.listwise_loss(scores, relevance, list_sizes=[1, 2], objective="contrastive", backend=backend)
    assert loss.item() == pytest.approx((0 + log(2)) / 2)


@pytest.mark.parametrize(
    ("list_sizes", "reduction", "objective"),
    [
        *((4, "mean", name) for name in OBJECTIVES),
        (4, "sum", "contrastive"),
        ([], "mean", "contrastive"),
        (torch.tensor([], dtype=torch.long), "mean", "contrastive"),
    ],
    ids=str,
)
def test_zero_lists_give_a_zero_that_is_still_in_the_graph(backend, device, list_sizes, reduction, objective):
    scores = torch.zeros(0, device=device, requires_grad=True)
    loss = lk.listwise_loss(
        scores,
        torch.zeros(0, device=device),
        list_sizes=list_sizes,
        objective=OBJECTIVES[objective],
        reduction=reduction,
        backend=backend,
    )
    loss.backward()
    assert loss.item() == 0
    assert scores.grad.shape == (0,)


def test_reductions_are_over_lists(backend, device):
    scores, relevance = graded_lists([3, 2, 4], dtype=torch.float32)
    scores, relevance = scores.to(device), relevance.to(device)
    none, mean, total = (
        lk.listwise_loss(scores, relevance, list_sizes=[3, 2, 4], objective="listmle", reduction=reduction, backend=backend)
        for reduction in ("none", "mean", "sum")
    )
    assert none.shape == (3,) and mean.shape == total.shape == ()
    torch.testing.assert_close(total, none.sum())
    torch.testing.assert_close(mean, none.sum() / 3)


def test_an_int_a_sequence_and_a_tensor_of_sizes_mean_the_same(backend, device):
    scores, relevance = (x.float().to(device) for x in graded_lists([3, 3]))
    losses = [
        lk.listwise_loss(scores, relevance, list_sizes=sizes, objective="listmle", reduction="none", backend=backend)
        for sizes in (
            3,
            [3, 3],
            (3, 3),
            torch.tensor([3, 3]),
            torch.tensor([3, 3], dtype=torch.int32, device=device),
        )
    ]
    assert all(torch.equal(loss, losses[0]) for loss in losses)


@pytest.mark.parametrize(  # of tie rules "mean" the loop visits all m! orders; lists of other sizes side by side, below
    ("name", "m"),
    [
        *((name, m) for name in OBJECTIVES for m in (1, 3)),
        *((name, m) for name in TIES for m in (1, 5)),
        *((name, 64) for name in ("listmle", "lambdarank_dcg")),  # one row of tiles, without an entry to mask
    ],
)
def test_every_objective_matches_its_loop_at_every_list_size(backend, device, name, m):
    scores, relevance = graded_lists([m, m], seed=m)
    upstream = torch.tensor([0.7, -1.3], dtype=torch.float64)
    truth_scores = scores.clone().requires_grad_()
    truth = slow_losses(truth_scores, relevance, [m, m], name)
    truth.backward(upstream)

    ours = scores.to(device, torch.float32).requires_grad_()
    loss = lk.listwise_loss(
        ours,
        relevance.float().to(device),
        list_sizes=m,
        objective=EVERY[name],
        reduction="none",
        backend=backend,
    )
    loss.backward(upstream.float().to(device))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double().cpu(), truth, rtol=3e-6, atol=1e-6)
    torch.testing.assert_close(ours.grad.double().cpu(), truth_scores.grad, rtol=3e-6, atol=3e-6)


@given(
    list_sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    name=st.sampled_from(sorted(EVERY)),
    seed=st.integers(0, 10**6),
)
def test_ragged_lists_match_their_loop_in_float64(list_sizes, name, seed):
    scores, relevance = graded_lists(list_sizes, seed)
    ours, slow = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    upstream = torch.linspace(-1, 2, len(list_sizes), dtype=torch.float64)
    loss = lk.listwise_loss(ours, relevance, list_sizes=list_sizes, objective=EVERY[name], reduction="none", backend="torch")
    truth = slow_losses(slow, relevance, list_sizes, name)
    loss.backward(upstream)
    truth.backward(upstream)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.grad, slow.grad, rtol=1e-12, atol=1e-12)


def test_gradients_are_the_finite_differences_of_the_loss(name):
    scores, relevance = graded_lists([4, 1, 3])

    def losses(scores):
        return lk.listwise_loss(
            scores,
            relevance,
            list_sizes=[4, 1, 3],
            objective=OBJECTIVES[name],
            reduction="none",
            backend="torch",
        )

    assert torch.autograd.gradcheck(losses, scores.requires_grad_())


def test_permuting_candidates_permutes_gradients(backend, device, name):
    scores = torch.tensor([0.5, -1.0, 2.0, 0.25, 1.5], device=device)
    relevance = torch.tensor([0.0, 3.0, 1.0, 2.0, 4.0], device=device)  # no ties: input order means nothing
    order = torch.tensor([3, 0, 4, 2, 1], device=device)

    def loss_and_gradient(scores, relevance):
        scores = scores.clone().requires_grad_()
        loss = lk.listwise_loss(scores, relevance, list_sizes=5, objective=OBJECTIVES[name], backend=backend)
        loss.backward()
        return loss.detach(), scores.grad

    loss, grad = loss_and_gradient(scores, relevance)
    permuted_loss, permuted_grad = loss_and_gradient(scores[order], relevance[order])
    torch.testing.assert_close(permuted_loss, loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(permuted_grad, grad[order], rtol=1e-6, atol=1e-7)


def test_adding_a_constant_to_a_list_changes_nothing(loss_of, gradient_of, name):
    scores, relevance = [0.5, -1.0, 2.0], [0.0, 2.0, 1.0]
    raised = [s + 8192 for s in scores]  # exact in float32
    objective = OBJECTIVES[name]
    assert loss_of(raised, relevance, objective) == pytest.approx(loss_of(scores, relevance, objective), rel=1e-5)
    assert gradient_of(raised, relevance, objective) == pytest.approx(
        gradient_of(scores, relevance, objective), rel=1e-5, abs=1e-7
    )
    assert sum(gradient_of(raised, relevance, objective)) == pytest.approx(0, abs=1e-6)


WRONG_WAY = [-1e4, 0.0, 1e4], [2.0, 1.0, 0.0]  # the better, the lower the score
RIGHT_WAY = [1e4, 0.0, -1e4], [2.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("objective", "loss", "gradient"),
    [
        ("pairwise", 2e4, [-1, 0, 1]),
        ("contrastive", 2e4, [-1, 0, 1]),
        ("listmle", 2e4 + 1e4, [-1, -1, 2]),
        ("lambdarank", 1e4 + 2e4 + 1e4, [-2, 0, 2]),
    ],
)
def test_a_spread_of_ten_thousand_the_wrong_way_is_finite_and_right(loss_of, gradient_of, objective, loss, gradient):
    assert loss_of(*WRONG_WAY, objective) == pytest.approx(loss, rel=1e-6)
    assert gradient_of(*WRONG_WAY, objective) == pytest.approx(gradient, rel=1e-6)


def test_a_spread_of_ten_thousand_the_right_way_costs_nothing(loss_of, gradient_of):
    for objective in PLAIN:
        assert loss_of(*RIGHT_WAY, objective) == 0
        assert gradient_of(*RIGHT_WAY, objective) == [0, 0, 0]


def test_listnet_at_a_spread_of_ten_thousand(loss_of, gradient_of):
    scores, relevance = [-1e4, 1e4], [log(3), 0.0]
    assert loss_of(scores, relevance, "listnet") == pytest.approx(3 / 4 * 2e4)
    assert gradient_of(scores, relevance, "listnet") == pytest.approx([-3 / 4, 1 - 1 / 4])


def test_listmle_keeps_small_terms_beside_a_huge_score(loss_of, gradient_of):
    # exp(score - max) is 0 for the last two: a cumulative sum of exponentials would lose their own term
    scores, relevance = [1e4, 1.0, 0.5], [2.0, 1.0, 0.0]
    assert loss_of(scores, relevance, "listmle") == pytest.approx(0 + log(1 + exp(-0.5)), rel=1e-5)
    slope = 1 / (1 + exp(0.5))
    assert gradient_of(scores, relevance, "listmle") == pytest.approx([0, -slope, slope], rel=1e-5)


def test_a_nearly_certain_pair_keeps_its_relative_precision(loss_of):
    # log(1 + e^-20) is 2e-9: 1 + e^-20 rounds to 1 in float32
    for objective in ("pairwise", "lambdarank"):
        assert loss_of([20.0, 0.0], [1.0, 0.0], objective) == pytest.approx(exp(-20), rel=1e-5), objective


def test_the_same_list_gives_the_same_bits_in_any_company(backend, device, name):
    sizes = [3, 1, 5, 2]
    scores, relevance = (x.float().to(device) for x in graded_lists(sizes))

    def losses_and_gradients(order):
        starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
        rows = [s for i in order for s in range(starts[i], starts[i + 1])]
        s = scores[rows].requires_grad_()
        loss = lk.listwise_loss(
            s,
            relevance[rows],
            list_sizes=[sizes[i] for i in order],
            objective=OBJECTIVES[name],
            reduction="none",
            backend=backend,
        )
        loss.sum().backward()
        gradients = s.grad.split([sizes[i] for i in order])
        return {i: (loss[place].detach(), gradients[place]) for place, i in enumerate(order)}

    together = losses_and_gradients([0, 1, 2, 3])
    for order in ([0], [1], [2], [3], [2, 0], [3, 2, 1, 0]):
        for i, (loss, grad) in losses_and_gradients(order).items():
            assert torch.equal(loss, together[i][0])
            assert torch.equal(grad, together[i][1])


@pytest.mark.parametrize("objective", ["pairwise", "lambdarank"])
def test_a_wrong_pair_keeps_what_float64_knows_of_it(objective):
    scores = torch.tensor([0.0, 25.0], dtype=torch.float64)  # log(1 + e^25) is 1.4e-11 more than 25
    loss = lk.listwise_loss(scores, torch.tensor([1.0, 0.0]), list_sizes=2, objective=objective)
    assert loss.item() - 25 == pytest.approx(exp(-25), rel=1e-3)


def test_default_objective_is_contrastive_and_default_reduction_mean(device):
    scores, relevance = (x.float().to(device) for x in graded_lists([3, 2]))
    default = lk.listwise_loss(scores, relevance, list_sizes=[3, 2])
    spelled = lk.listwise_loss(scores, relevance, list_sizes=[3, 2], objective="contrastive", reduction="mean")
    assert torch.equal(default, spelled)


@pytest.mark.parametrize("objective", ["pairwise", "contrastive", "listmle", "lambdarank", "listnet"])
def test_a_name_means_the_object_with_its_defaults(backend, device, objective):
    scores, relevance = (x.float().to(device) for x in graded_lists([4, 2]))
    losses = [
        lk.listwise_loss(scores, relevance, list_sizes=[4, 2], objective=o, backend=backend)
        for o in (objective, OBJECTIVES[objective])
    ]
    assert torch.equal(*losses)


# --- candidates of equal relevance -----------------------------------------------------------------------------

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


@pytest.mark.parametrize("name", EVERY)
def test_lists_of_one_to_many_tiles_match_the_reference_side_by_side(backend, device, name):
    sizes = [3, 65, 1, 17] + [64, 8, 300, 2] * (
        backend == "torch" or device == "cuda"
    )  # which Triton's interpreter takes long for
    scores, relevance = graded_lists(sizes, seed=2)
    upstream = torch.linspace(-1, 2, len(sizes), dtype=torch.float64)
    ours, true = scores.to(device, torch.float32).requires_grad_(), scores.float().double().requires_grad_()
    options = dict(list_sizes=sizes, objective=EVERY[name], reduction="none")
    loss = lk.listwise_loss(ours, relevance.to(device), backend=backend, **options)
    truth = lk.reference.listwise_loss(true, relevance, **options)
    loss.backward(upstream.float().to(device))
    truth.backward(upstream)
    torch.testing.assert_close(loss.double().cpu(), truth, rtol=3e-6, atol=1e-6)
    torch.testing.assert_close(ours.grad.double().cpu(), true.grad, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("name", EVERY)
def test_pairs_formed_in_blocks_are_the_pairs_formed_at_once(name, monkeypatch):
    scores, relevance = graded_lists([7] * 5)

    def loss_and_gradient(pairs, lists=slice(None)):
        monkeypatch.setattr(list_losses, "PAIRS", pairs)
        g, r = (x.view(5, 7)[lists].reshape(-1).clone() for x in (scores, relevance))
        g.requires_grad_()
        loss = lk.listwise_loss(g, r, list_sizes=7, objective=EVERY[name], reduction="none", backend="torch")
        return loss.detach(), torch.autograd.grad(loss.sum(), g)[0]

    at_once = loss_and_gradient(7 * 7 * 5)
    for pairs in (7 * 7 * 2, 7 * 3, 1):  # lists two at a time; columns of a list three at a time; one pair at a time
        torch.testing.assert_close(loss_and_gradient(pairs), at_once, rtol=1e-13, atol=1e-14)
    alone = [loss_and_gradient(7 * 7 * 2, slice(i, i + 1)) for i in range(5)]
    together = loss_and_gradient(7 * 7 * 2)
    assert all(torch.equal(torch.cat(x), y) for x, y in zip(zip(*alone, strict=True), together, strict=True))


@pytest.mark.parametrize("name", [*PLAIN, "listnet", "pairwise_mean", "listmle_efron"])
def test_a_lost_answer_leaves_the_bits_of_other_lists_alone(backend, device, name):
    scores, relevance = (x.float().to(device) for x in graded_lists([4, 4, 4], seed=1))

    def loss_and_gradient(g):
        g = g.clone().requires_grad_()
        loss = lk.listwise_loss(g, relevance, list_sizes=4, objective=EVERY[name], reduction="none", backend=backend)
        return loss.detach()[[0, 2]], torch.autograd.grad(loss.sum(), g)[0].view(3, 4)[[0, 2]]

    lost = scores.clone()
    lost[4:6] = -inf
    assert all(torch.equal(x, y) for x, y in zip(loss_and_gradient(scores), loss_and_gradient(lost), strict=True))


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


# ---- relevance of any sign and size, and answers that the policy gives no probability


RELEVANCES = {
    "all negative": [-0.7, -1.3, -0.1, -2.0],
    "mixed": [0.5, -1.5, 2.0, -0.25],
    "huge beside small": [130.0, 1.0, 0.0, 2.0],
    "beyond every gain": [1e30, 1.0, 0.0, 2.0],
    "all huge": [1e30, -1e30, 3e30, 2e30],
    "huge and close": [400.0, 400.5, 399.0, 400.25],
    "tiny": [1e-9, 2e-9, 3e-9, 0.0],
    "tiny and negative": [-1e-9, -2e-9, -3e-9, -4e-9],
    "all zero": [0.0, 0.0, 0.0, 0.0],
    "best is zero": [0.0, -1.0, -2.0, -0.5],
}
FOUR_SCORES = [0.3, -0.2, 1.0, 0.1]


def exact_weighted_lambdarank(scores, relevance, weighting=None, k=None):
    """LambdaRank of one list with gains of 400 digits: what slow_loop says, where its floats overflow or cancel."""
    with localcontext() as context:
        context.prec = 400
        rank = {i: n for n, i in enumerate(sorted(range(len(scores)), key=lambda i: -scores[i]), 1)}
        gains = [Decimal(2) ** Decimal(r) - 1 for r in relevance]
        ideal = sum(g * Decimal(1 / log2(1 + n)) for n, g in enumerate(sorted(gains, reverse=True)[:k], 1))
        gains = [g / (ideal or 1) for g in gains]
        weight = [[float(abs(a - b)) for b in gains] for a in gains]
    loss = 0.0
    for i, better in enumerate(relevance):
        for j, worse in enumerate(relevance):
            if better > worse:
                change = slow_loop.dcg_pair_weight([1.0, 0.0], [rank[i], rank[j]], 0, 1, weighting, k)
                loss += weight[i][j] * change * log(1 + exp(scores[j] - scores[i]))
    return loss


@pytest.mark.parametrize("kind", RELEVANCES)
@pytest.mark.parametrize("name", ["listmle", "lambdarank_dcg", "lambdarank_dcg2_k", "listnet", "listnet_cold"])
def test_relevance_of_any_sign_and_size_has_the_references_loss(backend, device, name, kind):
    lk.objectives.warn_of_raw_rewards()  # so that it has warned
    relevance = torch.tensor(RELEVANCES[kind], dtype=torch.float64)
    truth_scores = torch.tensor(FOUR_SCORES, dtype=torch.float64, requires_grad=True)
    truth = lk.reference.listwise_loss(truth_scores, relevance, list_sizes=4, objective=OBJECTIVES[name])
    truth.backward()
    scores = torch.tensor(FOUR_SCORES, device=device, requires_grad=True)
    loss = lk.listwise_loss(scores, relevance.to(device), list_sizes=4, objective=OBJECTIVES[name], backend=backend)
    loss.backward()
    assert truth.isfinite() and truth >= 0
    torch.testing.assert_close(loss.double().cpu(), truth, rtol=3e-6, atol=1e-9)
    torch.testing.assert_close(scores.grad.double().cpu(), truth_scores.grad, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [kind for kind in RELEVANCES if max(map(abs, RELEVANCES[kind])) < 1000])
@pytest.mark.parametrize("weighted", [name for name in OBJECTIVES if "dcg" in name])
def test_the_references_dcg_weights_are_those_of_400_digits(kind, weighted):
    scores, relevance = (torch.tensor(x, dtype=torch.float64) for x in (FOUR_SCORES, RELEVANCES[kind]))
    loss = lk.reference.listwise_loss(scores, relevance, list_sizes=4, objective=OBJECTIVES[weighted])
    expected = exact_weighted_lambdarank(FOUR_SCORES, RELEVANCES[kind], **vars(OBJECTIVES[weighted]))
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_the_best_of_a_huge_gain_is_all_that_weighs(loss_of):
    # gains over the ideal: 1, 0, 0; ranks by score 2, 3, 1
    first, second, third = (1 / log2(1 + rank) for rank in (1, 2, 3))
    expected = (second - third) * log(1 + exp(-0.2 - 0.3)) + (first - second) * log(1 + exp(1 - 0.3))
    for huge in (130.0, 1e30, inf):
        assert loss_of([0.3, -0.2, 1.0], [huge, 1.0, 0.0], lk.LambdaRank("dcg")) == pytest.approx(expected, rel=1e-6)


def test_the_worst_of_negative_rewards_is_not_trained_up(gradient_of):
    for weighting in ("dcg", "dcg2"):
        gradient = gradient_of([0.3, -0.2, 1.0], [-0.7, -1.3, -0.1], lk.LambdaRank(weighting))
        assert gradient[1] > 0 > gradient[2]  # a step against the gradient: the worst down, the best up


def test_listnet_knows_rewards_whose_float32_is_one_number(backend, device):
    scores = torch.tensor([0.0, 1.0], device=device)
    relevance = torch.tensor([1e9 + log(3), 1e9], dtype=torch.float64, device=device)  # softmax: 3/4, 1/4
    loss = lk.listwise_loss(scores, relevance, list_sizes=2, objective="listnet", backend=backend)
    assert loss.item() == pytest.approx(3 / 4 * log(1 + exp(1)) + 1 / 4 * log(1 + exp(-1)), rel=1e-6)


@pytest.mark.parametrize("relevance", [[0.0, 1.0, -0.5], [0.0, 33.0, 1.0]], ids=["negative", "large"])
def test_raw_rewards_with_exponential_gains_are_warned_of_once(relevance):
    lk.objectives.warn_of_raw_rewards.cache_clear()
    arguments = dict(list_sizes=3, objective=lk.LambdaRank("dcg"), backend="torch")
    with pytest.warns(UserWarning, match="rank gains"):
        lk.listwise_loss(torch.zeros(3), torch.tensor(relevance), **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lk.listwise_loss(torch.zeros(3), torch.tensor(relevance), **arguments)
        lk.objectives.warn_of_raw_rewards.cache_clear()
        lk.listwise_loss(torch.zeros(3), torch.tensor([0.0, 2.0, 4.0]), **arguments)
        lk.listwise_loss(torch.zeros(3), torch.tensor(relevance), **{**arguments, "objective": "lambdarank"})


LOST = {  # scores in which some answers have no probability; by falling relevance they are the list's order here
    "two worst": [1.0, 0.5, -inf, -inf],
    "two in the middle": [1.0, -inf, -inf, 0.5],
    "best and worst": [-inf, 1.0, 0.5, -inf],
    "all": [-inf, -inf, -inf, -inf],
    "one": [1.0, -inf, 0.5, 0.0],
}


def term(i, rest):
    """log sum_j exp(j - i); nothing where only -inf is compared."""
    if max(rest) == -inf:
        return 0.0
    return inf if i == -inf else log(sum(exp(j - i) for j in rest))


def by_hand(scores, objective):
    """Paper formulas; relevance 3, 2, 1, 0."""
    m = len(scores)
    if objective == "contrastive":
        return term(scores[0], scores)
    if objective == "listmle":
        return sum(term(scores[i], scores[i:]) for i in range(m - 1))
    if objective == "pairwise":
        return term(scores[0], [scores[0], scores[-1]])
    return sum(term(scores[i], [scores[i], scores[j]]) for i in range(m) for j in range(i + 1, m))


@pytest.mark.parametrize("kind", LOST)
@pytest.mark.parametrize("objective", PLAIN)
def test_what_only_compares_answers_without_probability_is_left_out(backend, device, objective, kind):
    expected = by_hand(LOST[kind], objective)
    for function in (lk.listwise_loss, lk.reference.listwise_loss):
        scores = torch.tensor(LOST[kind], device=device, requires_grad=True)
        options = {"backend": backend} if function is lk.listwise_loss else {}
        relevance = torch.tensor([3.0, 2.0, 1.0, 0.0], device=device)
        loss = function(scores, relevance, list_sizes=4, objective=objective, **options)
        assert loss.item() == pytest.approx(expected), function
        if function is lk.listwise_loss:
            (grad,) = torch.autograd.grad(loss, scores)
            assert grad.isfinite().all() and abs(grad.sum()) < 1e-6
            if kind == "all":
                assert (grad == 0).all()


def test_gradient_of_two_answers_without_probability(gradient_of):
    s = 1 / (1 + exp(0.5))  # of the one pair that is left between finite scores
    assert gradient_of([1.0, 0.5, -inf, -inf], [3.0, 2.0, 1.0, 0.0], "lambdarank") == pytest.approx([-s, s, 0, 0])
    assert gradient_of([1.0, 0.5, -inf, -inf], [3.0, 2.0, 1.0, 0.0], "listmle") == pytest.approx([-s, s, 0, 0])


@pytest.mark.parametrize("name", EVERY)
def test_every_objective_stays_a_number_beside_lost_answers(backend, device, name):
    relevances = [3.0, 2.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]
    lists = [(scores, relevance) for scores in LOST.values() for relevance in relevances]
    scores, relevance = (torch.tensor(x, device=device).flatten() for x in zip(*lists, strict=True))
    options = dict(list_sizes=4, objective=EVERY[name], reduction="none")
    loss = lk.listwise_loss(scores.requires_grad_(), relevance, backend=backend, **options)
    assert (loss >= 0).all()  # which NaN is not
    assert torch.autograd.grad(loss.sum(), scores)[0].isfinite().all()
    truth = lk.reference.listwise_loss(scores.detach().double(), relevance, **options)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=1e-7)


def test_a_score_of_nan_is_not_taken_for_a_lost_answer(loss_of, name):
    for scores in ([nan] * 3, [nan, -inf, nan], [nan, 1.0, nan]):
        assert loss_of(scores, [2.0, 1.0, 0.0], OBJECTIVES[name]) != 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint64], ids=str)
def test_integers_that_float64_rounds_together_keep_their_order(backend, device, dtype):
    large = 2**60
    relevance = torch.tensor([large, large + 1, large + 3, large + 2], dtype=dtype, device=device)
    scores = torch.tensor(FOUR_SCORES, device=device)
    small = torch.tensor([0.0, 1.0, 3.0, 2.0], device=device)
    for objective in PLAIN:
        losses = [lk.listwise_loss(scores, r, list_sizes=4, objective=objective, backend=backend) for r in (relevance, small)]
        assert torch.equal(*losses), objective


@pytest.mark.skipif(torch.cuda.is_available(), reason="values on a GPU are not inspected")
@pytest.mark.parametrize("objective", [lk.ListNet(), lk.LambdaRank("dcg2")], ids=["listnet", "dcg2"])
def test_integers_beyond_2_to_the_53_are_refused_where_values_are_read(objective):
    relevance = torch.tensor([0, -(2**53) - 1, 1])
    with pytest.raises(ValueError, match=rf"relevance.*{2**53}.*-{2**53 + 1} at position 1"):
        lk.listwise_loss(torch.zeros(3), relevance, list_sizes=3, objective=objective)

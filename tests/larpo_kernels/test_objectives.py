"""The list side: scores and relevance in, losses out. Expected values are arithmetic to be checked by eye."""

from math import exp, inf, log, log2

import pytest
import torch

import larpo_kernels as lk
from larpo_kernels.backends.pytorch import list_losses
from tests.helpers import slow_loop
from tests.helpers.list_losses import EVERY, NAMES, OBJECTIVES, PLAIN, RELEVANCE, SCORES, TIES, graded_lists
from tests.helpers.optional_hypothesis import given, st


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
    scores, relevance = [0.0, 5.0], [2.0, 1.0]  # with k = 1, rank 2 has no discount and the ideal is one candidate
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
    scores, relevance = (torch.tensor(x, device=device) for x in ([3.0, 0.0, 0.0], [0.0, 1.0, 0.0]))
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
        for sizes in (3, [3, 3], (3, 3), torch.tensor([3, 3]), torch.tensor([3, 3], dtype=torch.int32, device=device))
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
    truth = slow_loop.listwise_losses(truth_scores, relevance, [m, m], EVERY[name])
    truth.backward(upstream)

    ours = scores.to(device, torch.float32).requires_grad_()
    loss = lk.listwise_loss(
        ours, relevance.float().to(device), list_sizes=m, objective=EVERY[name], reduction="none", backend=backend
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
    truth = slow_loop.listwise_losses(slow, relevance, list_sizes, EVERY[name])
    loss.backward(upstream)
    truth.backward(upstream)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.grad, slow.grad, rtol=1e-12, atol=1e-12)


def test_gradients_are_the_finite_differences_of_the_loss(name):
    scores, relevance = graded_lists([4, 1, 3])

    def losses(scores):
        return lk.listwise_loss(
            scores, relevance, list_sizes=[4, 1, 3], objective=OBJECTIVES[name], reduction="none", backend="torch"
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


@pytest.mark.parametrize("objective", NAMES)
def test_a_name_means_the_object_with_its_defaults(backend, device, objective):
    scores, relevance = (x.float().to(device) for x in graded_lists([4, 2]))
    losses = [
        lk.listwise_loss(scores, relevance, list_sizes=[4, 2], objective=o, backend=backend)
        for o in (objective, OBJECTIVES[objective])
    ]
    assert torch.equal(*losses)


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

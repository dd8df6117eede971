"""Relevance of any sign and size, and answers to which the policy gives no probability."""

import warnings
from decimal import Decimal, localcontext
from math import exp, inf, log, log2, nan

import pytest
import torch

import larpo_kernels as lk
from tests.helpers import slow_loop
from tests.helpers.list_losses import EVERY, OBJECTIVES, PLAIN, graded_lists

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


def test_gains_are_not_divided_by_an_ideal_of_zero(backend, device):
    """That of the best candidate alone, whose gain is 0."""
    scores = torch.tensor(FOUR_SCORES, device=device, requires_grad=True)
    relevance = RELEVANCES["best is zero"]
    objective = lk.LambdaRank("dcg", k=1)
    loss = lk.listwise_loss(scores, torch.tensor(relevance, device=device), list_sizes=4, objective=objective, backend=backend)
    assert loss.item() == pytest.approx(exact_weighted_lambdarank(FOUR_SCORES, relevance, "dcg", 1), rel=1e-6)
    assert torch.autograd.grad(loss, scores)[0].isfinite().all()


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


@pytest.mark.parametrize("orders", [1, pytest.param(3, marks=pytest.mark.slow_interpreted)])
@pytest.mark.parametrize("name", EVERY)
def test_every_objective_stays_a_number_beside_lost_answers(backend, device, name, orders):
    """orders: of how many relevances each kind of scores has one."""
    relevances = [3.0, 2.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]
    lists = [(scores, relevances[(i + j) % 3]) for i, scores in enumerate(LOST.values()) for j in range(orders)]
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

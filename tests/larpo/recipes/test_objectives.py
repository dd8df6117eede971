"""Objectives of other papers: loss and gradient against each paper's formula, written out candidate by candidate in float64."""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

import larpo_kernels as lk
from larpo.recipes import objectives
from larpo.recipes.harness import lists as lists_of
from tests.helpers.written_out import assert_equal_losses

SIZES = [4, 1, 2, 5, 3]
TIED = 4  # the list whose rewards are all equal


@pytest.fixture
def lists():
    generator = torch.Generator().manual_seed(0)
    total = sum(SIZES)
    logps = -8 * torch.rand(total, generator=generator, dtype=torch.float64)
    ref_logps = logps + torch.randn(total, generator=generator, dtype=torch.float64)
    num_tokens = torch.randint(1, 9, (total,), generator=generator)
    relevance = torch.randint(0, 4, (total,), generator=generator).double() / 3  # ties on purpose
    relevance[-SIZES[TIED] :] = 0.5
    return logps, ref_logps, num_tokens, relevance, torch.tensor(SIZES)


def plain_lipo(l, ref, n, r):
    s = 0.1 * (l - ref)
    rank = 1 + (s[None, :] > s[:, None]).sum(1)
    total = 0.0 * l.sum()
    for i in range(len(l)):
        for j in range(len(l)):
            if r[i] > r[j]:
                gain = abs(2 ** r[i] - 2 ** r[j])
                discount = abs(1 / math.log(1 + rank[i]) - 1 / math.log(1 + rank[j]))
                total = total + gain * discount * torch.log(1 + torch.exp(-(s[i] - s[j])))
    return total


def plain_simpo(l, ref, n, r):
    if len(l) == 1:
        return 0.0 * l.sum()
    order = sorted(range(len(l)), key=lambda i: -float(r[i]))
    best, worst = order[0], order[-1]
    return -logsigmoid(2.0 * l[best] / n[best] - 2.0 * l[worst] / n[worst] - 0.5)


def plain_rrhf(l, ref, n, r):
    p = l / n
    total = -l[int(r.argmax())]
    for i in range(len(l)):
        for j in range(len(l)):
            if r[j] < r[i]:
                total = total + torch.clamp(p[j] - p[i], min=0)
    return total


def plain_pro(l, ref, n, r):
    p = l / n
    total = -0.05 * l[int(r.argmax())]
    for k in range(len(l)):
        worse = [i for i in range(len(l)) if r[i] < r[k]]
        if not worse:
            continue
        inverse = {i: r[k] - r[i] for i in worse}  # 1 / T_k^i
        top = torch.exp(p[k] * max(inverse.values()))
        total = total - torch.log(top / (top + sum(torch.exp(p[i] * inverse[i]) for i in worse)))
    return total


PLAIN = {
    "lipo": (objectives.lipo_lambda, plain_lipo),
    "simpo": (objectives.simpo, plain_simpo),
    "rrhf": (objectives.rrhf, plain_rrhf),
    "pro": (objectives.pro, plain_pro),
}


@pytest.mark.parametrize("name", PLAIN)
def test_loss_and_gradient_are_the_papers(name, lists):
    ours, plain = PLAIN[name]
    logps, *others, sizes = lists

    def written_out(logps):
        parts = zip(*(x.split(SIZES) for x in (logps, *others)), strict=True)
        return sum(plain(*part) for part in parts) / len(SIZES)

    assert_equal_losses(lambda logps: ours(logps, *others, sizes)[0], written_out, logps)
    assert ours(logps, *others, sizes)[1].shape == logps.shape


def test_lipo_is_lambdarank_times_ideal_dcg_over_log_2():
    """The relation that the module's docstring states, on one list: worked out here with the ideal DCG by hand."""
    scores, relevance = torch.tensor([0.1, 0.4, -0.2], dtype=torch.float64), torch.tensor([1.0, 0.0, 2.0])
    normed = lk.listwise_loss(scores, relevance, list_sizes=3, objective=lk.LambdaRank(weighting="dcg"))
    lipo, _ = objectives.lipo_lambda(scores, 0 * scores, None, relevance, torch.tensor([3]), beta=1.0)
    ideal = 3 / math.log2(2) + 1 / math.log2(3)
    assert lipo.item() == pytest.approx(normed.item() * ideal / math.log(2), rel=1e-12)


@pytest.mark.parametrize("name", ["lipo", "pro"])
def test_a_tied_list_has_no_pairs_but_counts_in_the_mean(name, lists):
    tied = slice(-SIZES[TIED], None)
    logps, *others, sizes = lists
    options = {"sft_weight": 0.0} if name == "pro" else {}
    x = logps.clone().requires_grad_()
    loss, _ = PLAIN[name][0](x, *others, sizes, **options)
    assert torch.autograd.grad(loss, x)[0][tied].abs().max() == 0
    without, _ = PLAIN[name][0](x[: tied.start], *(v[: tied.start] for v in others), sizes[:-1], **options)
    assert loss.item() == pytest.approx(without.item() * (len(SIZES) - 1) / len(SIZES))


def test_no_pair_at_all_gives_zero_that_is_connected():
    x = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss, _ = objectives.pro(x, x.detach(), torch.tensor([1, 2]), torch.tensor([1.0, 1.0]), torch.tensor([2]), sft_weight=0.0)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, x)[0].tolist() == [0, 0]


def test_the_start_of_lists_is_found_though_sizes_differ():
    relevance = torch.tensor([0.0, 5.0, 5.0, 7.0, 1.0, 2.0])
    assert lists_of.best(relevance, torch.tensor([3, 1, 2])).tolist() == [1, 3, 5]


def test_without_a_reference_the_score_is_the_likelihood():
    x, sizes = torch.tensor([-1.0, -2.0]), torch.tensor([2])
    with_zero, _ = objectives.lipo_lambda(x, torch.zeros(2), None, torch.tensor([1.0, 0.0]), sizes)
    without, scores = objectives.lipo_lambda(x, None, None, torch.tensor([1.0, 0.0]), sizes)
    assert without.item() == with_zero.item() > 0
    torch.testing.assert_close(scores, 0.1 * x)

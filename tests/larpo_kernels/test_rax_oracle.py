"""The list losses against rax 0.4, written by others from the same papers (float64)."""

from functools import partial

import pytest
import torch

import larpo_kernels as lk

jax = pytest.importorskip("jax", reason="rax, the independent oracle, needs jax")
rax = pytest.importorskip("rax", reason="rax is the independent oracle")

M = 8  # candidates


@pytest.fixture(autouse=True)
def float64_in_jax():
    """jax computes in float32 unless told; the switch is global, so put it back."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def some_list(tied=False):
    """scores [M] without ties and grades [M] from 0 to 4, all different unless `tied`."""
    generator = torch.Generator().manual_seed(M)
    scores = 2 * torch.randn(M, generator=generator, dtype=torch.float64)
    if tied:
        return scores, torch.randint(0, 3, (M,), generator=generator).double()
    return scores, torch.linspace(0, 4, M, dtype=torch.float64)[torch.randperm(M, generator=generator)]


def assert_same_loss_and_gradient(objective, rax_loss, scores, relevance):
    """rax_loss: (scores, relevance) as jax arrays -> scalar."""
    ours = scores.clone().requires_grad_()
    loss = lk.listwise_loss(ours, relevance, list_sizes=len(scores), objective=objective, backend="torch")
    loss.backward()
    theirs, slope = jax.value_and_grad(rax_loss)(jax.numpy.array(scores.numpy()), jax.numpy.array(relevance.numpy()))
    assert theirs.dtype == "float64"
    assert loss.item() == pytest.approx(float(theirs), rel=1e-12, abs=1e-14)
    assert ours.grad.tolist() == pytest.approx(slope.tolist(), rel=1e-10, abs=1e-14)


def test_contrastive_is_rax_softmax_loss_of_the_best():
    scores, relevance = some_list()

    def softmax_loss(s, y):
        best = jax.numpy.zeros(M).at[jax.numpy.argmax(y)].set(1.0)
        return rax.softmax_loss(s, best, reduce_fn=None)

    assert_same_loss_and_gradient("contrastive", softmax_loss, scores, relevance)


@pytest.mark.parametrize("tied", [False, True])
def test_listmle_is_rax_listmle(tied):
    scores, relevance = some_list(tied)
    assert_same_loss_and_gradient("listmle", lambda s, y: rax.listmle_loss(s, y, reduce_fn=None, key=None), scores, relevance)


def rax_pairs(lambdaweight_fn=None):
    """Sum over all pairs of rax's logistic loss."""
    return lambda s, y: rax.pairwise_logistic_loss(s, y, lambdaweight_fn=lambdaweight_fn, reduce_fn=None).sum(-1)


@pytest.mark.parametrize("tied", [False, True])
def test_lambdarank_is_rax_pairwise_logistic(tied):
    assert_same_loss_and_gradient("lambdarank", rax_pairs(), *some_list(tied))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("k", [None, 2, 100])
@pytest.mark.parametrize("weighting", ["dcg", "dcg2"])
def test_weighted_lambdarank_is_rax_with_lambdaweights_over_the_list_size(weighting, k, tied):
    weights = partial(getattr(rax, f"{weighting}_lambdaweight"), normalize=True, topn=k)

    def constant_weights_without_the_list_size(s, *args, **kwargs):
        return weights(jax.lax.stop_gradient(s), *args, **kwargs) / M  # rax multiplies by M

    assert_same_loss_and_gradient(
        lk.LambdaRank(weighting=weighting, k=k), rax_pairs(constant_weights_without_the_list_size), *some_list(tied)
    )


def test_listnet_is_rax_softmax_loss_of_the_softmaxed_relevance():
    assert_same_loss_and_gradient(
        lk.ListNet(temperature=0.5), lambda s, y: rax.softmax_loss(s, jax.nn.softmax(y / 0.5), reduce_fn=None), *some_list()
    )

"""The specification in eager PyTorch says what the loops of slow_loop say."""

import pytest
import torch

import larpo_kernels as lk
from tests.helpers import slow_loop
from tests.helpers.batches import IGNORE, gradient, make_batch

OPTIONS = [{}, {"logit_scale": 0.5, "softcap": 2.0}, {"length_normalized": True}]
OBJECTIVES = [
    lk.Pairwise(),
    lk.Pairwise(ties="skip"),
    lk.Pairwise(ties="mean"),
    lk.Contrastive(),
    lk.Contrastive(ties="skip"),
    lk.Contrastive(ties="mean"),
    lk.ListMLE(),
    lk.ListMLE(ties="skip"),
    lk.ListMLE(ties="efron"),
    lk.LambdaRank(),
    lk.LambdaRank(weighting="dcg", k=2),
    lk.LambdaRank(weighting="dcg2"),
    lk.LambdaRank(weighting="dcg2", k=1),
    lk.ListNet(temperature=0.5),
]


def a_batch(layout, regime="initialisation"):
    batch = make_batch((3, 1, 2), (3, 1, 4, 2, 0, 5), vocabulary=31, dtype=torch.float64, regime=regime)
    return batch if layout == "padded" else batch.packed()


@pytest.fixture(params=["padded", "packed"])
def batch(request):
    return a_batch(request.param)


def assert_same(reference, slow, logits):
    """Values and gradients of two functions of the logits, in float64."""
    torch.testing.assert_close(reference(logits), slow(logits), rtol=1e-11, atol=1e-12)
    out = slow(logits)
    upstream = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).reshape(out.shape)
    torch.testing.assert_close(gradient(reference, logits, upstream), gradient(slow, logits, upstream), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_token_logps(regime, options):
    batch = a_batch("padded", regime)
    assert_same(
        lambda x: lk.reference.token_logps(x, batch.labels, **options),
        lambda x: slow_loop.token_logps(x, batch.labels, **options),
        batch.logits,
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_sequence_logps(batch, options):
    assert_same(
        lambda x: lk.reference.sequence_logps(x, batch.labels, cu_seqlens=batch.cu_seqlens, **options),
        lambda x: slow_loop.sequence_logps(x, batch.labels, cu_seqlens=batch.cu_seqlens, **options),
        batch.logits,
    )


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_listwise_loss(objective):
    scores = torch.randn(11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    relevance = torch.tensor([0.0, 2, 1, 3, 1, 1, 2, 0, 2, 1, 0], dtype=torch.float64)
    assert_same(
        lambda x: lk.reference.listwise_loss(x, relevance, list_sizes=[3, 1, 2, 5], objective=objective, reduction="none"),
        lambda x: slow_loop.listwise_losses(x, relevance, [3, 1, 2, 5], objective),
        scores,
    )


@pytest.mark.parametrize("objective", ["contrastive", "listmle"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fused_listwise_loss(batch, objective, options):
    options = {**options, "objective": objective, "beta": 0.3, "ref_logps": batch.ref_logps, **batch.layout}

    def reference(logits):
        given = logits, batch.labels, batch.relevance
        return lk.reference.fused_listwise_loss(*given, reduction="none", **options)

    def slow(logits):
        return slow_loop.fused_listwise_loss(logits, batch.labels, batch.relevance, **options)

    for part, expected in zip(reference(batch.logits)[:3], slow(batch.logits), strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-11, atol=1e-12)
    assert_same(lambda x: reference(x).loss, lambda x: slow(x)[0], batch.logits)


def test_statistics(regime):
    batch = a_batch("packed", regime)
    out = lk.reference.token_logps(batch.logits, batch.labels, return_stats=True)
    torch.testing.assert_close(out.entropy.double(), slow_loop.entropies(batch.logits, batch.labels))
    assert torch.equal(out.top1.bool(), slow_loop.top1_hits(batch.logits, batch.labels))


def test_reference_ignores_junk_in_ignored_rows(batch):
    spoilt = batch.logits.clone()
    spoilt[batch.labels == IGNORE] = float("nan")
    grad = gradient(lambda x: lk.reference.token_logps(x, batch.labels), spoilt)
    assert torch.equal(grad, gradient(lambda x: lk.reference.token_logps(x, batch.labels), batch.logits))


def test_low_precision_logits_give_float32_logps(dtype):
    batch = make_batch(dtype=dtype)
    assert lk.reference.sequence_logps(batch.logits, batch.labels).dtype == torch.float32

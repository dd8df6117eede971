"""sequence_logps: tokens summed into candidates, padded or packed."""

import math
from dataclasses import replace

import pytest
import torch

import larpo_kernels as lk
from tests.helpers import slow_loop
from tests.helpers.batches import IGNORE, gradient, leaf, make_batch
from tests.helpers.optional_hypothesis import given, st
from tests.helpers.regimes import REGIMES
from tests.helpers.tolerance import assert_no_worse_than_eager, gradient_eps


def upstream_of(batch):
    """A different number, of either sign, for every candidate."""
    return torch.linspace(-1.5, 2, len(batch.lengths), dtype=torch.float64, device=batch.logits.device)


def ours(batch, backend, **options):
    return lambda x: lk.sequence_logps(x, batch.labels, cu_seqlens=batch.cu_seqlens, backend=backend, **options)


def slow(batch, **options):
    return lambda x: slow_loop.sequence_logps(x, batch.labels, cu_seqlens=batch.cu_seqlens, **options)


def assert_matches_float64(batch, backend, **options):
    x, upstream = leaf(batch.logits), upstream_of(batch)
    logps = ours(batch, backend, **options)(x)
    (grad,) = torch.autograd.grad(logps, x, upstream.float())
    eager, truth = slow(batch, compute=torch.float32, **options), slow(batch, **options)
    assert logps.shape == (len(batch.lengths),) and logps.dtype == torch.float32
    assert (logps <= 0).all()
    assert_no_worse_than_eager(logps, eager(batch.logits), truth(batch.logits))
    assert_no_worse_than_eager(
        grad, gradient(eager, batch.logits, upstream), gradient(truth, batch.logits.double(), upstream), gradient_eps(logps)
    )


@pytest.fixture(params=["padded", "packed"])
def batch(request, device):
    batch = make_batch(list_sizes=(5,), lengths=(3, 1, 2, 0, 2), vocabulary=31, device=device)
    return batch if request.param == "padded" else batch.packed()


CASES = [  # every regime, packed; every dtype, padded. The grid of both is of the rows: test_token_logps.py
    *((torch.float32, regime, True) for regime in REGIMES),
    *((dtype, "initialisation", False) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
]


@pytest.mark.parametrize(("dtype", "regime", "packed"), CASES)
def test_logps_and_gradients_are_as_exact_as_eager(backend, device, dtype, regime, packed):
    batch = make_batch((3,), vocabulary=67, dtype=dtype, device=device, regime=regime)
    assert_matches_float64(batch.packed() if packed else batch, backend)


def test_length_normalized_gradients_are_as_exact_as_eager(backend, batch):
    assert_matches_float64(batch, backend, length_normalized=True)


def test_scale_and_softcap_reach_candidates(backend, batch):
    assert_matches_float64(batch, backend, logit_scale=2.5, softcap=3.0, length_normalized=True)


def test_length_normalized_divides_by_the_tokens_that_count(backend, device):
    logits = torch.zeros(2, 4, 10, device=device)  # every token has log-probability -log 10
    labels = torch.tensor([[IGNORE, 1, 2, IGNORE], [3, 4, 5, 6]], device=device)
    total = lk.sequence_logps(logits, labels, backend=backend)
    mean = lk.sequence_logps(logits, labels, length_normalized=True, backend=backend)
    assert total.tolist() == pytest.approx([-2 * math.log(10), -4 * math.log(10)])
    assert mean.tolist() == pytest.approx([-math.log(10), -math.log(10)])


@pytest.mark.parametrize("length_normalized", [False, True])
def test_an_empty_candidate_is_zero_and_pushes_nothing(backend, batch, length_normalized):
    candidates = ours(batch, backend, length_normalized=length_normalized)
    empty = 3
    assert batch.lengths[empty] == 0
    assert candidates(batch.logits)[empty] == 0
    grad = gradient(candidates, batch.logits, torch.eye(5, device=batch.logits.device)[empty])
    assert (grad == 0).all()


def test_candidates_without_any_tokens(backend, device):
    logits = torch.zeros(0, 31, device=device, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.long, device=device)
    logps = lk.sequence_logps(logits, labels, cu_seqlens=torch.zeros(4, dtype=torch.long, device=device), backend=backend)
    logps.sum().backward()
    assert logps.tolist() == [0, 0, 0]


def test_an_impossible_token_makes_its_candidate_impossible(backend, device):
    batch = make_batch(list_sizes=(3,), device=device)
    label = batch.labels[1, 1].item()
    assert label != IGNORE
    batch.logits[1, 1, label] = -math.inf
    logps = ours(batch, backend)(batch.logits)
    assert logps[1] == -math.inf and logps[[0, 2]].isfinite().all()
    grad = gradient(ours(batch, backend), batch.logits)
    assert grad.isfinite().all() and (grad[1, 1] == 0).all()


def test_int32_borders_mean_the_same(backend, device):
    batch = make_batch(list_sizes=(5,), lengths=(3, 1, 2, 0, 2), device=device).packed()
    logps = ours(batch, backend)(batch.logits)
    as_int32 = lk.sequence_logps(batch.logits, batch.labels, cu_seqlens=batch.cu_seqlens.int(), backend=backend)
    assert torch.equal(logps, as_int32)


def test_a_packed_view_with_gaps_between_its_rows(backend, device):
    batch = make_batch(list_sizes=(4,), device=device).packed()
    wide = torch.full((len(batch.labels), 2, 31), math.nan, device=device)
    wide[:, 0] = batch.logits
    assert not wide[:, 0].is_contiguous()
    assert torch.equal(ours(batch, backend)(wide[:, 0]), ours(batch, backend)(batch.logits))


@pytest.mark.parametrize("packed", [False, True])
def test_a_candidate_gives_the_same_bits_in_any_company(backend, device, packed):
    """Nor may the padding that a longer neighbour brings change how a short candidate is summed."""
    batch = make_batch(list_sizes=(1,) * 4, lengths=(3, 19, 5, 11), vocabulary=7, device=device)
    upstream = torch.tensor([1.0, -2.0, 0.5, 3.0], device=device)

    def logps_and_gradients(order):
        part = batch.lists(order)
        width = max(part.lengths)
        part = make_narrow(part, width)
        part = part.packed() if packed else part
        x = leaf(part.logits)
        logps = ours(part, backend)(x)
        (grad,) = torch.autograd.grad(logps, x, upstream[order])
        grads = grad.split(list(part.lengths)) if packed else [g[:n] for g, n in zip(grad, part.lengths, strict=True)]
        return {i: (logps[place], grads[place]) for place, i in enumerate(order)}

    together = logps_and_gradients([0, 1, 2, 3])
    for order in ([0], [2], [2, 0], [3, 2, 0]):
        for i, (logp, grad) in logps_and_gradients(order).items():
            assert torch.equal(logp, together[i][0])
            assert torch.equal(grad, together[i][1])


def make_narrow(batch, width):
    """`batch` cut to `width` positions per candidate."""
    return replace(batch, logits=batch.logits[:, :width], labels=batch.labels[:, :width])


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=7),
    prompt=st.integers(0, 2),
    padding=st.integers(0, 2),
    length_normalized=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_packed_padded_and_a_slow_loop_agree(lengths, prompt, padding, length_normalized, seed):
    padded = make_batch((len(lengths),), lengths, vocabulary=11, dtype=torch.float64, prompt=prompt, padding=padding, seed=seed)
    packed = padded.packed()
    upstream = upstream_of(padded)
    truth = slow(padded, length_normalized=length_normalized)
    true_grad = gradient(truth, padded.logits, upstream)
    for batch, grad in ((padded, true_grad), (packed, padded.with_logits(true_grad).packed().logits)):
        function = ours(batch, "torch", length_normalized=length_normalized)
        torch.testing.assert_close(function(batch.logits), truth(padded.logits), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient(function, batch.logits, upstream), grad, rtol=1e-12, atol=1e-12)

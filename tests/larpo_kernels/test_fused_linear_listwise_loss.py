"""fused_linear_listwise_loss: from hidden states and the head to the listwise loss and back."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import larpo_kernels as lk
from tests.helpers import linear_heads, slow_loop
from tests.helpers.batches import IGNORE, leaf, make_batch
from tests.helpers.interpreted import few_interpreted
from tests.helpers.linear_heads import SCHEDULES, make_head, run, scheduled
from tests.helpers.list_losses import NAMES, VARIED
from tests.helpers.tolerance import FLOAT32_ROUNDING, assert_no_worse_than_eager, gradient_eps

LIST_SIZES, LENGTHS = (3, 1, 2), (3, 1, 4, 2, 3, 5)  # one of the candidates has no tokens but its prompt


@pytest.fixture
def small_tiles(monkeypatch):
    linear_heads.use_small_tiles(monkeypatch, tokens=10)


def head_and_batch(packed=False, dtype=torch.float32, device="cpu", bias=True):
    """Three lists with ragged candidates, and a head for them; the batch's own logits are not used."""
    batch = make_batch(LIST_SIZES, LENGTHS, vocabulary=100, device=device)
    batch = batch.packed() if packed else batch
    head = make_head(100, 16, dtype=dtype, device=device, bias=bias, labels=batch.labels.cpu())
    upstream = torch.linspace(-1, 2, len(LIST_SIZES), dtype=torch.float64, device=device)  # of each list
    return replace(head, upstream=upstream), batch


def fused(batch, backend, pick="loss", **options):
    """(hidden, weight, bias) -> a field of the output, per list."""

    def call(hidden, weight, bias):
        options.setdefault("ref_logps", batch.ref_logps)
        given = hidden, weight, batch.labels, batch.relevance
        how = dict(bias=bias, reduction="none", backend=backend, **options)
        out = lk.fused_linear_listwise_loss(*given, **batch.layout, **how)
        return getattr(out, pick) if pick else out

    return call


def slow(batch, compute, pick=0, **options):
    def call(hidden, weight, bias):
        options.setdefault("ref_logps", batch.ref_logps)
        given = F.linear(hidden, weight, bias), batch.labels, batch.relevance
        return slow_loop.fused_listwise_loss(*given, **batch.layout, compute=compute, **options)[pick]

    return call


def assert_matches_float64(head, batch, backend, schedule="recompute", **options):
    wanted, walk = scheduled(schedule, head)
    loss, grads = run(fused(batch, backend, **walk, **options), head, wanted)
    plain, plain_grads = run(slow(batch, torch.float32, **options), head, wanted)
    truth, true_grads = run(slow(batch, torch.float64, **options), head.double(), wanted)
    eps = 64 * FLOAT32_ROUNDING  # a score is a difference of two larger log-likelihoods
    assert loss.dtype == torch.float32
    assert_no_worse_than_eager(loss, plain, truth, eps)
    out = fused(batch, backend, None, **walk, **options)(head.hidden, head.weight, head.bias)
    exact = head.double()
    for place, name in ((1, "logps"), (2, "scores")):
        plain = slow(batch, torch.float32, place, **options)(head.hidden, head.weight, head.bias)
        truth = slow(batch, torch.float64, place, **options)(exact.hidden, exact.weight, exact.bias)
        assert getattr(out, name).dtype == torch.float32 and not getattr(out, name).requires_grad
        assert_no_worse_than_eager(getattr(out, name), plain, truth, eps)
    times = linear_heads.rounding_allowance(head.hidden.dtype)
    for name in wanted:
        assert grads[name].dtype == getattr(head, name).dtype
        linear_heads.assert_within(
            times, grads[name], plain_grads[name], true_grads[name], max(eps, gradient_eps(out.logps)), name
        )
    if wanted:
        assert (grads["hidden"][batch.labels == IGNORE] == 0).all()


FEW = [("score_only", False), ("list_hold", False), ("recompute", True), ("frozen_head", True)]


@pytest.mark.parametrize(("schedule", "packed"), few_interpreted([*((name, False) for name in SCHEDULES), *FEW[2:]], FEW))
def test_every_schedule_is_as_exact_as_eager(backend, device, schedule, packed, small_tiles):
    assert_matches_float64(*head_and_batch(packed, device=device), backend, schedule)


@pytest.mark.parametrize(
    ("dtype", "schedule"),
    [(torch.bfloat16, "list_hold"), (torch.bfloat16, "frozen_head"), (torch.float16, "recompute")],
    ids=str,
)
def test_half_precision_is_as_exact_as_eager(backend, device, dtype, schedule, small_tiles):
    assert_matches_float64(*head_and_batch(dtype=dtype, device=device), backend, schedule)


@pytest.mark.parametrize("objective", VARIED, ids=str)
def test_every_objective_reaches_the_head(backend, device, objective):
    head, batch = head_and_batch(device=device)
    batch = replace(batch, relevance=torch.tensor([0.0, 2, 1, 1, 3, 0], device=device))
    assert_matches_float64(head, batch, backend, objective=objective, beta=0.5)


@pytest.mark.parametrize(
    "options",
    [{"length_normalized": True, "beta": 2.0}, {"ref_logps": None}, {"softcap": 2.0, "logit_scale": 1.5}],
    ids=["length_normalized", "reference_free", "softcap_and_scale"],
)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_options_reach_the_head(backend, device, packed, options):
    assert_matches_float64(*head_and_batch(packed, device=device), backend, "list_hold", **options)


def test_reductions_over_lists(backend, device):
    head, batch = head_and_batch(device=device)
    x = (head.hidden, head.weight, batch.labels, batch.relevance)
    losses, mean, total = (
        lk.fused_linear_listwise_loss(*x, **batch.layout, reduction=reduction, backend=backend).loss
        for reduction in ("none", "mean", "sum")
    )
    assert losses.shape == (3,) and losses[1] == 0  # a list of one
    torch.testing.assert_close(mean, losses.mean())
    torch.testing.assert_close(total, losses.sum())


def test_it_is_the_loss_of_the_logits(backend, device):
    head, batch = head_and_batch(device=device)
    linear = fused(batch, backend, None, return_stats=True)(head.hidden, head.weight, head.bias)
    logits = F.linear(head.hidden, head.weight, head.bias)
    options = dict(ref_logps=batch.ref_logps, reduction="none", return_stats=True, backend=backend)
    given = lk.fused_listwise_loss(logits, batch.labels, batch.relevance, **batch.layout, **options)
    for name, x, y in zip(linear._fields, linear, given, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_it_is_what_the_specification_says(backend, device):
    head, batch = head_and_batch(device=device)
    for objective in NAMES:
        ours = fused(batch, backend, objective=objective)(head.hidden, head.weight, head.bias)
        x, options = (head.hidden, head.weight, batch.labels, batch.relevance), dict(objective=objective, reduction="none")
        spec = lk.reference.fused_linear_listwise_loss(*x, bias=head.bias, **batch.layout, ref_logps=batch.ref_logps, **options)
        torch.testing.assert_close(ours, spec.loss, rtol=1e-5, atol=1e-5)


def test_statistics_only_when_asked_for(backend, device):
    head, batch = head_and_batch(device=device)
    out = fused(batch, backend, None)(head.hidden, head.weight, head.bias)
    assert out.entropy is None and out.top1 is None
    out = fused(batch, backend, None, return_stats=True)(leaf(head.hidden), head.weight, head.bias)
    logits = F.linear(head.hidden, head.weight, head.bias)
    assert out.entropy.shape == out.top1.shape == batch.labels.shape
    assert out.loss.requires_grad and not (out.entropy.requires_grad or out.top1.requires_grad)
    torch.testing.assert_close(out.entropy.cpu().double(), slow_loop.entropies(logits, batch.labels), rtol=1e-4, atol=1e-5)


def test_a_whole_model_trains_through_it(device):
    """Embedding tied to the head, through a layer, against the eager specification in float64."""
    head, batch = head_and_batch(device=device, bias=False)
    torch.manual_seed(0)
    tokens = batch.labels.clamp(min=0)
    layer = torch.nn.Linear(16, 16, device=device)

    def gradients(loss_of, dtype):
        embedding, matrix = leaf(head.weight.to(dtype)), leaf(layer.weight.to(dtype))
        hidden = torch.tanh(F.embedding(tokens, embedding) @ matrix.t())
        loss = loss_of(hidden, embedding, batch.labels, batch.relevance.to(dtype), **batch.layout, objective="listmle").loss
        return torch.autograd.grad(loss, (embedding, matrix))

    ours = gradients(lk.fused_linear_listwise_loss, torch.float32)
    truth = gradients(lk.reference.fused_linear_listwise_loss, torch.float64)
    for x, y in zip(ours, truth, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-6)

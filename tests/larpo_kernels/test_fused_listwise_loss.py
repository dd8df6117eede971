"""fused_listwise_loss: from logits to the listwise loss and back."""

import math
from dataclasses import replace
from math import log

import pytest
import torch

import larpo_kernels as lk
from tests.helpers import slow_loop
from tests.helpers.batches import IGNORE, gradient, leaf, make_batch
from tests.helpers.costs import costs
from tests.helpers.list_losses import NAMES, VARIED
from tests.helpers.optional_hypothesis import given, st
from tests.helpers.regimes import REGIMES
from tests.helpers.tolerance import FLOAT32_ROUNDING, assert_no_worse_than_eager, gradient_eps


def fused(batch, backend, **options):
    """logits -> ListwiseLossOutput of this batch."""

    def call(logits):
        options.setdefault("ref_logps", batch.ref_logps)
        return lk.fused_listwise_loss(logits, batch.labels, batch.relevance, **batch.layout, backend=backend, **options)

    return call


def loss_of(batch, backend, **options):
    return lambda logits: fused(batch, backend, **options)(logits).loss


def slow(batch, compute=torch.float64, **options):
    """logits -> (loss [lists], logps, scores) from slow_loop."""

    def call(logits):
        options.setdefault("ref_logps", batch.ref_logps)
        given = logits, batch.labels, batch.relevance
        return slow_loop.fused_listwise_loss(*given, **batch.layout, compute=compute, **options)

    return call


def upstream_of(batch):
    """A different number, of either sign, for every list."""
    return torch.linspace(-1, 2, len(batch.list_sizes), dtype=torch.float64, device=batch.logits.device)


def assert_matches_float64(batch, backend, objective="contrastive", **options):
    options = {**options, "objective": objective}
    x, upstream = leaf(batch.logits), upstream_of(batch)
    out = fused(batch, backend, reduction="none", **options)(x)
    (grad,) = torch.autograd.grad(out.loss, x, upstream.float())
    truth = slow(batch, **options)(batch.logits)
    eager = slow(batch, compute=torch.float32, **options)(batch.logits)
    eps = 64 * FLOAT32_ROUNDING  # a score is a difference of two larger log-likelihoods
    for name, part, expected, eager_part in zip(("loss", "logps", "scores"), out[:3], truth, eager, strict=True):
        assert part.dtype == torch.float32, name
        assert_no_worse_than_eager(part, eager_part, expected, eps)
    assert_no_worse_than_eager(
        grad,
        gradient(lambda x: slow(batch, compute=torch.float32, **options)(x)[0], batch.logits, upstream),
        gradient(lambda x: slow(batch, **options)(x)[0], batch.logits.double(), upstream),
        max(eps, gradient_eps(out.logps)),
    )


@pytest.fixture(params=["padded", "packed"])
def batch(request, device):
    """Three lists of 2, 1 and 2 candidates; nothing but its prompt is left of the second."""
    batch = make_batch(list_sizes=(2, 1, 2), lengths=(2, 1, 3, 2, 3), vocabulary=31, device=device)
    return batch if request.param == "padded" else batch.packed()


CASES = [  # every regime, packed; every dtype, padded. The grid of both is of the rows: test_token_logps.py
    *((torch.float32, regime, True) for regime in REGIMES),
    *((dtype, "initialisation", False) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
]


@pytest.mark.parametrize(("dtype", "regime", "packed"), CASES)
def test_loss_and_gradients_are_as_exact_as_eager(backend, device, dtype, regime, packed):
    batch = make_batch((2, 1), vocabulary=67, dtype=dtype, device=device, regime=regime)
    assert_matches_float64(batch.packed() if packed else batch, backend)


@pytest.mark.parametrize("objective", VARIED, ids=str)
def test_every_objective_reaches_the_logits(backend, batch, objective):
    graded = replace(batch, relevance=torch.tensor([0.0, 2, 1, 1, 3], device=batch.logits.device))
    assert_matches_float64(graded, backend, objective, beta=0.5)


@pytest.mark.parametrize("vocabulary", [1, 1000])
def test_vocabularies_of_any_size(backend, device, vocabulary):
    batch = make_batch((2,), (3, 2), vocabulary=vocabulary, device=device)
    assert_matches_float64(batch, backend, "listmle")


def test_a_real_vocabulary(fast_backend, device, dtype):
    batch = make_batch((2, 1), (3, 2, 3), vocabulary=50257, dtype=dtype, device=device)
    assert_matches_float64(batch, fast_backend, "listmle")


@pytest.mark.parametrize("m", [2, 17])
def test_lists_of_any_size(backend, device, m):
    batch = make_batch((m,), (1,) * m, vocabulary=7, device=device, prompt=0, padding=0)
    assert_matches_float64(batch, backend, "lambdarank")


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 2.0},
        {"ref_logps": None},
        {"length_normalized": True, "ref_logps": None},
        {"logit_scale": 0.5},
        {"softcap": 2.0},
        {"logit_scale": 3.0, "softcap": 4.0, "length_normalized": True},
    ],
    ids=str,
)
def test_options_reach_loss_and_gradients(backend, batch, options):
    assert_matches_float64(batch, backend, "listmle", **options)


# ---- what comes out


def test_loss_of_uniform_logits_by_hand(backend, device):
    """Every token costs log 10; candidates of 1 and 2 tokens; beta 1."""
    logits = torch.zeros(2, 2, 10, device=device)
    labels = torch.tensor([[3, IGNORE], [4, 5]], device=device)
    out = lk.fused_listwise_loss(
        logits, labels, torch.tensor([0.0, 1.0], device=device), list_sizes=2, beta=1.0, backend=backend
    )
    assert out.logps.tolist() == pytest.approx([-log(10), -2 * log(10)])
    assert out.scores.tolist() == pytest.approx([-log(10), -2 * log(10)])
    assert out.loss.item() == pytest.approx(-log((1 / 100) / (1 / 10 + 1 / 100)))
    assert out.entropy is None and out.top1 is None


def test_only_the_loss_carries_gradient(backend, batch):
    logits = leaf(batch.logits)
    out = fused(batch, backend, return_stats=True)(logits)
    assert out.loss.requires_grad
    assert not any(part.requires_grad for part in (out.logps, out.scores, out.entropy, out.top1))
    assert out.logps.shape == out.scores.shape == (5,)


def test_fused_is_sequence_logps_then_listwise_loss(backend, batch):
    sequence = lk.sequence_logps(batch.logits, batch.labels, cu_seqlens=batch.cu_seqlens, backend=backend)
    scores = 0.1 * (sequence - batch.ref_logps)
    loss = lk.listwise_loss(scores, batch.relevance, list_sizes=list(batch.list_sizes), objective="listmle", backend=backend)
    out = fused(batch, backend, objective="listmle")(batch.logits)
    torch.testing.assert_close(out.logps, sequence, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.scores, scores, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.loss, loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16], ids=str)
def test_reference_in_another_float_dtype(backend, batch, kind):
    reference = batch.ref_logps.to(kind)
    out = fused(batch, backend, ref_logps=reference)(batch.logits)
    expected = fused(batch, backend, ref_logps=reference.float())(batch.logits)
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-6, atol=0)


def test_nothing_flows_into_reference_or_relevance(backend, batch):
    tracked = replace(batch, relevance=leaf(batch.relevance), ref_logps=leaf(batch.ref_logps))
    fused(tracked, backend)(leaf(batch.logits)).loss.backward()
    assert tracked.relevance.grad is None and tracked.ref_logps.grad is None


def test_defaults_are_contrastive_mean_and_beta_a_tenth(backend, batch):
    out = lk.fused_listwise_loss(batch.logits, batch.labels, batch.relevance, **batch.layout, backend=backend)
    spelled = fused(batch, backend, ref_logps=None, objective="contrastive", reduction="mean", beta=0.1)(batch.logits)
    assert torch.equal(out.loss, spelled.loss)


def test_statistics_are_those_of_token_logps(backend, batch):
    out = fused(batch, backend, return_stats=True, logit_scale=2.0)(batch.logits)
    stats = lk.token_logps(batch.logits, batch.labels, logit_scale=2.0, return_stats=True, backend=backend)
    assert torch.equal(out.entropy, stats.entropy) and torch.equal(out.top1, stats.top1)
    assert torch.equal(out.loss, fused(batch, backend, logit_scale=2.0)(batch.logits).loss)


# ---- upstream gradients and reductions


def test_reductions_are_over_lists(backend, batch):
    none, mean, total = (fused(batch, backend, reduction=r)(batch.logits).loss for r in ("none", "mean", "sum"))
    assert none.shape == (3,) and mean.shape == total.shape == ()
    torch.testing.assert_close(total, none.sum())
    torch.testing.assert_close(mean, none.sum() / 3)


def test_shifted_model_logits_need_no_copy(backend, device):
    batch = make_batch((2, 2), padding=2, device=device)
    labels = batch.labels[:, 1:]

    def loss(model_logits):
        return lk.fused_listwise_loss(
            model_logits[:, :-1], labels, batch.relevance, list_sizes=2, reduction="sum", backend=backend
        ).loss

    grad = gradient(loss, batch.logits)
    truth = gradient(
        lambda x: slow_loop.fused_listwise_loss(x[:, :-1], labels, batch.relevance, list_sizes=(2, 2))[0].sum(),
        batch.logits.double(),
    )
    assert (grad[:, -1] == 0).all()
    torch.testing.assert_close(grad.double(), truth, rtol=1e-5, atol=1e-8)


def test_forward_and_backward_allocate_one_gradient_and_no_float32_copy():
    logits = torch.randn(4, 65, 32000).bfloat16()
    labels = torch.randint(0, 32000, (4, 64))
    view = logits[:, :-1].requires_grad_()

    def step():
        lk.fused_listwise_loss(view, labels, torch.arange(4.0), list_sizes=4, backend="torch").loss.backward()

    large = [size for size in costs(step).allocated if size > logits.nbytes / 2]
    assert large == [view.nbytes]


# ---- nothing to learn from


@pytest.mark.parametrize("objective", NAMES)
def test_an_empty_candidate_competes_with_its_reference_alone(backend, device, objective):
    batch = make_batch((3,), (3, 0, 2), device=device).packed()
    assert_matches_float64(batch, backend, objective)
    assert fused(batch, backend, objective=objective)(batch.logits).logps[1] == 0


@pytest.mark.parametrize("objective", ["pairwise", "contrastive", "listmle", "lambdarank"])
def test_an_impossible_worst_candidate_is_beaten_for_good(backend, device, objective):
    batch = make_batch((2,), (3, 3), device=device)
    worst = int(batch.relevance.argmin())
    batch.logits[worst, 1, batch.labels[worst, 1]] = -math.inf
    out = fused(batch, backend, objective=objective)(batch.logits)
    assert out.logps[worst] == -math.inf
    assert out.loss == 0
    assert (gradient(loss_of(batch, backend, objective=objective), batch.logits) == 0).all()


def test_gradients_are_exactly_zero_where_nothing_is_left_to_learn(backend, device):
    """A spread of 1e4 the right way: no half-rounded leftovers."""
    batch = make_batch((3,), device=device)
    order = batch.relevance.argsort()
    reference = torch.empty_like(batch.ref_logps)
    reference[order] = torch.tensor([2e5, 1e5, 0.0], device=device)  # the worse, the likelier under the reference
    out = fused(batch, backend, objective="listmle", ref_logps=reference)(batch.logits)
    assert out.loss == 0
    assert (gradient(loss_of(batch, backend, objective="listmle", ref_logps=reference), batch.logits) == 0).all()


# ---- same bits, same numbers


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("objective", ["listmle", "lambdarank"])
def test_a_list_gives_the_same_bits_in_any_company_and_order(backend, device, packed, objective):
    """Shorter company also means less padding; that may change nothing either."""
    sizes = (2, 2, 1)
    whole = make_batch(sizes, (3, 11, 4, 2, 5), vocabulary=7, device=device)

    def results(order):
        part = whole.lists(order)
        width = max(part.lengths)
        part = replace(part, logits=part.logits[:, :width], labels=part.labels[:, :width])
        part = part.packed() if packed else part
        x = leaf(part.logits)
        out = fused(part, backend, objective=objective, reduction="none")(x)
        (grad,) = torch.autograd.grad(out.loss.sum(), x)
        candidates = grad.split(list(part.lengths)) if packed else grad
        candidates = [g[:n] for g, n in zip(candidates, part.lengths, strict=True)]
        found, start = {}, 0
        for place, i in enumerate(order):
            span = slice(start, start + sizes[i])
            found[i] = (out.loss[place], out.logps[span], out.scores[span], torch.cat(candidates[span]))
            start += sizes[i]
        return found

    together = results([0, 1, 2])
    for order in ([1], [2], [2, 1, 0]):
        for i, parts in results(order).items():
            for part, expected in zip(parts, together[i], strict=True):
                assert torch.equal(part, expected)


def strided(x):
    """The same values, two apart in memory."""
    return torch.stack([x, torch.full_like(x, 9)], 1)[:, 0]


@pytest.mark.parametrize("name", ["ref_logps", "relevance", "cu_seqlens", "list_sizes"])
def test_columns_of_a_matrix_are_read_by_their_stride(backend, device, name):
    batch = make_batch(device=device).packed()
    options = {**batch.layout, "ref_logps": batch.ref_logps, "relevance": batch.relevance, "beta": 1.0, "objective": "listmle"}
    options["list_sizes"] = torch.tensor(batch.list_sizes, device=device)
    expected = lk.fused_listwise_loss(batch.logits, batch.labels, **options, backend=backend).loss
    options[name] = strided(options[name])
    assert torch.equal(lk.fused_listwise_loss(batch.logits, batch.labels, **options, backend=backend).loss, expected)


def test_scores_that_are_a_column_of_a_matrix_or_one_number(backend, device):
    relevance = torch.tensor([3.0, 1.0, 2.0, 0.0], device=device)
    options = dict(list_sizes=4, objective="listmle", backend=backend)
    scores = torch.randn(4, device=device)
    x = leaf(strided(scores))
    loss = lk.listwise_loss(x.as_strided((4,), (1,)), relevance, **options)
    assert torch.equal(lk.listwise_loss(strided(scores), relevance, **options), loss)
    equal = lk.listwise_loss(torch.ones((), device=device).expand(4), relevance, **options)
    torch.testing.assert_close(equal, lk.listwise_loss(torch.ones(4, device=device), relevance, **options))


@given(
    lists=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), min_size=1, max_size=4),
    prompt=st.integers(0, 1),
    padding=st.integers(0, 2),
    objective=st.sampled_from(NAMES),
    length_normalized=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_packed_padded_and_a_slow_loop_agree(lists, prompt, padding, objective, length_normalized, seed):
    padded = make_batch(
        [len(lengths) for lengths in lists],
        [length for lengths in lists for length in lengths],
        vocabulary=7,
        dtype=torch.float64,
        prompt=prompt,
        padding=padding,
        seed=seed,
    )
    packed = padded.packed()
    options = {"objective": objective, "length_normalized": length_normalized}
    truth = slow(padded, **options)
    expected = truth(padded.logits)
    true_grad = gradient(lambda x: truth(x)[0], padded.logits, upstream_of(padded))
    for batch, grad in ((padded, true_grad), (packed, padded.with_logits(true_grad).packed().logits)):
        out = fused(batch, "torch", reduction="none", **options)(batch.logits)
        for part, expected_part in zip(out[:3], expected, strict=True):
            torch.testing.assert_close(part, expected_part, rtol=1e-11, atol=1e-12)
        loss = loss_of(batch, "torch", reduction="none", **options)
        torch.testing.assert_close(gradient(loss, batch.logits, upstream_of(batch)), grad, rtol=1e-10, atol=1e-12)

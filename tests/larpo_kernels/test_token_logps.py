"""token_logps: the one read of the logits that everything else rests on."""

import math

import pytest
import torch

import larpo_kernels as lk
from tests.helpers import slow_loop
from tests.helpers.batches import IGNORE, gradient, leaf
from tests.helpers.costs import costs
from tests.helpers.regimes import REGIMES
from tests.helpers.tolerance import FLOAT32_ROUNDING, assert_no_worse_than_eager, gradient_eps

HALF = (torch.bfloat16, torch.float16)
# Every regime in every dtype, and in rows that programs share (300 columns in the interpreter); every size in every dtype.
SMALL = [
    *((dtype, regime, 127) for dtype in (torch.float32, *HALF) for regime in REGIMES),
    *((torch.float32, regime, 300) for regime in REGIMES),
    *((dtype, "initialisation", size) for dtype in (torch.float32, *HALF) for size in (1, 31)),
    *((dtype, "initialisation", 1000) for dtype in HALF),
]
BIG = [
    *((torch.float32, regime, 129920) for regime in REGIMES),
    *((dtype, "initialisation", 50257) for dtype in HALF),
    (torch.bfloat16, "unlikely", 32000),
]


def some_tokens(vocabulary, dtype, device, regime="initialisation", shape=(2, 3), seed=0):
    """logits [*shape, V], labels [*shape] of which about a quarter is ignored, upstream gradient [*shape]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, vocabulary, shape, generator=generator)
    ignored = torch.rand(shape, generator=generator) < 0.25
    ignored.view(-1)[:2] = torch.tensor([False, True])
    labels[ignored] = IGNORE
    logits = REGIMES[regime](labels, vocabulary, generator)
    upstream = torch.randn(shape, generator=generator, dtype=torch.float64)
    return logits.to(device, dtype), labels.to(device), upstream.to(device)


def assert_matches_float64(logits, labels, upstream, backend, **options):
    """Logps and gradient of token_logps under the tolerance rule; what is ignored is exactly 0."""
    x = leaf(logits)
    logps = lk.token_logps(x, labels, backend=backend, **options)
    (grad,) = torch.autograd.grad(logps, x, upstream.float())

    def eager(x):
        return slow_loop.token_logps(x, labels, compute=torch.float32, **options)

    def truth(x):
        return slow_loop.token_logps(x, labels, **options)

    assert logps.shape == labels.shape and logps.dtype == torch.float32
    assert (logps <= 0).all(), f"a log-probability above 0: {logps.max()}"
    assert_no_worse_than_eager(logps, eager(logits), truth(logits))

    assert grad.dtype == logits.dtype and grad.shape == logits.shape
    assert_no_worse_than_eager(
        grad, gradient(eager, logits, upstream), gradient(truth, logits.double(), upstream), gradient_eps(logps)
    )
    ignored = labels == options.get("ignore_index", IGNORE)
    assert (logps[ignored] == 0).all() and (grad[ignored] == 0).all()


@pytest.mark.parametrize(("dtype", "regime", "vocabulary"), SMALL)
def test_logps_and_gradients_are_as_exact_as_eager(backend, device, dtype, regime, vocabulary):
    shape = (2, 3) if vocabulary < 1000 else (3,)
    assert_matches_float64(*some_tokens(vocabulary, dtype, device, regime, shape), backend)


@pytest.mark.parametrize(("dtype", "regime", "vocabulary"), BIG)
def test_logps_and_gradients_of_real_vocabularies(fast_backend, device, dtype, regime, vocabulary):
    assert_matches_float64(*some_tokens(vocabulary, dtype, device, regime, shape=(3,)), fast_backend)


def test_a_nearly_certain_token_keeps_its_relative_precision(backend, device):
    """-log p is about 1e-6: computed as logsumexp - target it would be a multiple of 2e-6 or so."""
    logits, labels, _ = some_tokens(127, torch.float32, device, "peaked")
    truth = slow_loop.token_logps(logits, labels)
    logps = lk.token_logps(logits, labels, backend=backend)
    torch.testing.assert_close(logps.double(), truth, rtol=1e-5, atol=0)


def test_gradient_at_a_nearly_certain_token_keeps_its_relative_precision(backend, device, dtype):
    """The gradient at the target, 1 - p, is about 1e-6: 1 minus a float32 p would be off by some per cent."""
    logits, labels, _ = some_tokens(127, dtype, device, "peaked")
    kept = labels != IGNORE

    def at_targets(grad):
        return grad[kept].gather(-1, labels[kept, None]).double()

    ours = at_targets(gradient(lambda x: lk.token_logps(x, labels, backend=backend), logits))
    truth = at_targets(gradient(lambda x: slow_loop.token_logps(x, labels), logits.double()))
    storage_rounding = torch.finfo(dtype).eps / 2
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # float16 rounds 1e-6 in steps of 6e-8
    torch.testing.assert_close(ours, truth, rtol=storage_rounding + 1e-5, atol=smallest / 2 if dtype == torch.float16 else 0)


def test_float64_logits_compute_in_float64(device, regime):
    logits, labels, upstream = some_tokens(127, torch.float64, device, regime)
    logps = lk.token_logps(logits, labels, backend="torch")
    assert logps.dtype == torch.float64
    torch.testing.assert_close(logps, slow_loop.token_logps(logits, labels), rtol=1e-11, atol=1e-13)
    grad = gradient(lambda x: lk.token_logps(x, labels, backend="torch"), logits, upstream)
    truth = gradient(lambda x: slow_loop.token_logps(x, labels), logits, upstream)
    torch.testing.assert_close(grad, truth, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"logit_scale": 0.0625}),
        (torch.float32, {"logit_scale": -2.5}),
        (torch.float32, {"softcap": 30.0}),
        (torch.float32, {"softcap": 1.5}),
        *((dtype, {"logit_scale": 4.0, "softcap": 5.0}) for dtype in (torch.float32, *HALF)),
    ],
    ids=str,
)
def test_scale_and_softcap_reach_logps_and_gradients(backend, device, dtype, options):
    logits, labels, upstream = some_tokens(127, dtype, device)
    assert_matches_float64(3 * logits, labels, upstream, backend, **options)


def test_softcap_of_minus_infinity_is_minus_the_cap(backend, device):
    logits, labels, upstream = some_tokens(31, torch.float32, device, "minus_infinity_columns")
    assert_matches_float64(logits, labels, upstream, backend, softcap=5.0)


# ---- what is ignored


@pytest.mark.parametrize("ignore_index", [-100, -1, 5, 31, 40, 2**40])
def test_any_ignore_index_ignores_and_none_matches_a_padding_column(backend, device, ignore_index):
    logits, labels, upstream = some_tokens(31, torch.float32, device)
    labels = labels.masked_fill(labels == IGNORE, ignore_index)
    assert_matches_float64(logits, labels, upstream, backend, ignore_index=ignore_index)


@pytest.mark.parametrize(
    ("dtype", "junk"),
    [*((dtype, math.nan) for dtype in (torch.float32, *HALF)), *((torch.float32, x) for x in (math.inf, -math.inf))],
)
def test_junk_in_ignored_rows_stays_there(backend, device, dtype, junk):
    logits, labels, upstream = some_tokens(127, dtype, device)
    spoilt = logits.clone()
    spoilt[labels == IGNORE] = junk
    assert torch.equal(lk.token_logps(spoilt, labels, backend=backend), lk.token_logps(logits, labels, backend=backend))
    clean, grad = (gradient(lambda x: lk.token_logps(x, labels, backend=backend), x, upstream) for x in (logits, spoilt))
    assert torch.equal(grad, clean)
    assert (grad[labels == IGNORE] == 0).all()


# ---- minus infinity


def test_a_target_of_minus_infinity_is_impossible_and_pushes_nothing(backend, device, dtype):
    logits, labels, upstream = some_tokens(31, dtype, device)
    labels[0, 0] = 7
    assert (labels != IGNORE).sum() > 1
    clean_labels = labels.clone()
    clean_labels[0, 0] = IGNORE
    clean = gradient(lambda x: lk.token_logps(x, clean_labels, backend=backend), logits, upstream)
    logits[0, 0, 7] = -math.inf
    assert lk.token_logps(logits, labels, backend=backend)[0, 0] == -math.inf
    grad = gradient(lambda x: lk.token_logps(x, labels, backend=backend), logits, upstream)
    assert (grad[0, 0] == 0).all()
    assert torch.equal(grad, clean)


def test_a_token_that_is_all_that_is_left_is_certain(backend, device):
    logits = torch.full((1, 31), -math.inf, device=device)
    logits[0, 4] = -3.0
    labels = torch.tensor([4], device=device)
    assert lk.token_logps(logits, labels, backend=backend).item() == 0
    assert (gradient(lambda x: lk.token_logps(x, labels, backend=backend), logits) == 0).all()


def test_columns_of_minus_infinity_get_exactly_no_gradient(backend, device, dtype):
    logits, labels, upstream = some_tokens(127, dtype, device, "minus_infinity_columns")
    grad = gradient(lambda x: lk.token_logps(x, labels, backend=backend), logits, upstream)
    assert (grad[logits == -math.inf] == 0).all()
    assert (grad != 0).any()


# ---- statistics


@pytest.mark.parametrize(
    ("dtype", "regime"), [*((torch.float32, regime) for regime in REGIMES), *((dtype, "initialisation") for dtype in HALF)]
)
def test_entropy_and_top1_come_with_the_same_logps(backend, device, dtype, regime):
    logits, labels, _ = some_tokens(67, dtype, device, regime, shape=(2, 2))
    labels[1] = logits.argmax(-1)[1]  # some hits for certain
    out = lk.token_logps(logits, labels, return_stats=True, backend=backend)
    logps, entropy, top1 = out
    assert out.logps is logps and out.entropy is entropy and out.top1 is top1
    assert torch.equal(logps, lk.token_logps(logits, labels, backend=backend))
    assert entropy.shape == top1.shape == labels.shape
    assert entropy.dtype == torch.float32
    untied = (logits == logits.amax(-1, keepdim=True)).sum(-1) == 1
    expected_hits = slow_loop.top1_hits(logits, labels).to(device)
    assert torch.equal(top1.bool()[untied], expected_hits[untied])
    truth = slow_loop.entropies(logits, labels)
    torch.testing.assert_close(entropy.double().cpu(), truth, rtol=1e-5, atol=1e-6)
    assert (entropy[labels == IGNORE] == 0).all() and not top1[labels == IGNORE].any()


def test_statistics_see_the_scaled_and_capped_logits(backend, device):
    logits, labels, _ = some_tokens(127, torch.float32, device)
    options = {"logit_scale": 3.0, "softcap": 4.0}
    stats = lk.token_logps(logits, labels, return_stats=True, backend=backend, **options)
    truth = slow_loop.entropies(logits, labels, **options)
    torch.testing.assert_close(stats.entropy.double().cpu(), truth, rtol=1e-5, atol=1e-6)
    negated = lk.token_logps(-logits, labels, logit_scale=-1.0, return_stats=True, backend=backend)
    assert torch.equal(negated.top1.bool().cpu(), slow_loop.top1_hits(logits, labels))


def test_statistics_carry_no_gradient_and_leave_that_of_the_logps_alone(backend, device):
    logits, labels, upstream = some_tokens(31, torch.float32, device)
    stats = lk.token_logps(logits.requires_grad_(), labels, return_stats=True, backend=backend)
    assert stats.logps.requires_grad
    assert not stats.entropy.requires_grad and not stats.top1.requires_grad
    (grad,) = torch.autograd.grad(stats.logps, logits, upstream.float())
    assert torch.equal(grad, gradient(lambda x: lk.token_logps(x, labels, backend=backend), logits, upstream))


# ---- views, labels and upstream gradients as they come


def shifted(x):
    return x[:, :-1]


def every_other_position(x):
    return x[:, ::2]


def part_of_the_columns(x):
    """Rows that start at an odd address."""
    return x[..., 3:-2]


def packed_every_third(x):
    return x.flatten(0, 1)[::3]


def batch_and_time_exchanged(x):
    return x.transpose(0, 1)


@pytest.mark.parametrize(
    "view", [shifted, every_other_position, part_of_the_columns, packed_every_third, batch_and_time_exchanged]
)
def test_gradients_of_a_view_land_where_the_view_looks(backend, device, view):
    generator = torch.Generator().manual_seed(0)
    model_logits = torch.randn(2, 4, 36, generator=generator).to(device, torch.bfloat16)
    labels = torch.randint(0, view(model_logits).shape[-1], view(model_logits).shape[:-1], generator=generator)
    labels = labels.to(device)
    upstream = torch.randn(labels.shape, generator=generator).to(device)

    of_view = lk.token_logps(view(model_logits), labels, backend=backend)
    copied = view(model_logits).contiguous()
    assert torch.equal(of_view, lk.token_logps(copied, labels, backend=backend))

    grad = gradient(lambda x: lk.token_logps(view(x), labels, backend=backend), model_logits, upstream)
    expected = torch.zeros_like(model_logits)
    view(expected).copy_(gradient(lambda x: lk.token_logps(x, labels, backend=backend), copied, upstream))
    assert torch.equal(grad, expected)


def test_logits_whose_columns_are_not_adjacent_are_right_or_refused(backend, device):
    logits, labels, _ = some_tokens(31, torch.float32, device)
    transposed = logits.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert transposed.stride(-1) != 1
    try:
        logps = lk.token_logps(transposed, labels, backend=backend)
    except ValueError as error:
        assert "logits" in str(error) and "stride" in str(error)
    else:
        assert torch.equal(logps, lk.token_logps(logits, labels, backend=backend))


def test_a_view_of_the_logits_is_read_in_place():
    model_logits = torch.randn(4, 65, 32000).bfloat16()
    labels = torch.randint(0, 32000, (4, 64))
    largest = costs(lambda: lk.token_logps(model_logits[:, :-1], labels, backend="torch")).largest
    assert largest < model_logits.nbytes / 2, "the forward copies the logits"


def test_backward_allocates_one_gradient_and_no_float32_copy():
    logits = torch.randn(4, 64, 32000).bfloat16().requires_grad_()
    labels = torch.randint(0, 32000, (4, 64))
    logps = lk.token_logps(logits, labels, backend="torch")
    large = [n for n in costs(lambda: logps.sum().backward()).allocated if n > logits.nbytes / 2]
    assert large == [logits.nbytes]


@pytest.mark.parametrize(
    ("dtype", "mask", "options"),
    [
        *((torch.float32, mask, {}) for mask in (-70.0, -1e4, -1e9, "lowest")),
        *((dtype, mask, {}) for dtype in HALF for mask in (-70.0, "lowest")),
        (torch.float32, -1e4, {"logit_scale": 0.5}),
        (torch.float32, -1e4, {"logit_scale": 20.0, "softcap": 80.0}),
    ],
    ids=str,
)
def test_gradient_at_a_target_that_a_mask_has_pushed_down(backend, device, dtype, mask, options):
    """Others' gradients are their probabilities, however far below them the target lies."""
    logits, labels, upstream = some_tokens(300, dtype, device)
    lowest = torch.finfo(dtype).min
    logits = logits.scatter(-1, labels.clamp(min=0)[..., None], lowest if mask == "lowest" else max(mask, lowest))

    def eager(x):
        return slow_loop.token_logps(x, labels, compute=torch.float32, **options)

    def truth(x):
        return slow_loop.token_logps(x, labels, **options)

    grad = gradient(lambda x: lk.token_logps(x, labels, backend=backend, **options), logits, upstream)
    expected = gradient(truth, logits.double(), upstream)
    # z - k + l still serves a target 64 nats down: that rounds as 64 does
    assert_no_worse_than_eager(grad, gradient(eager, logits, upstream), expected, 64 * FLOAT32_ROUNDING)


@pytest.mark.parametrize("above", [80.0, 85.0, 88.0, 95.0])
def test_entropy_where_the_sum_is_finite_and_its_product_is_not(backend, device, above):
    logits = torch.zeros(1, 300, device=device)
    logits[0, 5] = above
    out = lk.token_logps(logits, torch.tensor([0], device=device), return_stats=True, backend=backend)
    assert 0 <= out.entropy.item() < 1e-4 and out.top1.item() == 0
    assert out.logps.item() == pytest.approx(-above)


@pytest.mark.parametrize("mask", [-1e4, -1e9])
def test_entropy_of_a_row_whose_target_a_mask_has_pushed_down(backend, device, mask):
    """Kernels that share a row must not measure their parts from a target so far away: float32 has no digits left there."""
    logits, labels, _ = some_tokens(300, torch.float32, device)
    logits = logits.scatter(-1, labels.clamp(min=0)[..., None], mask)
    out = lk.token_logps(logits, labels, return_stats=True, backend=backend)
    truth = slow_loop.entropies(logits, labels)
    torch.testing.assert_close(out.entropy.double().cpu(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("integer", "vocabulary"),
    [
        (torch.uint8, 256),
        (torch.uint8, 1000),
        (torch.int8, 256),
        (torch.int16, 40000),
        (torch.uint16, 1000),
        (torch.uint32, 1000),
    ],
    ids=str,
)
def test_labels_narrower_than_the_vocabulary_and_than_ignore_index(fast_backend, device, integer, vocabulary):
    labels = torch.tensor([3, 100, 127 if integer == torch.int8 else 156], device=device)
    narrow = labels.to(integer)
    logits = torch.randn(3, vocabulary, device=device)
    expected = lk.token_logps(logits, labels, backend=fast_backend)
    assert (expected < 0).all()
    assert torch.equal(lk.token_logps(logits, narrow, backend=fast_backend), expected)
    hidden, weight = torch.randn(1, 3, 8, device=device), torch.randn(vocabulary, 8, device=device)
    means = [
        lk.linear_sequence_logps(hidden, weight, y[None], length_normalized=True, backend=fast_backend)
        for y in (narrow, labels)
    ]
    assert torch.equal(*means) and means[0] < 0


def test_inplace_backward_of_logits_that_share_memory_is_right_all_the_same(backend, device):
    logits, labels, _ = some_tokens(31, torch.float32, device, shape=(1, 3))
    labels, upstream = labels.expand(4, 3), torch.randn(4, 3, device=device)

    def grad(inplace):
        options = dict(inplace_backward=inplace, backend=backend)
        return gradient(lambda x: lk.token_logps((x * 1).expand(4, 3, 31), labels, **options), logits, upstream)

    torch.testing.assert_close(grad(True), grad(False))


@pytest.mark.parametrize("integer", [torch.int32, torch.int16, torch.int64], ids=str)
def test_labels_of_any_integer_dtype_and_stride(backend, device, integer):
    logits, labels, upstream = some_tokens(31, torch.float32, device)
    shifted_labels = torch.cat([labels[:, :1], labels], 1).to(integer)[:, 1:]  # rows no longer adjacent
    assert not shifted_labels.is_contiguous()
    grad, expected = (
        gradient(lambda x, y=y: lk.token_logps(x, y, backend=backend), logits, upstream) for y in (shifted_labels, labels)
    )
    assert torch.equal(grad, expected)


def test_an_expanded_upstream_gradient_counts_once_per_token(backend, device):
    """sum().backward() hands over one number with stride 0."""
    logits, labels, _ = some_tokens(31, torch.float32, device)
    x = leaf(logits)
    lk.token_logps(x, labels, backend=backend).sum().backward()
    assert torch.equal(x.grad, gradient(lambda x: lk.token_logps(x, labels, backend=backend), logits))
    y = leaf(logits)
    per_candidate = torch.tensor([[1.0], [-2.0]], device=device)
    lk.token_logps(y, labels, backend=backend).backward(per_candidate.expand(2, 3))
    torch.testing.assert_close(y.grad, x.grad * per_candidate[..., None], rtol=1e-6, atol=0)


def test_a_transposed_upstream_gradient_is_read_by_position(backend, device):
    logits, labels, upstream = some_tokens(31, torch.float32, device)
    transposed = upstream.t().contiguous().t()
    assert not transposed.is_contiguous()
    grad, expected = (gradient(lambda x: lk.token_logps(x, labels, backend=backend), logits, u) for u in (transposed, upstream))
    assert torch.equal(grad, expected)


# ---- autograd


def test_inplace_backward_of_rows_that_kernels_share_is_the_same(backend, device):
    """Of targets that a mask has pushed down too: then a whole row is read before any of it is overwritten."""
    logits, labels, upstream = some_tokens(300 if device == "cpu" else 128256, torch.float32, device)
    logits[:, ::2].scatter_(-1, labels[:, ::2].clamp(min=0)[..., None], -1e9)
    expected = gradient(lambda x: lk.token_logps(x, labels, backend=backend), logits, upstream)
    activations = leaf(logits) * 1
    lk.token_logps(activations, labels, inplace_backward=True, backend=backend).backward(upstream.float())
    assert torch.equal(activations.detach(), expected)


def test_inplace_backward_through_a_view_leaves_the_rest_of_the_logits(backend, device):
    generator = torch.Generator().manual_seed(0)
    model_logits = torch.randn(2, 4, 31, generator=generator).to(device).requires_grad_()
    labels = torch.randint(0, 31, (2, 3), generator=generator).to(device)
    expected = gradient(lambda x: lk.token_logps(x[:, :-1], labels, backend=backend), model_logits)
    activations = model_logits * 1
    lk.token_logps(activations[:, :-1], labels, inplace_backward=True, backend=backend).sum().backward()
    assert torch.equal(model_logits.grad, expected)
    assert torch.equal(activations[:, -1], model_logits[:, -1])


def test_inplace_backward_is_caught_when_someone_else_needs_the_logits(backend, device):
    logits, labels, _ = some_tokens(31, torch.float32, device)
    activations = leaf(logits) * 1
    someone_else = (activations**2).sum()
    lk.token_logps(activations, labels, inplace_backward=True, backend=backend).sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        someone_else.backward()


def test_inplace_backward_twice_is_an_error_and_no_wrong_gradient(backend, device):
    logits, labels, _ = some_tokens(31, torch.float32, device)
    activations = leaf(logits) * 1
    logps = lk.token_logps(activations, labels, inplace_backward=True, backend=backend).sum()
    logps.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        logps.backward()


def test_autocast_does_not_lower_the_precision(backend, device):
    logits, labels, upstream = some_tokens(31, torch.float32, device)
    plain = lk.token_logps(logits, labels, backend=backend)
    plain_grad = gradient(lambda x: lk.token_logps(x, labels, backend=backend), logits, upstream)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(lk.token_logps(logits, labels, backend=backend), plain)
        grad = gradient(lambda x: lk.token_logps(x, labels, backend=backend), logits, upstream)
    assert torch.equal(grad, plain_grad)


# ---- same bits


def assert_same_bits_alone_and_in_company(logits, labels, backend):
    """Nearly certain tokens: every bit of the sum over the vocabulary shows in their log-probability."""
    together = lk.token_logps(logits, labels, backend=backend)
    grads = gradient(lambda x: lk.token_logps(x, labels, backend=backend), logits)
    for i in (labels != IGNORE).nonzero()[::5, 0].tolist():
        row = slice(i, i + 1)
        assert torch.equal(lk.token_logps(logits[row], labels[row], backend=backend), together[row])
        alone = gradient(lambda x, row=row: lk.token_logps(x, labels[row], backend=backend), logits[row])
        assert torch.equal(alone, grads[row])


@pytest.mark.parametrize("vocabulary", [1000, 40_000])
def test_a_token_gives_the_same_bits_alone_and_in_company(fast_backend, device, dtype, vocabulary):
    """A lone row must not be summed in another order than one of many, on two threads either."""
    if fast_backend == "torch" and device == "cuda":
        pytest.skip("on a GPU PyTorch's own sums depend on the shape; the kernels there are Triton's")
    logits, labels, _ = some_tokens(vocabulary, dtype, device, "peaked", shape=(60,))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert_same_bits_alone_and_in_company(logits, labels, fast_backend)
    finally:
        torch.set_num_threads(threads)


def test_a_row_that_kernels_may_split_gives_the_same_bits_alone_and_in_company(backend, device):
    logits, labels, _ = some_tokens(500, torch.float32, device, "peaked", shape=(11,))
    assert_same_bits_alone_and_in_company(logits, labels, backend)


# ---- large


def test_more_rows_than_a_launch_grid_axis_has(device):
    rows, vocabulary = 70_001, 3  # 65535 is the limit of the second and third axis
    logits, labels, _ = some_tokens(vocabulary, torch.float32, device, shape=(rows,))
    logps = lk.token_logps(logits, labels, backend="torch" if device == "cpu" else "triton")
    expected = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    torch.testing.assert_close(logps, expected.masked_fill(labels == IGNORE, 0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inplace_backward", [False, True])
def test_rows_further_apart_than_two_to_the_31_elements(backend, device, inplace_backward):
    """Two rows of a buffer of which nothing else is ever touched: 4 GiB of addresses, a few KiB of memory."""
    vocabulary, apart = 100, 2**31 + 8
    buffer = torch.empty(apart + vocabulary, dtype=torch.bfloat16, device=device)
    far = buffer.as_strided((2, vocabulary), (apart, 1))
    near = torch.randn(2, vocabulary, generator=torch.Generator().manual_seed(0)).to(far)
    far.copy_(near)
    labels = torch.tensor([3, 99], device=device)
    expected = gradient(lambda x: lk.token_logps(x, labels, backend=backend), near)
    far.requires_grad_()
    logps = lk.token_logps(far, labels, inplace_backward=inplace_backward, backend=backend)
    assert torch.equal(logps, lk.token_logps(near, labels, backend=backend))
    (grad,) = torch.autograd.grad(logps.sum(), far)
    assert torch.equal(grad, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: on a CPU the labels are checked beforehand")
def test_on_a_gpu_a_label_out_of_range_is_nan_and_never_a_read(backend):
    logits, labels, _ = some_tokens(31, torch.float32, "cuda")
    labels[1, 2] = 31
    logps = lk.token_logps(logits, labels, backend=backend)
    assert logps[1, 2].isnan()
    assert logps.isnan().sum() == 1

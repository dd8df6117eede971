"""linear_token_logps and linear_sequence_logps: log-likelihoods of logits that never exist."""

import math
from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
import torch.nn.functional as F

import larpo_kernels as lk
from larpo_kernels import backends
from larpo_kernels.linear import tile_shapes
from tests.helpers import linear_heads, slow_loop
from tests.helpers.batches import IGNORE, leaf
from tests.helpers.interpreted import few_interpreted
from tests.helpers.linear_heads import (
    ALL,
    SCHEDULES,
    WALKS,
    assert_matches_float64,
    eager,
    make_head,
    ours,
    run,
    scheduled,
    true,
)
from tests.helpers.tolerance import FLOAT32_ROUNDING, assert_no_worse_than_eager, gradient_eps

each_walk = pytest.mark.parametrize("schedule", WALKS)
each_training_walk = pytest.mark.parametrize("schedule", WALKS[1:])


@pytest.fixture
def small_tiles(monkeypatch):
    linear_heads.use_small_tiles(monkeypatch, by_use=True)


def many_tiles(dtype=torch.float32, device="cpu", **options):
    """23 tokens that count, of 30, over 70 vocabulary rows: 2 x 2 tiles under `small_tiles`."""
    return make_head(**{"vocabulary": 70, "hidden_size": 31, "shape": (30,), "dtype": dtype, "device": device, **options})


# ---- every schedule, every boundary


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF = [(torch.bfloat16, "list_hold"), (torch.bfloat16, "frozen_head"), (torch.float16, "recompute")]


@pytest.mark.parametrize(
    ("dtype", "schedule"), few_interpreted(product(DTYPES, WALKS), [*product(DTYPES[:1], WALKS), *HALF]), ids=str
)
def test_every_schedule_is_as_exact_as_eager(backend, device, dtype, schedule, small_tiles):
    head = many_tiles(dtype, device, bias=True)
    wanted, options = scheduled(schedule, head)
    assert_matches_float64(head, backend, wanted, **options)


@pytest.mark.slow_interpreted
def test_every_schedule_gives_the_same_numbers(backend, device, small_tiles):
    """What is kept for the backward changes neither a log-prob nor a gradient."""
    head = many_tiles(torch.float32, device, bias=True)
    logps, grads = {}, {}
    for schedule in SCHEDULES:
        wanted, options = scheduled(schedule, head)
        logps[schedule], grads[schedule] = run(ours(head, backend, **options), head, wanted)
    assert set(grads["frozen_head"]) == {"hidden"}
    for schedule in SCHEDULES:
        torch.testing.assert_close(logps[schedule], logps["recompute"], rtol=1e-6, atol=1e-6)
        for name, grad in grads[schedule].items():
            torch.testing.assert_close(grad, grads["recompute"][name], rtol=1e-4, atol=1e-6)


@each_training_walk
def test_padding_that_brings_the_walked_tokens_to_all_tokens(backend, device, schedule):
    """13 of 16 count. Padded to a multiple of 16 they are as many as all, but not the same."""
    labels = torch.arange(16) % 7
    labels[[1, 5, 6]] = IGNORE
    head = make_head(31, 8, (16,), torch.float32, device, labels=labels)
    wanted, options = scheduled(schedule, head)
    assert_matches_float64(head, backend, wanted, **options)


@pytest.mark.parametrize(("vocabulary", "hidden_size"), [(1, 31), (31, 64), (127, 1000), (1000, 31)])
def test_sizes_that_no_tile_divides(backend, device, dtype, vocabulary, hidden_size):
    head = make_head(vocabulary, hidden_size, (5,), dtype, device)
    assert_matches_float64(head, backend)


@pytest.mark.parametrize("schedule", ["auto_holding_a_part", "frozen_head"])
def test_a_real_vocabulary(fast_backend, device, dtype, schedule, monkeypatch):
    for name in ("CPU_TILE_BYTES", "GPU_TILE_BYTES"):
        monkeypatch.setattr(tile_shapes, name, 1 << 18)
    head = make_head(50257, 64, (40,), dtype, device)
    wanted, options = scheduled(schedule, head)
    if schedule == "auto_holding_a_part":
        assert 0 < linear_heads.plan_of(head, wanted, **options).held_rows < 50257
    assert_matches_float64(head, fast_backend, wanted, **options)


def test_blocks_of_tokens_are_summed_in_float32(device, fast_backend, monkeypatch):
    """512 blocks that each push one weight the same way: a bfloat16 sum would stop growing at 256 of them."""
    linear_heads.use_small_tiles(monkeypatch, tokens=1, rows=2)
    n = 512
    head = replace(
        make_head(4, 2, (n,), torch.bfloat16, device, bias=True),
        hidden=torch.ones(n, 2, dtype=torch.bfloat16, device=device),
        labels=torch.zeros(n, dtype=torch.long, device=device),
        upstream=torch.ones(n, dtype=torch.float64, device=device),
    )
    for schedule in ("recompute", "list_hold"):
        _, grads = run(ours(head, fast_backend, schedule=schedule), head, ("weight", "bias"))
        _, truth = run(true(head), head.double(), ("weight", "bias"))
        torch.testing.assert_close(grads["weight"].double(), truth["weight"].double(), rtol=0.02, atol=0)
        torch.testing.assert_close(grads["bias"].double(), truth["bias"].double(), rtol=0.02, atol=0)


# ---- what a head can be


@each_training_walk
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"softcap": 3.0}, marks=pytest.mark.slow_interpreted),  # the last has both
        pytest.param({"logit_scale": 0.25}, marks=pytest.mark.slow_interpreted),
        {"logit_scale": -2.0, "softcap": 5.0},
    ],
    ids=["softcap", "scale", "negative_scale_and_softcap"],
)
def test_scale_and_softcap_come_after_the_bias(backend, device, schedule, options, small_tiles):
    head = many_tiles(torch.float32, device, bias=True)
    head = replace(head, weight=head.weight * 3, bias=head.bias * 3)  # well into the bend of the soft cap
    wanted, walk = scheduled(schedule, head)
    assert_matches_float64(head, backend, wanted, **walk, **options)


@pytest.mark.parametrize("options", [{"logit_scale": 0.25}, {"logit_scale": -2.0, "softcap": 5.0}], ids=str)
def test_scale_and_softcap_of_logits_that_fit_one_tile(device, options):
    head = many_tiles(torch.float32, device, bias=True)
    assert_matches_float64(head, "torch", **options)
    out = ours(head, "torch", return_stats=True, **options)(head.hidden, head.weight, head.bias)
    logits = F.linear(head.hidden.double(), head.weight.double(), head.bias.double())
    torch.testing.assert_close(out.entropy.double(), slow_loop.entropies(logits, head.labels, **options), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_scale_and_softcap_in_half_precision(backend, device, dtype, small_tiles):
    head = many_tiles(dtype, device, bias=True)
    assert_matches_float64(head, backend, logit_scale=1.5, softcap=4.0)


MIXED = [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(
    ("hidden", "weight", "schedule"),
    few_interpreted(
        [(*dtypes, schedule) for dtypes in MIXED for schedule in ("list_hold", "recompute", "frozen_head")],
        [(*MIXED[0], "list_hold"), (*MIXED[0], "frozen_head"), *((*dtypes, "recompute") for dtypes in MIXED)],
    ),
    ids=str,
)
def test_mixed_dtypes_give_each_its_own_gradient(backend, device, hidden, weight, schedule, small_tiles):
    head = many_tiles(hidden, device, weight_dtype=weight, bias=True)
    wanted, options = scheduled(schedule, head)
    logps, grads = run(ours(head, backend, **options), head, wanted)
    assert logps.dtype == torch.float32
    narrow = replace(head, hidden=head.hidden.to(min(hidden, weight, key=lambda dtype: dtype.itemsize)))
    eager_logps, eager_grads = run(eager(narrow), narrow, wanted)
    true_logps, true_grads = run(true(head), head.double(), wanted)
    assert_no_worse_than_eager(logps, eager_logps, true_logps)
    for name in wanted:
        assert grads[name].dtype == getattr(head, name).dtype
        linear_heads.assert_within(1.5, grads[name], eager_grads[name], true_grads[name], gradient_eps(logps))


def test_backward_within_autocast_is_as_exact_as_without(device, fast_backend):
    """Autocast would run products that are chosen to be in float32 in bfloat16."""
    head = make_head(500, 32, (64,), torch.float32, device, bias=True)

    def gradients(within):
        x = [leaf(getattr(head, name)) for name in ALL]
        with torch.autocast(device, torch.bfloat16):
            out = lk.linear_token_logps(x[0], x[1], head.labels, bias=x[2], backend=fast_backend)
            loss = (out * head.upstream.to(out.dtype)).sum()
            if within:
                loss.backward()
        if not within:
            loss.backward()
        return [y.grad for y in x]

    for a, b in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(a, b)


def test_a_small_head_is_computed_in_float32_within_autocast(device, fast_backend):
    head = many_tiles(torch.float32, device, bias=True)
    logps, grads = run(ours(head, fast_backend), head, ALL)
    with torch.autocast(device, torch.bfloat16):
        within, grads_within = run(ours(head, fast_backend), head, ALL)
    assert torch.equal(within, logps) and all(torch.equal(grads_within[name], grads[name]) for name in ALL)


def test_float64_parameters_of_float32_states_compute_in_float64(device):
    head = make_head(50, 16, (4,), torch.float32, device)
    out = lk.linear_token_logps(head.hidden, head.weight.double(), head.labels)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, lk.linear_token_logps(head.hidden.double(), head.weight.double(), head.labels))
    if backends.has_triton():
        with pytest.raises(TypeError, match="computes in float32, got float64"):
            lk.linear_token_logps(head.hidden, head.weight.double(), head.labels, backend="triton")


@pytest.mark.parametrize("schedule", ["recompute", "frozen_head", "score_only"])
def test_autocast_with_float32_parameters(device, fast_backend, schedule):
    head = many_tiles(torch.float32, device, bias=True)
    wanted, options = scheduled(schedule, head)
    with torch.autocast(device, torch.bfloat16):
        logps, grads = run(ours(head, fast_backend, **options), head, wanted)
        eager_logps, eager_grads = run(eager(head), head, wanted)
    true_logps, true_grads = run(true(head), head.double(), wanted)
    assert logps.dtype == torch.float32
    assert_no_worse_than_eager(logps, eager_logps, true_logps)
    for name in wanted:
        assert grads[name].dtype == torch.float32
        linear_heads.assert_within(1.5, grads[name], eager_grads[name], true_grads[name], gradient_eps(logps))


@pytest.mark.parametrize("schedule", ["list_hold", "recompute"])
def test_tied_embedding_collects_both_gradients(backend, device, schedule, small_tiles):
    """One tensor as embedding and head, in one graph."""
    head = many_tiles(torch.float32, device, shape=(9,))
    inputs = torch.arange(9, device=device) % 70

    def gradient(way, dtype=torch.float32):
        weight = leaf(head.weight.to(dtype))
        logps = way(torch.tanh(F.embedding(inputs, weight)), weight, None)
        return torch.autograd.grad(logps, weight, head.upstream.to(dtype))[0]

    grad = gradient(ours(head, backend, schedule=schedule))
    assert_no_worse_than_eager(grad, gradient(eager(head)), gradient(true(head), torch.float64), 32 * FLOAT32_ROUNDING)


@pytest.mark.parametrize("schedule", ["score_only", "frozen_head", "recompute"])
def test_statistics_come_from_the_same_walk(backend, device, schedule, small_tiles):
    head = many_tiles(torch.float32, device, bias=True)
    logits = F.linear(head.hidden.double(), head.weight.double(), head.bias.double())
    labels = head.labels.clone()
    labels[::4] = logits.argmax(-1)[::4].where(labels[::4] != IGNORE, IGNORE)  # some hits
    head = replace(head, labels=labels)
    wanted, options = scheduled(schedule, head)
    outputs = []

    def logps_with_stats(hidden, weight, bias):
        outputs.append(ours(head, backend, return_stats=True, **options)(hidden, weight, bias))
        return outputs[0].logps

    logps, grads = run(logps_with_stats, head, wanted)
    plain, plain_grads = run(ours(head, backend, **options), head, wanted)
    torch.testing.assert_close(logps, plain, rtol=1e-5, atol=1e-6)
    for name in wanted:
        torch.testing.assert_close(grads[name], plain_grads[name], rtol=1e-4, atol=1e-6)
    _, entropy, top1 = outputs[0]
    assert entropy.shape == top1.shape == labels.shape and not entropy.requires_grad and not top1.requires_grad
    torch.testing.assert_close(entropy.cpu().double(), slow_loop.entropies(logits, labels), rtol=1e-5, atol=1e-6)
    assert torch.equal(top1.cpu().bool(), slow_loop.top1_hits(logits, labels))
    assert 0 < top1.sum() < (labels != IGNORE).sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_statistics_in_half_precision_are_as_exact_as_eager(backend, device, dtype, small_tiles):
    head = many_tiles(dtype, device, bias=True)
    logits = F.linear(head.hidden.double(), head.weight.double(), head.bias.double())
    rounded = F.linear(head.hidden, head.weight, head.bias)
    entropy = ours(head, backend, return_stats=True)(head.hidden, head.weight, head.bias).entropy
    assert_no_worse_than_eager(entropy, *(slow_loop.entropies(x, head.labels) for x in (rounded, logits)))


def test_statistics_with_scale_and_softcap(backend, device, small_tiles):
    head = many_tiles(torch.float32, device, bias=True)
    options = {"logit_scale": 2.0, "softcap": 3.0}
    out = ours(head, backend, return_stats=True, **options)(head.hidden, head.weight, head.bias)
    logits = F.linear(head.hidden.double(), head.weight.double(), head.bias.double())
    truth = slow_loop.entropies(logits, head.labels, **options)
    torch.testing.assert_close(out.entropy.cpu().double(), truth, rtol=1e-5, atol=1e-6)
    assert torch.equal(out.top1.cpu().bool(), slow_loop.top1_hits(logits, head.labels))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_float64_computes_in_float64(device, schedule, small_tiles):
    head = many_tiles(torch.float64, device, bias=True)
    wanted, options = scheduled(schedule, head)
    logps, grads = run(ours(head, "torch", softcap=4.0, **options), head, wanted)
    true_logps, true_grads = run(true(head, softcap=4.0), head, wanted)
    assert logps.dtype == torch.float64
    torch.testing.assert_close(logps, true_logps, rtol=1e-12, atol=1e-12)
    for name in wanted:
        torch.testing.assert_close(grads[name], true_grads[name], rtol=1e-11, atol=1e-12)


# ---- upstream gradients and graphs


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        *(("recompute", c) for n in (1, 2, 3) for c in combinations(ALL, n)),
        *(("list_hold", c) for c in (("weight",), ("bias",), ("hidden", "bias"))),
    ],
    ids=str,
)
def test_every_subset_of_what_requires_grad(backend, device, schedule, wanted, small_tiles):
    head = many_tiles(torch.float32, device, bias=True, shape=(9,))
    logps, grads = run(ours(head, backend, schedule=schedule), head, wanted)
    eager_logps, eager_grads = run(eager(head), head, wanted)
    true_logps, true_grads = run(true(head), head.double(), wanted)
    assert_no_worse_than_eager(logps, eager_logps, true_logps)
    assert set(grads) == set(wanted)
    for name in wanted:
        assert_no_worse_than_eager(grads[name], eager_grads[name], true_grads[name])


def test_what_does_not_require_grad_gets_none(backend, device):
    head = make_head(31, 8, (4,), device=device, bias=True)
    hidden, weight, bias = leaf(head.hidden), head.weight.clone(), leaf(head.bias)
    ours(head, backend)(hidden, weight, bias).sum().backward()
    assert weight.grad is None and hidden.grad is not None and bias.grad is not None


@pytest.mark.parametrize("schedule", ["frozen_head", "list_hold", "recompute"])
def test_hidden_and_weight_are_kept_only_where_the_backward_reads_them(backend, device, schedule, small_tiles):
    head = many_tiles(torch.float32, device, shape=(9,))
    wanted, options = scheduled(schedule, head)
    x = head.leaves(wanted)
    saved = []

    def pack(tensor):
        saved.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logps = lk.linear_token_logps(labels=head.labels, backend=backend, **x, **options)
    kept = {name for name in x if x[name].untyped_storage().data_ptr() in saved}
    assert kept == (set() if schedule == "frozen_head" else set(x))
    if schedule == "frozen_head":  # so the weight may change in between: a gradient is of the forward that was run
        again = torch.autograd.grad(logps, x["hidden"], torch.ones_like(logps), retain_graph=True)[0]
        with torch.no_grad():
            x["weight"].zero_()
        assert torch.equal(torch.autograd.grad(logps, x["hidden"], torch.ones_like(logps))[0], again)


# ---- ignored tokens


# ---- layouts of memory


@pytest.mark.parametrize("schedule", ["list_hold", "recompute", "frozen_head"])
def test_strided_hidden_and_weight_mean_the_same(backend, device, schedule, small_tiles):
    head = many_tiles(torch.float32, device, bias=True, shape=(3, 3))
    wide = torch.full((3, 5, 2, 31), math.nan, device=device)
    wide[:, :3, 0] = head.hidden
    strided = replace(head, hidden=wide[:, :3, 0], weight=head.weight.t().contiguous().t())
    assert not (strided.hidden.is_contiguous() or strided.weight.is_contiguous())
    wanted, options = scheduled(schedule, head)
    expected, expected_grads = run(ours(head, backend, **options), head, wanted)
    x = {name: getattr(strided, name).detach().requires_grad_(name in wanted) for name in ALL}
    logps = ours(head, backend, **options)(**x)
    grads = torch.autograd.grad(logps, [x[name] for name in wanted], head.upstream.float())
    torch.testing.assert_close(logps, expected, rtol=1e-6, atol=1e-6)
    for name, grad in zip(wanted, grads, strict=True):
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-4, atol=1e-6)


def test_int32_and_strided_labels_and_bias(backend, device):
    head = make_head(31, 8, (6,), device=device, bias=True)
    expected, expected_grads = run(ours(head, backend), head, ALL)
    labels = torch.stack([head.labels, head.labels], 1).int()[:, 0]
    odd = replace(head, labels=labels, bias=torch.stack([head.bias, head.bias * 0], 1)[:, 0])
    assert not odd.labels.is_contiguous() and not odd.bias.is_contiguous()
    x = [getattr(odd, name).detach().requires_grad_() for name in ALL]
    logps = ours(odd, backend)(*x)
    grads = torch.autograd.grad(logps, x, head.upstream.float())
    assert torch.equal(logps, expected)
    for name, grad in zip(ALL, grads, strict=True):
        assert torch.equal(grad, expected_grads[name])


def test_strided_labels_all_of_which_count(backend, device):
    """Nothing is gathered, converted or filled up to 16 tokens then: the kernels get them as they are."""
    head = make_head(31, 8, labels=torch.arange(16), device=device)
    odd = replace(head, labels=torch.stack([head.labels, head.labels * 0 - 100], 1)[:, 0])
    assert odd.labels.stride() == (2,)
    logps, grads = run(ours(odd, backend), odd, ("hidden", "weight"))
    expected, expected_grads = run(ours(head, backend), head, ("hidden", "weight"))
    assert torch.equal(logps, expected)
    assert all(torch.equal(grads[name], expected_grads[name]) for name in expected_grads)


def test_a_frozen_expanded_weight_and_one_hidden_state_for_all(backend, device):
    """Stride 0 on an axis of either."""
    head = make_head(31, 8, (6,), device=device)
    narrow = replace(head, hidden=head.hidden[:1].expand(6, 8), weight=head.weight[:1].expand(31, 8))
    dense = replace(narrow, hidden=narrow.hidden.clone(), weight=narrow.weight.clone())
    logps = ours(narrow, backend)(narrow.hidden, narrow.weight, None)
    torch.testing.assert_close(logps, ours(dense, backend)(dense.hidden, dense.weight, None), rtol=1e-6, atol=1e-6)


# ---- candidates


def candidates(head, lengths):
    """The tokens of `head` [N] as candidates, packed."""
    return torch.tensor([0, *lengths], device=head.labels.device).cumsum(0)


@pytest.mark.parametrize("length_normalized", [False, True])
@pytest.mark.parametrize("schedule", ["list_hold", "auto_holding_a_part", "frozen_head"])
def test_packed_candidates_are_as_exact_as_eager(backend, device, schedule, length_normalized, small_tiles):
    head = many_tiles(torch.float32, device)
    borders = candidates(head, (7, 0, 1, 12, 10))  # one of them without tokens
    upstream = torch.linspace(-1, 2, 5, dtype=torch.float64, device=device)
    extra = {"cu_seqlens": borders, "length_normalized": length_normalized}
    check_candidates(head, backend, schedule, upstream, extra)


@pytest.mark.parametrize("length_normalized", [False, True])
def test_padded_candidates_are_as_exact_as_eager(backend, device, dtype, length_normalized, small_tiles):
    head = many_tiles(dtype, device, shape=(5, 6), bias=True)
    head.labels[3] = IGNORE  # one of them without tokens
    upstream = torch.linspace(-1, 2, 5, dtype=torch.float64, device=device)
    check_candidates(head, backend, "recompute", upstream, {"length_normalized": length_normalized})


def check_candidates(head, backend, schedule, upstream, extra):
    wanted, options = scheduled(schedule, head)
    ways = (ours(head, backend, lk.linear_sequence_logps, **options, **extra), eager(head, slow_loop.sequence_logps, **extra))
    (logps, grads), (eager_logps, eager_grads) = (run(way, head, wanted, upstream) for way in ways)
    true_logps, true_grads = run(true(head, slow_loop.sequence_logps, **extra), head.double(), wanted, upstream)
    assert logps.shape == (5,) and logps.dtype == torch.float32 and (logps <= 0).all()
    assert_no_worse_than_eager(logps, eager_logps, true_logps)
    times = linear_heads.rounding_allowance(head.hidden.dtype)
    for name in wanted:
        linear_heads.assert_within(times, grads[name], eager_grads[name], true_grads[name], gradient_eps(logps))


def test_it_is_what_the_logits_ops_give(backend, device):
    """The two doors into the package lead to one room."""
    head = make_head(31, 8, (4, 3), device=device, bias=True)
    options = {"logit_scale": 0.5, "softcap": 6.0, "backend": backend}
    logits = F.linear(head.hidden, head.weight, head.bias)
    linear = lk.linear_token_logps(head.hidden, head.weight, head.labels, bias=head.bias, return_stats=True, **options)
    given = lk.token_logps(logits, head.labels, return_stats=True, **options)
    for x, y in zip(linear, given, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_it_is_what_the_specification_says(backend, device):
    head = make_head(31, 8, (4, 3), device=device, bias=True)
    for name in ("linear_token_logps", "linear_sequence_logps"):
        out = ours(head, backend, getattr(lk, name), softcap=6.0)(head.hidden, head.weight, head.bias)
        spec = getattr(lk.reference, name)(head.hidden, head.weight, head.labels, bias=head.bias, softcap=6.0)
        torch.testing.assert_close(out, spec, rtol=1e-5, atol=1e-5)

"""bfloat16 tiles, centred on the target before they are rounded: what GPUs and CPUs with bfloat16 GEMMs run.

Forced here on any machine, beside what this machine does by default.
"""

import pytest
import torch

import larpo_kernels as lk
from larpo_kernels.linear import dtypes, tile_shapes
from tests.helpers import linear_heads
from tests.helpers.linear_heads import WALKS, eager, make_head, ours, run, scheduled, true
from tests.helpers.tolerance import rms

TRAINING = [name for name in WALKS if name != "score_only"]


@pytest.fixture(params=["default", "bf16_tiles"])
def compute(request, monkeypatch):
    if request.param == "bf16_tiles":
        monkeypatch.setattr(dtypes, "native_bf16", lambda *_: True)
        assert dtypes.compute_dtype(torch.bfloat16, torch.bfloat16, "cpu") == torch.bfloat16
    monkeypatch.setattr(tile_shapes, "CPU_TILE_BYTES", 1 << 18)


@pytest.fixture
def bf16_tiles(monkeypatch):
    monkeypatch.setattr(dtypes, "native_bf16", lambda *_: True)
    linear_heads.use_small_tiles(monkeypatch, by_use=True)


def trained_like(device, std):
    """512 tokens of 8 candidates; logits of this standard deviation, labels drawn from the model itself."""
    head = make_head(2000, 128, (8, 64), torch.bfloat16, device, labels=torch.zeros(8, 64, dtype=torch.long))
    generator = torch.Generator().manual_seed(1)
    weight = (head.weight.double() * std).bfloat16()
    logits = (head.hidden.double() @ weight.double().t()).flatten(0, 1)
    labels = logits.softmax(-1).cpu().multinomial(1, generator=generator).view(8, 64).to(device)
    upstream = torch.randn(8, 1, dtype=torch.float64, generator=generator).expand(8, 64).to(device)
    return linear_heads.Head(head.hidden, weight, None, labels, upstream)


def errors(head, backend, schedule):
    """Of log-probs, of their sums and of gradients against float64: ours / eager's, rms."""
    wanted, options = scheduled(schedule, head)
    x = [run(ours(head, backend, **options), head, wanted), run(eager(head), head, wanted)]
    truth, true_grads = run(true(head), head.double(), wanted)
    ratios = {}

    def compare(name, ours, eager, truth):
        ratios[name] = (rms(ours.double() - truth) / rms(eager.double() - truth)).item()

    compare("token", x[0][0], x[1][0], truth)
    compare("sequence", x[0][0].sum(-1), x[1][0].sum(-1), truth.sum(-1))
    for name in wanted:
        compare(name, x[0][1][name], x[1][1][name], true_grads[name])
    return ratios


@pytest.mark.parametrize(("schedule", "std"), [*((schedule, 8.0) for schedule in TRAINING), ("list_hold", 20.0)])
def test_on_a_trained_models_logits_it_is_several_times_closer_than_eager(device, fast_backend, compute, schedule, std):
    ratios = errors(trained_like(device, std), fast_backend, schedule)
    assert ratios.pop("sequence") <= 1 / 8
    assert ratios.pop("token") <= 1 / 5
    assert ratios and all(ratio <= 1 / 3 for ratio in ratios.values()), ratios


@pytest.mark.parametrize("schedule", TRAINING)
def test_on_initialisation_like_logits_log_probs_are_closer_and_gradients_as_close(device, fast_backend, compute, schedule):
    head = make_head(2000, 128, (8, 64), torch.bfloat16, device)
    ratios = errors(head, fast_backend, schedule)
    ratios.pop("sequence")
    assert ratios.pop("token") <= 1 / 5
    assert ratios and all(ratio <= 1.5 for ratio in ratios.values()), ratios


@pytest.mark.parametrize(
    ("schedule", "bias", "options"),
    [
        *((schedule, False, {}) for schedule in WALKS[:-1]),
        *((schedule, True, {"softcap": 4.0, "logit_scale": 2.0}) for schedule in WALKS[:-1]),
        pytest.param(WALKS[-1], False, {}, marks=pytest.mark.slow_interpreted),  # holds a part and forms a part again
        pytest.param(WALKS[-1], True, {"softcap": 4.0, "logit_scale": 2.0}, marks=pytest.mark.slow_interpreted),
        *(("recompute", bias, {"logit_scale": 0.5}) for bias in (False, True)),
        ("recompute", False, {"softcap": 4.0, "logit_scale": 2.0}),
    ],
    ids=str,
)
def test_every_head_in_bf16_tiles(backend, device, bf16_tiles, schedule, options, bias):
    head = make_head(100, 64, (24,), torch.bfloat16, device, bias=bias)
    wanted, walk = scheduled(schedule, head)
    linear_heads.assert_matches_float64(head, backend, wanted, **walk, **options)


def test_statistics_in_bf16_tiles(backend, device, bf16_tiles):
    head = trained_like(device, 4.0)
    head = linear_heads.replace(head, hidden=head.hidden[0, :24], labels=head.labels[0, :24], weight=head.weight[:100])
    head.labels.remainder_(100)
    out = lk.linear_token_logps(head.hidden, head.weight, head.labels, return_stats=True, backend=backend)
    logits = head.hidden.double() @ head.weight.double().t()
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
    rounded = (head.hidden @ head.weight.t()).double()
    eager_entropy = torch.special.entr(rounded.softmax(-1)).sum(-1)
    assert rms(out.entropy.double() - entropy) <= 1.5 * rms(eager_entropy - entropy)
    clear = (logits.topk(2).values.diff().abs() > 0.1)[:, 0]  # a tie in bfloat16 is anyone's
    assert clear.sum() > 12
    hits = logits.argmax(-1) == head.labels
    assert torch.equal(out.top1.bool()[clear], hits[clear])


def test_float32_weights_are_rounded_a_tile_at_a_time(backend, device, bf16_tiles):
    head = make_head(100, 64, (24,), torch.bfloat16, device, weight_dtype=torch.float32, bias=True)
    logps, grads = run(ours(head, backend, schedule="recompute"), head, linear_heads.ALL)
    plain, plain_grads = run(eager(head), head, linear_heads.ALL)
    truth, true_grads = run(true(head), head.double(), linear_heads.ALL)
    linear_heads.assert_within(1, logps, plain, truth, 1e-6)
    for name in linear_heads.ALL:
        assert grads[name].dtype == getattr(head, name).dtype
        linear_heads.assert_within(1.5, grads[name], plain_grads[name], true_grads[name], 1e-5, name)


def test_autocast_rounds_float32_inputs(device, fast_backend, bf16_tiles):
    head = make_head(100, 64, (24,), torch.float32, device)
    plain = ours(head, fast_backend)(head.hidden, head.weight, None)
    with torch.autocast(device, torch.bfloat16):
        rounded = ours(head, fast_backend)(head.hidden, head.weight, None)
    error = rms(rounded - plain)
    assert 1e-5 < error < 1e-2


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_a_small_head_is_computed_in_float32_where_that_costs_nothing(monkeypatch, device_type):
    monkeypatch.setattr(dtypes, "CPU_HAS_BF16", True)
    most = dtypes.SMALL_HEAD
    answers = [dtypes.compute_dtype(torch.bfloat16, torch.bfloat16, device_type, size) for size in (most - 1, most)]
    assert answers == [torch.float32, torch.bfloat16]
    part = torch.zeros(1, 1, dtype=torch.bfloat16)
    assert dtypes.dtype_of_tiles(part, part, sharded=True) == torch.bfloat16  # whatever part a rank has

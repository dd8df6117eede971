"""Logits that break a softmax: targets far below the largest logit, columns of -inf, certain tokens, huge offsets.

Every token is shifted by its target logit, so a competitor 70 nats above it would overflow: the shift is raised then, in the
middle of a walk that has summed, held or multiplied what came before. Tiles of 40 vocabulary rows make that happen early,
late, several times and within a tile.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import larpo_kernels as lk
from larpo_kernels.linear import dtypes, tile_shapes
from tests.helpers import linear_heads, slow_loop
from tests.helpers.batches import IGNORE
from tests.helpers.interpreted import few_interpreted
from tests.helpers.linear_heads import WALKS, make_head, ours, run, scheduled, true
from tests.helpers.regimes import REGIMES
from tests.helpers.tolerance import assert_no_worse_than_eager

each_walk = pytest.mark.parametrize("schedule", WALKS)
VOCABULARY = 100  # tiles of 40, 40 and 20


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    linear_heads.use_small_tiles(monkeypatch)


def bf16_tiles(monkeypatch):
    """As where bfloat16 GEMMs are native: tiles are rounded to bfloat16 once they are shifted."""
    monkeypatch.setattr(dtypes, "native_bf16", lambda *_: True)


@pytest.fixture(params=["float16", "bfloat16", "bfloat16_tiles"])
def half(request, monkeypatch):
    """A dtype of hidden states and weight; bfloat16 as this machine computes it, and in bfloat16 tiles."""
    if request.param == "bfloat16_tiles":
        bf16_tiles(monkeypatch)
    return torch.float16 if request.param == "float16" else torch.bfloat16


@pytest.mark.parametrize(  # what is kept for the backward changes only where a shift was corrected, or nothing is to be summed
    ("schedule", "regime"),
    [
        *(("recompute", x) for x in REGIMES),
        *((y, x) for y in WALKS if y != "recompute" for x in ("unlikely", "minus_infinity_columns")),
    ],
)
def test_any_logits_in_float32(backend, device, regime, schedule):
    head = make_head(VOCABULARY, 64, (9,), torch.float32, device, regime)
    wanted, options = scheduled(schedule, head)
    linear_heads.assert_matches_float64(head, backend, wanted, **options)


@pytest.mark.parametrize(
    ("schedule", "regime"),
    [
        *(("recompute", x) for x in REGIMES),
        *((y, x) for y in ("list_hold", "frozen_head") for x in ("unlikely", "shifted_down")),
    ],
)
def test_any_logits_in_half_precision(fast_backend, device, regime, schedule, half):
    head = make_head(VOCABULARY, 64, (16,), half, device, regime)
    wanted, options = scheduled(schedule, head)
    in_tiles = dtypes.compute_dtype(half, half, device, head.weight.numel()) == torch.bfloat16
    # logits of -200 make a weight whose rows nearly cancel in d hidden: each tile's product is rounded before they do
    linear_heads.assert_matches_float64(head, fast_backend, wanted, times=2.5 if in_tiles else None, **options)


DOWN = [1.0, 10.0, 30.0, 60.0, 150.0, 400.0, 1e9, 1e4]


@pytest.mark.parametrize(
    ("schedule", "down"),
    [
        *few_interpreted([("recompute", down) for down in DOWN], [("recompute", down) for down in DOWN[::3]]),
        *((schedule, down) for schedule in ("list_hold", "frozen_head") for down in (60.0, 1e9)),
    ],
)
def test_a_target_so_far_below_the_rest_costs_no_precision(backend, device, schedule, down, monkeypatch):
    """By a bias, or a mask. Tiles in bfloat16 are rounded once shifted: a shift far from the rest would cost them all."""
    bf16_tiles(monkeypatch)
    monkeypatch.setattr(tile_shapes, "seen_step", lambda vocab_size: 2)  # every second row is looked at for a shift
    for dtype in (torch.float32, torch.bfloat16):
        head = make_head(VOCABULARY, 64, (16,), dtype, device, bias=True)
        z = F.linear(head.hidden.double(), head.weight.double())
        label = head.labels.clamp(min=0)
        below = z.gather(-1, label[..., None])[..., 0] - z.logsumexp(-1) + down
        bias = torch.zeros(VOCABULARY, dtype=torch.float64, device=device).scatter_(0, label, -below)
        head = replace(head, bias=bias.to(dtype))
        wanted, options = scheduled(schedule, head)
        _, grads = run(ours(head, backend, **options), head, wanted)
        _, eager_grads = run(linear_heads.eager(head), head, wanted)
        _, true_grads = run(true(head), head.double(), wanted)
        for name in set(wanted) & {"hidden", "weight"}:
            linear_heads.assert_within(
                1.5, grads[name], eager_grads[name], true_grads[name], 16 * linear_heads.FLOAT32_ROUNDING, name
            )


# ---- raising the shift


@pytest.fixture
def hidden_competitors(monkeypatch):
    """Of all rows only the first is looked at for a shift, so that competitors come as a surprise."""
    monkeypatch.setattr(tile_shapes, "seen_step", lambda vocab_size: vocab_size)


def climbing(device, dtype=torch.float32):
    """Targets in the middle tile; their competitors by position. Each row is a token of the same walk."""
    early, same, late = 7, 60, 93
    target = 50
    climbs = [
        {},  # nothing to raise
        {early: 100.0},
        {same: 100.0},
        {late: 100.0},
        {41: 90.0, 79: 180.0},  # twice within the target's tile, before and after it
        {early: 100.0, same: 220.0, late: 400.0},  # once a tile
        {early: 400.0, same: 220.0, late: 100.0},  # falling: once
        {early: 65.0, late: 66.0},  # about where raising begins
        {late: 1000.0},
        {early: 50.0, same: 50.0, late: 50.0},
        {0: 100.0, 39: 130.0},  # the last row of the first tile
        {99: 128.0},
        {early: 59.0, early + 1: 61.5},  # one by one on either side of where raising begins
    ]
    if dtype == torch.float32:  # a tile on either side, at which what the first has summed still counts; for each backend
        climbs += [{early: 59.0, late: 61.5}, {early: 68.5, late: 70.0}]
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(len(climbs), VOCABULARY, dtype=torch.float64, generator=generator)
    for row, climb in zip(logits, climbs, strict=True):
        for column, height in climb.items():
            row[column] += height
    labels = torch.full((len(climbs),), target)
    labels[0] = IGNORE
    return make_head(VOCABULARY, 64, dtype=dtype, device=device, labels=labels, logits=logits)


@each_walk
@pytest.mark.parametrize("stats", [False, True], ids=["", "stats"])
def test_competitors_early_late_and_in_the_targets_tile(backend, device, schedule, stats, hidden_competitors):
    head = climbing(device)
    wanted, options = scheduled(schedule, head)
    if not stats:
        linear_heads.assert_matches_float64(head, backend, wanted, **options)
        return
    out = ours(head, backend, return_stats=True, **options)(head.hidden, head.weight, head.bias)
    double = head.double()
    logits = F.linear(double.hidden, double.weight)
    truth = slow_loop.entropies(logits, head.labels)
    plain = slow_loop.entropies(F.linear(head.hidden, head.weight), head.labels)
    assert_no_worse_than_eager(out.entropy, plain, truth, 1e-4)  # both are differences of numbers up to 1000
    assert torch.equal(out.top1.cpu().bool(), slow_loop.top1_hits(logits, head.labels))


@pytest.mark.parametrize("schedule", ["list_hold", "recompute", "frozen_head", "auto_holding_a_part"])
def test_raising_in_half_precision(backend, device, schedule, half, hidden_competitors):
    """A bfloat16 logit of 400 is off by up to 1, for us as for eager: which of the two is luckier means nothing."""
    head = climbing(device, half)
    wanted, options = scheduled(schedule, head)
    linear_heads.assert_matches_float64(head, backend, wanted, times=2.5, **options)


@pytest.mark.parametrize("schedule", ["list_hold", "recompute", "frozen_head"])
def test_raising_under_a_soft_cap_and_a_scale(backend, device, schedule, hidden_competitors):
    head = climbing(device)
    wanted, options = scheduled(schedule, head)
    linear_heads.assert_matches_float64(head, backend, wanted, softcap=250.0, logit_scale=1.5, **options)


def test_raising_one_token_leaves_its_neighbours_bits_alone(backend, device, hidden_competitors):
    """A token's numbers do not depend on who shares its tile."""
    head = climbing(device)
    calm = replace(head, hidden=head.hidden.clone())
    calm.hidden[3] = head.hidden[9]  # was: a competitor 100 nats above, in the last tile
    for schedule in ("list_hold", "frozen_head"):
        wanted, options = scheduled(schedule, head)
        logps, grads = run(ours(head, backend, **options), head, wanted)
        calm_logps, calm_grads = run(ours(calm, backend, **options), calm, wanted)
        others = torch.arange(len(head.labels)) != 3
        torch.testing.assert_close(logps[others], calm_logps[others], rtol=1e-6, atol=0)
        torch.testing.assert_close(grads["hidden"][others], calm_grads["hidden"][others], rtol=1e-5, atol=1e-7)


# ---- minus infinity


def with_lost_columns(device, lost, dtype=torch.float32):
    """The bias is -inf in some columns."""
    head = make_head(VOCABULARY, 31, (9,), dtype, device, bias=True)
    bias = head.bias.clone()
    bias[lost] = -math.inf
    return replace(head, bias=bias)


@each_walk
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_target_at_minus_infinity_pushes_nothing(backend, device, schedule, dtype):
    head = with_lost_columns(device, [13, 57, 99], dtype)
    labels = head.labels.clone()
    impossible = [2, 5, 6]
    labels[impossible] = torch.tensor([13, 57, 99], device=device)
    head = replace(head, labels=labels)
    wanted, options = scheduled(schedule, head)
    logps, grads = run(ours(head, backend, **options), head, wanted)
    assert (logps[impossible] == -math.inf).all()
    possible = torch.ones(9, dtype=torch.bool, device=device)
    possible[impossible] = False
    assert logps[possible].isfinite().all()
    rest = replace(head, labels=labels.masked_fill(~possible, IGNORE))  # as if those tokens were not there
    expected, expected_grads = run(true(rest), rest.double(), wanted)
    plain, plain_grads = run(linear_heads.eager(rest), rest, wanted)
    assert_no_worse_than_eager(logps.masked_fill(~possible, 0), plain, expected)
    for name in wanted:
        times = linear_heads.rounding_allowance(dtype)
        linear_heads.assert_within(times, grads[name], plain_grads[name], expected_grads[name], 1e-5, name)
    if wanted:
        assert (grads["hidden"][~possible] == 0).all()


@each_walk
def test_only_the_target_is_possible(backend, device, schedule):
    """Everything else at -inf: certainty, and no gradient."""
    others = [v for v in range(VOCABULARY) if v != 61]
    head = with_lost_columns(device, others)
    head = replace(head, labels=torch.full_like(head.labels, 61))
    wanted, options = scheduled(schedule, head)
    logps, grads = run(ours(head, backend, **options), head, wanted)
    assert (logps == 0).all()
    for name in wanted:
        assert (grads[name] == 0).all(), name


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("schedule", ["list_hold", "recompute", "frozen_head"])
def test_whole_tiles_of_minus_infinity(backend, device, schedule, softcap):
    """Under a soft cap -inf becomes -cap, and counts."""
    head = with_lost_columns(device, slice(40, 80))
    head = replace(head, labels=head.labels.where((head.labels < 40) | (head.labels >= 80), 3))
    wanted, options = scheduled(schedule, head)
    logps, grads = run(ours(head, backend, softcap=softcap, **options), head, wanted)
    finite = replace(head, bias=head.bias.clamp(min=-1e4))
    expected, expected_grads = run(true(finite, softcap=softcap), finite.double(), wanted)
    plain, plain_grads = run(linear_heads.eager(finite, softcap=softcap), finite, wanted)
    assert_no_worse_than_eager(logps, plain, expected)
    for name in wanted:
        linear_heads.assert_within(1, grads[name], plain_grads[name], expected_grads[name], 1e-5, name)


# ---- plus infinity


def test_a_target_that_overflowed_is_no_certain_token(backend, device):
    """Its softmax is no number, and no loss of 0 without a gradient."""
    logits = torch.randn(3, 20, device=device)
    logits[1, 4] = math.inf
    labels = torch.full((3,), 4, device=device)
    logps = lk.token_logps(logits.requires_grad_(), labels, backend=backend)
    (grad,) = torch.autograd.grad(logps.sum(), logits)
    hidden, weight = torch.full((1, 2), 1e30, device=device), torch.full((20, 2), 1.0, device=device)
    weight[4] = 1e30
    linear = lk.linear_token_logps(hidden, weight, labels[:1], backend=backend)
    assert logps.isnan().tolist() == [False, True, False] and grad[1].isnan().all() and linear.isnan().all()


# ---- certain tokens


@pytest.mark.parametrize("schedule", ["score_only", "list_hold", "frozen_head"])
def test_a_nearly_certain_token_keeps_its_relative_precision(backend, device, schedule):
    """-log p is about 1e-9 to 1e-8: a float32 logsumexp minus a float32 target could only say 0."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(9) * 11
    logits = torch.randn(9, VOCABULARY, dtype=torch.float64, generator=generator)
    logits[torch.arange(9), labels] += 25
    head = make_head(VOCABULARY, 16, dtype=torch.float32, device=device, labels=labels, logits=logits)
    wanted, options = scheduled(schedule, head)
    logps, grads = run(ours(head, backend, **options), head, wanted)
    expected, expected_grads = run(true(head), head.double(), wanted)
    assert (expected > -1e-7).all() and (logps < 0).all()
    torch.testing.assert_close(logps.double(), expected, rtol=1e-4, atol=0)
    for name in wanted:
        error = (grads[name].double() - expected_grads[name]).norm() / expected_grads[name].norm()
        assert error < 1e-4, name


def test_log_probs_are_never_above_zero(backend, device, half):
    """A float32 target beside a logsumexp of rounded logits would be."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, VOCABULARY, (32,), generator=generator)
    logits = torch.randn(32, VOCABULARY, dtype=torch.float64, generator=generator) * 10
    logits[torch.arange(32), labels] = logits.amax(-1) + torch.linspace(0, 30, 32)
    head = make_head(VOCABULARY, 64, dtype=half, device=device, labels=labels, logits=logits)
    logps = lk.linear_token_logps(head.hidden, head.weight, head.labels, backend=backend)
    assert (logps <= 0).all() and logps.isfinite().all()

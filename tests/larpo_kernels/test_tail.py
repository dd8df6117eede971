"""tail_threshold: gradients from the vocabulary rows that matter, the rest merged; and where everything stays exact."""

import math
from dataclasses import replace

import pytest
import torch

import larpo_kernels as lk
from larpo_kernels.backends.pytorch import states as plain
from larpo_kernels.linear import dtypes, schedules, tile_shapes, walk
from tests.helpers.batches import IGNORE
from tests.helpers.costs import costs
from tests.helpers.interpreted import few_interpreted
from tests.helpers.linear_heads import make_head, ours, plan_of, run, scheduled, true, use_small_tiles

THRESHOLD = 2**-9
VOCABULARY, TOKENS = 250, 40


@pytest.fixture(autouse=True)
def heads_of_any_size(monkeypatch):
    monkeypatch.setattr(schedules, "TAIL_HEAD", 0)
    monkeypatch.setattr(schedules, "TAIL_AMX_WIDTH", 0)


@pytest.fixture
def small_tiles(monkeypatch):
    use_small_tiles(monkeypatch, tokens=20, rows=100)


def peaked(spread=1.5, vocabulary=VOCABULARY, tokens=TOKENS, hidden_size=64, surprise=0.0, **options):
    """Logits as a trained model has them: some words are frequent everywhere (Zipf), others where they fit. At every ninth
    token the last word is a surprise: its logit is raised once the labels are drawn."""
    generator = torch.Generator().manual_seed(1)
    frequent = -1.5 * torch.arange(1, vocabulary + 1).log()
    logits = frequent + spread * torch.randn(tokens, vocabulary, generator=generator)
    labels = logits.softmax(-1).multinomial(1, generator=generator)[:, 0]
    labels[::7] = IGNORE
    logits[::9, -1] += surprise
    return make_head(vocabulary, hidden_size, labels=labels, logits=logits, **options)


def shares(head, logit_scale=1.0, softcap=None):
    """What each row of the vocabulary has of a token's gradient: its probability, times the slope of the soft cap."""
    x = head.double()
    z = torch.nn.functional.linear(x.hidden, x.weight, x.bias) * logit_scale
    bent = (z / softcap).tanh() if softcap else torch.zeros_like(z)
    return (softcap * bent if softcap else z).softmax(-1) * (1 - bent.square())


def assert_within_the_bound(head, backend, wanted, rounding=1e-5, threshold=THRESHOLD, **options):
    """Log-probs as without a threshold. Of d hidden a token lacks at most what merging its rest can move, of d weight only
    rows that no token gives more than the threshold. -> the share of rows without a d weight."""
    wanted = [name for name in wanted if name in head.given]
    semantic = {k: v for k, v in options.items() if k in ("softcap", "logit_scale")}
    logps, grads = run(ours(head, backend, tail_threshold=threshold, **options), head, wanted)
    true_logps, true_grads = run(true(head, **semantic), head.double(), wanted)
    counted = head.labels != IGNORE
    assert ((logps - true_logps).abs() <= rounding * (1 + true_logps.abs())).all()
    p = torch.where(counted[:, None], shares(head, **semantic), 0)
    c = head.upstream.abs() * counted * abs(options.get("logit_scale", 1.0))
    rest = torch.where(p > threshold, 0, p).sum(1)
    longest = head.weight.double().norm(dim=1).max()
    if "hidden" in wanted:
        off = (grads["hidden"].double() - true_grads["hidden"]).norm(dim=1)
        assert (off <= 2 * c * rest * longest + rounding * c * longest).all()
        assert (grads["hidden"][~counted] == 0).all()
    dropped = 0.0
    for name, size in (("weight", head.hidden.double().norm(dim=1)), ("bias", torch.ones_like(c))):
        if name in wanted:
            got, truth = (x[name].double().reshape(VOCABULARY, -1) for x in (grads, true_grads))
            none, size = (got == 0).all(1), c * size
            lost = (torch.where(p > threshold, 0, p) * size[:, None]).sum(0)
            targets = torch.zeros_like(lost).index_add_(0, head.labels[counted], size[counted])
            assert ((got - truth).norm(dim=1) <= lost + rounding * (targets + (p * size[:, None]).sum(0))).all()
            assert (p.amax(0)[none] <= threshold).all() and not none[head.labels[counted]].any()
            dropped = none.double().mean().item()
    return dropped


CASES = {
    "frozen_head": ("frozen_head", {}),
    "frozen_head_softcap": ("frozen_head", {"softcap": 40.0}),
    "list_hold": ("list_hold", {}),
    "list_hold_scale": ("list_hold", {"logit_scale": 1.2}),
    "list_hold_softcap": ("list_hold", {"softcap": 40.0}),
    "recompute_bias_softcap": ("recompute", {"bias": True, "softcap": 40.0}),
    "recompute_bias": ("recompute", {"bias": True}),
    "auto_holding_a_part": ("auto_holding_a_part", {"bias": True}),
}


@pytest.mark.parametrize("case", few_interpreted(CASES, ["frozen_head_softcap", "list_hold", "recompute_bias_softcap"]))
def test_only_the_tail_is_merged(case, backend, device, small_tiles):
    schedule, options = CASES[case]
    options = dict(options)
    head = peaked(bias=options.pop("bias", False), device=device)
    wanted, how = scheduled(schedule, head)
    dropped = assert_within_the_bound(head, backend, wanted, **how, **options)
    assert dropped > 0.1 or "weight" not in wanted


@pytest.mark.slow_interpreted
def test_the_row_of_a_target_counts_however_unlikely_it_is(backend, device, small_tiles):
    head = peaked(device=device)
    most = shares(head)[head.labels != IGNORE].amax(0)
    unlikely = torch.stack([a + most[a : a + 100].argmin() for a in (100, 200)])  # one of each tile but the first
    assert (most[unlikely] < THRESHOLD).all()
    labels = head.labels.clone()
    labels[1:3] = unlikely
    head = replace(head, labels=labels)
    wanted, how = scheduled("list_hold", head)
    assert_within_the_bound(head, backend, wanted, **how)


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("schedule", ["frozen_head", "list_hold"])
def test_what_was_merged_and_held_is_rescaled_where_a_later_tile_raises_the_shift(
    schedule, backend, device, monkeypatch, small_tiles
):
    monkeypatch.setattr(tile_shapes, "seen_step", lambda rows: rows)  # the first row alone is looked at for a shift
    head = peaked(surprise=120.0, device=device)
    wanted, how = scheduled(schedule, head)
    assert_within_the_bound(head, backend, wanted, **how)


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("schedule", ["frozen_head", "list_hold"])
def test_log_probs_and_statistics_do_not_change(schedule, backend, device, small_tiles):
    head = peaked(device=device)
    wanted, how = scheduled(schedule, head)
    x = head.leaves(wanted)
    exact, tail = (
        lk.linear_token_logps(labels=head.labels, return_stats=True, backend=backend, tail_threshold=t, **x, **how)
        for t in (None, THRESHOLD)
    )
    assert all(torch.equal(a, b) for a, b in zip(exact, tail, strict=True))


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("schedule", ["frozen_head", "list_hold", "recompute"])
def test_where_no_row_stands_out_all_is_exact(schedule, backend, device, small_tiles):
    head = make_head(VOCABULARY, 64, (TOKENS,), device=device, bias=True)
    wanted, how = scheduled(schedule, head)
    exact, tail = (run(ours(head, backend, tail_threshold=t, **how), head, wanted) for t in (None, THRESHOLD))
    assert torch.equal(exact[0], tail[0])
    for name in wanted:
        torch.testing.assert_close(tail[1][name], exact[1][name], rtol=1e-6, atol=1e-6)


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("schedule", ["frozen_head", "list_hold", "recompute"])
def test_flat_logits_are_walked_as_without_a_threshold(schedule, backend, device, monkeypatch, small_tiles):
    monkeypatch.setattr(schedules, "FLAT_TOKENS", 30)
    flat, trained = make_head(VOCABULARY, 64, (TOKENS,), device=device, bias=True), peaked(device=device, bias=True)
    wanted, how = scheduled(schedule, flat)
    with lk.TailShares() as shares:
        run(ours(trained, backend, tail_threshold=THRESHOLD, **how), trained, wanted)
    assert shares.rows < 0.8 and shares.merged > 0
    monkeypatch.setattr(walk, "TailBlock", None)  # cannot be walked with a tail now
    with lk.TailShares() as shares:
        exact, tail = (run(ours(flat, backend, tail_threshold=t, **how), flat, wanted)[1] for t in (None, 2**-5))
    assert (shares.tokens, shares.rows, shares.merged) == ((flat.labels != IGNORE).sum(), 1, 0)
    assert all(torch.equal(tail[name], exact[name]) for name in wanted)
    plan = plan_of(flat, wanted, tail_threshold=2**-5, **how)
    assert plan.if_flat.tail_threshold is None and plan.extra_bytes >= plan.if_flat.extra_bytes
    assert "of all rows where logits are flat" in str(plan)


def test_narrow_bfloat16_heads_are_exact_where_a_cpu_multiplies_them_quickly(monkeypatch):
    monkeypatch.setattr(schedules, "TAIL_AMX_WIDTH", 64)
    monkeypatch.setattr(dtypes, "native_bf16", lambda *_: True)
    for width, frozen, trained in ((32, None, None), (64, None, THRESHOLD), (128, THRESHOLD, THRESHOLD)):
        head = make_head(VOCABULARY, width, (TOKENS,), dtype=torch.bfloat16)
        found = [plan_of(head, wanted, tail_threshold=THRESHOLD).tail_threshold for wanted in (("hidden",), ("weight",))]
        assert found == [frozen, trained]


@pytest.mark.slow_interpreted
def test_a_token_that_is_not_a_number_spoils_what_it_spoils_without_a_threshold(backend, device, small_tiles):
    head = peaked(device=device)
    head.hidden.data[1, 3] = math.nan
    for schedule in ("frozen_head", "list_hold"):
        wanted, how = scheduled(schedule, head)
        exact, tail = (run(ours(head, backend, tail_threshold=t, **how), head, wanted) for t in (None, THRESHOLD))
        assert torch.equal(exact[0].isnan(), tail[0].isnan())
        for name in wanted:
            assert exact[1][name].isnan().any() and torch.equal(exact[1][name].isnan(), tail[1][name].isnan())


def test_what_is_held_is_freed_by_the_backward_and_said_beforehand(device, small_tiles):
    head = peaked(device=device)
    hidden, weight = head.hidden.requires_grad_(), head.weight.requires_grad_()
    with lk.TailShares() as shares:
        logps = lk.linear_token_logps(hidden, weight, head.labels, schedule="list_hold", tail_threshold=THRESHOLD)
    saved = [x for x in logps.grad_fn.saved_tensors if x is not None and x.dim() == 2 and x.shape[1] in (20, 8)]
    assert 0.2 < shares.rows < 0.8 and 0 < shares.merged < 1 / 8 and shares.tokens == (head.labels != IGNORE).sum()
    assert shares.held_bytes == sum(x.nbytes for x in saved) > 0
    logps.sum().backward(retain_graph=True)
    first = weight.grad.clone()
    logps.sum().backward()
    torch.testing.assert_close(weight.grad, 2 * first)
    with pytest.raises(RuntimeError, match="backward"):
        logps.sum().backward()


def test_small_heads_and_compiled_graphs_are_exact(device, monkeypatch):
    head = peaked(device=device)
    exact = run(ours(head, "torch"), head, ("hidden", "weight"))
    for limit, compiled in ((1 << 22, False), (0, True)):
        monkeypatch.setattr(schedules, "TAIL_HEAD", limit)
        function = ours(head, "torch", tail_threshold=THRESHOLD)
        got = run(torch.compile(function, backend="eager") if compiled else function, head, ("hidden", "weight"))
        for name in ("hidden", "weight"):
            torch.testing.assert_close(got[1][name], exact[1][name])


def test_the_plan_says_so(device):
    head = make_head(VOCABULARY, 64, (TOKENS,), device=device)
    plan = plan_of(head, tail_threshold=THRESHOLD, schedule="list_hold")
    assert plan.tail_threshold == THRESHOLD and "0.002" in str(plan)
    assert plan_of(head, (), tail_threshold=THRESHOLD).tail_threshold is None


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("schedule", ["frozen_head", "list_hold", "recompute"])
def test_in_bfloat16_what_is_merged_is_all_that_is_added_to_rounding(schedule, backend, device, monkeypatch, small_tiles):
    monkeypatch.setattr(dtypes, "native_bf16", lambda *_: True)
    head = peaked(device=device, dtype=torch.bfloat16)
    wanted, how = scheduled(schedule, head)
    _, truth = run(true(head), head.double(), wanted)
    exact, tail = (run(ours(head, backend, tail_threshold=t, **how), head, wanted)[1] for t in (None, THRESHOLD))
    _, unrounded = run(ours(head.double(), "torch", tail_threshold=THRESHOLD, **how), head.double(), wanted)
    for name in wanted:
        off = [(x[name].double() - truth[name]).norm().item() for x in (tail, exact, unrounded)]
        assert off[0] <= 1.2 * (off[1] + off[2])


def test_a_second_derivative_is_refused(device):
    head = peaked(device=device)
    hidden = head.hidden.requires_grad_()
    logps = lk.linear_token_logps(hidden, head.weight, head.labels, tail_threshold=THRESHOLD)
    (grad,) = torch.autograd.grad(logps.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative is not implemented"):
        grad.sum().backward()


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what is allocated on a CPU")
@pytest.mark.parametrize("schedule", ["frozen_head", "list_hold", "recompute"])
def test_memory_is_at_most_what_the_plan_says(schedule, monkeypatch):
    monkeypatch.setattr(tile_shapes, "CPU_TILE_BYTES", 1 << 17)
    monkeypatch.setattr(tile_shapes, "TAIL_CPU_TOKENS", 64)
    monkeypatch.setattr(schedules, "FLAT_TOKENS", 64)
    monkeypatch.setattr(plain, "STEP", 32)
    head = peaked(vocabulary=1500, tokens=150, hidden_size=160)
    wanted, how = scheduled(schedule, head)
    x = head.leaves(wanted)
    options = dict(labels=head.labels, tail_threshold=THRESHOLD, **how)

    def step():
        logps = lk.linear_token_logps(**x, **options, backend="torch")
        return torch.autograd.grad(logps, [x[name] for name in wanted], head.upstream.to(logps.dtype))

    step()
    plan = lk.plan(**x, **options)
    beyond = costs(step).peak - sum(x[name].nbytes for name in wanted)
    per_token, slices = 20 * 8 * 150, 3 * 4 * 32 * 160
    assert 0.2 * plan.extra_bytes <= beyond <= 1.1 * plan.extra_bytes + per_token + slices


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what is allocated on a CPU")
def test_memory_of_the_look_at_a_few_tokens_is_in_the_plan(monkeypatch):
    """Of narrow hidden states and many rows it is the most that a call has allocated at a time."""
    monkeypatch.setattr(tile_shapes, "CPU_TILE_BYTES", 1 << 17)
    head = make_head(vocabulary=20000, hidden_size=8, shape=(schedules.FLAT_TOKENS * 3 // 2,))
    given = dict(hidden=head.hidden.requires_grad_(), weight=head.weight, labels=head.labels)
    options = dict(tail_threshold=THRESHOLD, schedule="recompute")
    plan = lk.plan(**given, **options)
    assert plan.if_flat.extra_bytes < plan.extra_bytes == 16 * 20000 * (4 + 4 + 1)  # E, shares, a mask
    assert costs(lambda: lk.linear_token_logps(**given, **options, backend="torch")).peak <= 1.1 * plan.extra_bytes

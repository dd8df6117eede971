"""Schedules: which one `plan` picks and why, and that it costs what it says, in bytes and in GEMMs."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch

import larpo_kernels as lk
from larpo_kernels.backends.pytorch import states as plain
from larpo_kernels.linear import dtypes, memory, schedules, tile_shapes
from larpo_kernels.linear.schedules import Request
from tests.helpers.batches import IGNORE, leaf
from tests.helpers.costs import costs
from tests.helpers.linear_heads import ALL, WALKS, make_head, plan_of, scheduled

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="counts what is allocated on a CPU")
TILE_BYTES = 1 << 17
VOCABULARY, HIDDEN = 1500, 64
COUNTED, WALKED = 300, 304  # of 500 tokens; tokens are walked in multiples of 16


@pytest.fixture(params=[1000, 130], ids=["one_block_of_tokens", "blocks_of_tokens"])
def tiles(request, monkeypatch):
    """Tiles of at least 256 vocabulary rows by at most this many tokens."""
    monkeypatch.setattr(tile_shapes, "CPU_TILE_BYTES", TILE_BYTES)
    monkeypatch.setattr(tile_shapes, "CPU_TILE_TOKENS", request.param)
    monkeypatch.setattr(plain, "STEP", 32)  # rows at a time where a float32 copy is needed
    return request.param


def a_head(dtype=torch.float32, weight_dtype=None, **options):
    labels = torch.arange(500) * 7 % VOCABULARY
    labels[: 500 - COUNTED] = IGNORE
    return make_head(VOCABULARY, HIDDEN, dtype=dtype, weight_dtype=weight_dtype, labels=labels, **options)


def step(head, schedule):
    """-> a call that runs forward and backward, and the bytes of the gradients it leaves."""
    wanted, options = scheduled(schedule, head)
    x = head.leaves(wanted)

    def run():
        logps = lk.linear_token_logps(labels=head.labels, **x, **options, backend="torch")
        return torch.autograd.grad(logps, [x[name] for name in wanted], head.upstream.to(logps.dtype)) if wanted else logps

    return run, sum(x[name].nbytes for name in wanted), plan_of(head, wanted, **options)


# ---- which one


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [((), "score_only"), (("hidden",), "frozen_head")]
    + [(c, "list_hold") for n in (1, 2, 3) for c in combinations(ALL, n) if c != ("hidden",)],
    ids=str,
)
def test_auto_goes_by_what_requires_grad(device, wanted, expected):
    head = make_head(1000, 16, (8,), device=device, bias=True)
    plan = plan_of(head, wanted)
    assert plan.schedule == expected
    assert plan.gemms == {"score_only": 1, "frozen_head": 2}.get(expected, 1 + len(set(wanted) - {"bias"}))


def test_no_grad_mode_scores(device):
    head = make_head(1000, 16, (8,), device=device)
    with torch.no_grad():
        assert plan_of(head).schedule == "score_only"


def test_the_budget_decides_how_much_is_held(device, monkeypatch):
    monkeypatch.setattr(tile_shapes, "CPU_TILE_BYTES", TILE_BYTES)
    monkeypatch.setattr(tile_shapes, "GPU_TILE_BYTES", TILE_BYTES)
    head = a_head()
    least, most = (plan_of(head, schedule=name).extra_bytes for name in ("recompute", "list_hold"))
    plans = [plan_of(head, memory_budget=budget) for budget in range(0, most + 1, most // 20)] + [
        plan_of(head, memory_budget=most)
    ]
    held = [plan.held_rows for plan in plans]
    assert held[0] == 0 and held[-1] == VOCABULARY and held == sorted(held) and len(set(held)) > 3
    for plan, budget in zip(plans, [*range(0, most + 1, most // 20), most], strict=True):
        assert plan.schedule == ("list_hold" if plan.held_rows == VOCABULARY else "recompute")
        assert plan.extra_bytes <= max(budget, least)
        assert plan.gemms == pytest.approx(4 - plan.held_rows / VOCABULARY)


def test_tokens_that_do_not_count_cost_nothing(tiles):
    head = a_head()
    everything = replace(head, labels=head.labels.clamp(min=0))
    counted, all_of_them = (plan_of(x, schedule="list_hold").extra_bytes for x in (head, everything))
    assert counted < 0.75 * all_of_them


def test_nothing_to_walk_has_a_plan(device):
    head = make_head(31, 8, device=device, labels=torch.zeros(0, dtype=torch.long))
    for options in ({}, {"memory_budget": 0}, {"schedule": "recompute"}):
        assert plan_of(head, **options).extra_bytes >= 0


def test_a_plan_explains_itself(device, monkeypatch):
    monkeypatch.setattr(tile_shapes, "CPU_TILE_BYTES", 16 << 10)  # several tiles: of one there is little to tell
    head = make_head(1000, 16, (8,), device=device)
    for wanted, options, words in (
        ((), {}, ["score_only", "1 GEMM", "nothing requires grad"]),
        (("hidden",), {}, ["frozen_head", "2 GEMMs", "only hidden requires grad"]),
        (ALL, {"schedule": "recompute"}, ["recompute", "4 GEMMs", "asked for"]),
        (ALL, {"memory_budget": 1 << 30}, ["list_hold", "3 GEMMs", "memory_budget = 1024 MiB", "1000 vocabulary rows held"]),
        (ALL, {"memory_budget": 0}, ["recompute", "4 GEMMs", "memory_budget = 0 MiB"]),
        (ALL, {}, ["half of free memory"]),
    ):
        plan = plan_of(head, wanted, **options)
        for word in (*words, f"{plan.extra_bytes / 2**20:.1f} MiB"):
            assert word in str(plan)


def test_schedules_that_cannot_be_raise(backend, device):
    head = make_head(31, 8, (4,), device=device, bias=True)
    for name, wanted in (
        ("score_only", ("hidden",)),
        ("score_only", ("weight",)),
        ("score_only", ("bias",)),
        ("frozen_head", ("weight",)),
        ("frozen_head", ("hidden", "bias")),
    ):
        x = head.leaves(wanted, ALL)
        with pytest.raises(ValueError, match=name):
            lk.linear_token_logps(labels=head.labels, schedule=name, backend=backend, **x)


@pytest.mark.parametrize("tokens", [1, 7, 100, 5000])
@pytest.mark.parametrize("vocabulary", [1, 200, 50257])
def test_tiles_are_within_their_bounds(tokens, vocabulary):
    for device, kind in (("cpu", "CPU"), ("cuda", "GPU")):
        t, rows = tile_shapes.tile_shape(tokens, 64, vocabulary, torch.float32, torch.device(device))
        budget, most = (getattr(tile_shapes, f"{kind}_TILE_{what}") for what in ("BYTES", "TOKENS"))
        assert 1 <= t <= min(tokens, most) and 1 <= rows <= vocabulary
        assert rows >= min(vocabulary, 256)
        assert rows == min(vocabulary, 256) or t * rows * 4 <= budget


@pytest.mark.parametrize("tokens", [1, 8192, 65536, 300000])
@pytest.mark.parametrize("vocabulary", [200, 32000, 128256, 262144])
def test_on_a_gpu_held_logits_are_as_few_tiles_as_matrices_may_be_large(tokens, vocabulary):
    t, rows = tile_shapes.tile_shape(tokens, 4096, vocabulary, torch.bfloat16, torch.device("cuda"), casts=False, in_place=True)
    assert t == min(tokens, tile_shapes.HELD_TILE_TOKENS) and t * rows < 1 << 31
    tiles = -(-vocabulary // rows)
    assert tiles == -(-t * vocabulary // tile_shapes.HELD_TILE_ENTRIES)
    assert vocabulary - (tiles - 1) * rows > 0.95 * rows  # none of them is a sliver
    budgeted = tile_shapes.tile_shape(tokens, 4096, vocabulary, torch.bfloat16, torch.device("cuda"), casts=True, in_place=True)
    assert max(budgeted[0], 4096) * budgeted[1] * 2 <= tile_shapes.GPU_TILE_BYTES  # a cast weight is copied a tile at a time


@pytest.mark.parametrize("tokens", [100, 4096, 9000, 30000])
@pytest.mark.parametrize("vocabulary", [32003, 128256, 262144])
def test_on_a_gpu_d_hidden_is_one_gemm_in_one_pass_unless_that_leaves_few_tokens(tokens, vocabulary):
    t, rows = tile_shapes.tile_shape(
        tokens, 4096, vocabulary, torch.bfloat16, torch.device("cuda"), casts=False, fuse_hidden_grad=True
    )
    assert t * rows * 2 <= tile_shapes.GPU_TILE_BYTES
    if tile_shapes.GPU_TILE_BYTES // (2 * vocabulary) >= tile_shapes.FUSED_GRAD_TOKENS:
        blocks = -(-tokens // t)
        assert rows == vocabulary and t < tokens / blocks + 16  # and blocks are about as large


def test_what_holding_all_costs_on_a_gpu_is_the_logits_and_no_tile_beside_them():
    n, h, v, bf16 = 8192, 4096, 128256, torch.bfloat16
    work = memory.Workload(n, h, v, memory.Needs(True, True, False), (bf16, bf16), bf16, bf16, torch.device("cuda"))
    held, again = (schedules.make_plan(work, Request(name)).extra_bytes for name in ("list_hold", "recompute"))
    assert held - again == n * v * 2 - 8192 * 65536 * 2  # a tile of recompute
    for budget in range(again, held, (held - again) // 50):
        plan = schedules.make_plan(work, Request(memory_budget=budget))
        assert plan.held_rows < v and plan.extra_bytes <= budget


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_plan_says_that_float16_is_slow_on_a_gpu(dtype, device):
    compute = dtypes.compute_dtype(dtype, dtype, device)
    needs = memory.Needs(True, False, False)
    work = memory.Workload(64, 512, 1024, needs, (dtype, dtype), compute, compute, torch.device(device))
    assert ("SLOW: float16" in str(schedules.make_plan(work, Request()))) == (device == "cuda" and dtype == torch.float16)


def test_a_containers_limit_counts(tmp_path):
    assert memory.container_bytes(77, tmp_path) == 77
    (tmp_path / "memory.current").write_text("350\n")
    (tmp_path / "memory.stat").write_text("anon 300\nfile 50\nfile_mapped 9\n")
    for most, left in (("max\n", 77), ("1000\n", 700), ("200\n", 0)):
        (tmp_path / "memory.max").write_text(most)
        assert memory.container_bytes(77, tmp_path) == left


# ---- what it costs


DTYPES = {  # of hidden and weight, and whether tiles are bfloat16
    "float32": (torch.float32, None, False),
    "bfloat16": (torch.bfloat16, None, False),
    "bf16_hidden_fp32_weight": (torch.bfloat16, torch.float32, False),
    "bf16_tiles": (torch.bfloat16, None, True),
    "bf16_tiles_fp32_weight": (torch.bfloat16, torch.float32, True),
}


@on_cpu
@pytest.mark.parametrize(("dtype", "weight_dtype", "native"), DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("schedule", WALKS)
def test_memory_is_what_the_plan_says(schedule, dtype, weight_dtype, native, tiles, monkeypatch):
    if native:
        monkeypatch.setattr(dtypes, "native_bf16", lambda *_: True)
    head = a_head(dtype, weight_dtype)
    run, gradients, plan = step(head, schedule)
    run()  # what a first call leaves behind is not the schedule's
    extra = costs(run).peak - gradients
    per_token = 20 * 8 * 500  # a few numbers per token, some of them int64
    slices = 3 * 4 * plain.STEP * HIDDEN  # target logits, a few rows at a time
    assert extra <= 1.1 * plan.extra_bytes + per_token + slices, f"{extra} bytes against {plan}"
    assert extra >= 0.4 * plan.extra_bytes, f"{extra} bytes against {plan}: the plan promises too little"


@on_cpu
def test_memory_of_d_bias_is_in_the_plan(monkeypatch):
    """A bfloat16 tile is brought to float32 to be summed over tokens, some rows at a time: here all of it."""
    monkeypatch.setattr(dtypes, "native_bf16", lambda *_: True)
    head = a_head(torch.bfloat16, bias=True)
    x = [leaf(getattr(head, name)) for name in ALL]

    def run():
        logps = lk.linear_token_logps(x[0], x[1], head.labels, bias=x[2], schedule="list_hold", backend="torch")
        return torch.autograd.grad(logps, x, head.upstream.to(logps.dtype))

    run()
    plan = plan_of(head, ALL, schedule="list_hold")
    extra = costs(run).peak - sum(one.nbytes for one in x)
    assert extra <= 1.1 * plan.extra_bytes + 20 * 8 * 500, f"{extra} bytes against {plan}"


def test_sums_over_spans_are_in_the_plan_of_a_gpu():
    """Of thin hidden states they are all that a forward has beside its tile."""
    n, h, v, bf16, needs = 4096, 64, 128256, torch.bfloat16, memory.Needs(False, False, False)
    work = memory.Workload(n, h, v, needs, (bf16, bf16), bf16, bf16, torch.device("cuda"))
    assert schedules.make_plan(work, Request()).extra_bytes >= 2 * n * v + 4 * 4 * n * v / 256


@on_cpu
@pytest.mark.parametrize("schedule", WALKS)
def test_logits_of_all_tokens_exist_only_where_they_are_held(schedule, tiles):
    head = a_head(torch.bfloat16)
    run, _, plan = step(head, schedule)
    run()
    all_logits = WALKED * VOCABULARY * 2  # in half precision
    largest = costs(run).largest
    if plan.held_rows:
        held = WALKED * plan.held_rows * 2
        assert largest == max(held, 4 * VOCABULARY * HIDDEN if tiles < WALKED else 0)  # or d weight, summed in float32
    else:
        assert largest < all_logits / 2


@on_cpu
@pytest.mark.parametrize("native", [False, True], ids=["default", "bf16_tiles"])
def test_a_frozen_weight_gets_no_buffer_and_no_float32_copy(native, monkeypatch):
    """A head far larger than all else: 5000 x 256."""
    monkeypatch.setattr(tile_shapes, "CPU_TILE_BYTES", TILE_BYTES)
    monkeypatch.setattr(dtypes, "native_bf16", lambda *_: native)
    head = make_head(5000, 256, (12,), torch.bfloat16)
    for wanted in ((), ("hidden",), ("weight",)):
        x = head.leaves(wanted)

        def run(x=x, wanted=wanted):
            logps = lk.linear_token_logps(labels=head.labels, **x, schedule="auto", memory_budget=0)
            return torch.autograd.grad(logps.sum(), [x[name] for name in wanted]) if wanted else logps

        run()
        extra = costs(run).peak - ("weight" in wanted) * head.weight.nbytes
        assert extra < 0.75 * head.weight.nbytes, wanted  # a float32 copy would take twice its bytes


@on_cpu
@pytest.mark.parametrize("schedule", WALKS)
def test_gemms_are_what_the_plan_says(schedule, tiles):
    head = a_head()
    run, _, plan = step(head, schedule)
    assert costs(run).flops == pytest.approx(plan.gemms * 2 * WALKED * HIDDEN * VOCABULARY, rel=1e-9)


@on_cpu
@pytest.mark.parametrize("wanted", [c for n in (1, 2, 3) for c in combinations(ALL, n)], ids="-".join)
def test_a_gradient_that_nobody_wants_runs_no_gemm(wanted, monkeypatch):
    monkeypatch.setattr(tile_shapes, "CPU_TILE_BYTES", TILE_BYTES)
    head = a_head(bias=True)
    x = head.leaves(wanted, ALL)

    def run():
        return torch.autograd.grad(
            lk.linear_token_logps(labels=head.labels, **x, schedule="recompute").sum(), [*map(x.get, wanted)]
        )

    gemms = [sizes for sizes in costs(run).gemms if 1 not in sizes]  # d bias is a product with a vector
    tiles_of_one_gemm = costs(lambda: lk.linear_token_logps(head.hidden, head.weight, head.labels)).gemms
    assert len(gemms) == (2 + ("hidden" in wanted) + ("weight" in wanted)) * len(tiles_of_one_gemm)


@on_cpu
@pytest.mark.parametrize("schedule", ["score_only", "frozen_head", "list_hold", "recompute"])
def test_half_the_tokens_masked_halves_the_work(schedule):
    full = replace(a_head(), labels=torch.arange(500))
    half = replace(full, labels=full.labels.where(torch.arange(500) % 2 == 0, IGNORE))
    full_flops, half_flops = (costs(step(head, schedule)[0]).flops for head in (full, half))
    assert half_flops == full_flops / 2


@on_cpu
def test_the_plan_counts_held_entries_in_the_dtype_they_are_held_in(tiles, monkeypatch):
    monkeypatch.setattr(dtypes, "native_bf16", lambda *_: False)
    held = {}
    for dtype in (torch.float32, torch.bfloat16):
        _, _, plan = step(a_head(dtype), "list_hold")
        _, _, without = step(a_head(dtype), "recompute")
        held[dtype] = plan.extra_bytes - without.extra_bytes
    t, rows = tile_shapes.tile_shape(WALKED, HIDDEN, VOCABULARY, torch.float32, torch.device("cpu"))
    assert held[torch.float32] == (WALKED * VOCABULARY - t * rows) * 4  # formed where it stays: no tile beside it
    assert held[torch.bfloat16] == WALKED * VOCABULARY * 2


def test_free_memory_is_a_number_of_bytes(device):
    assert 1 << 20 < memory.free_bytes(torch.device(device)) < 1 << 45

"""What test_parallel.py runs on three gloo ranks: each compares what ranks make of their parts with the whole."""

import itertools
import math
import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import larpo_kernels as lk
from larpo_kernels import parallel, validation
from larpo_kernels.linear import dtypes, flat, schedules, tile_shapes, walk
from tests.helpers import linear_heads, slow_loop
from tests.helpers.batches import IGNORE, leaf, make_batch
from tests.helpers.regimes import REGIMES
from tests.helpers.tolerance import assert_no_worse_than_eager, gradient_eps

V = 31
UNEVEN = (5, 1, 25)  # rows of each rank


def shard_of(rank, rows=UNEVEN):
    return parallel.VocabShard.of(rows[rank])


def own(shard, x, dim=0):
    return None if x is None else x.narrow(dim, shard.start, shard.rows)


def summed(grads, names=("weight", "bias")):
    """Gradients of the whole head from those of its rows: each rank's are 0 in the others'."""
    for name in names:
        if name in grads:
            dist.all_reduce(grads[name])
    return grads


def sharded(head, shard, **options):
    return lambda hidden, weight, bias: parallel.linear_token_logps(
        hidden, own(shard, weight), head.labels, shard=shard, bias=own(shard, bias), **options
    )


def small_tiles(tokens=7, rows=4):
    """Tiles that end in the middle of everything."""

    def tile_shape(num_tokens, hidden_size, vocab_size, dtype, device, **use):
        return max(1, min(num_tokens, tokens)), min(vocab_size, rows)

    tile_shapes.tile_shape = tile_shape


def assert_like_one_device(head, shard, wanted=linear_heads.ALL, *, exact=1e-13, **options):
    """float64: the same numbers as one device to rounding, for an upstream gradient of its own per token."""
    head = head.double()
    wanted = tuple(x for x in wanted if x in head.given)
    semantic = {k: v for k, v in options.items() if k != "schedule"}
    expected, expected_grads = linear_heads.run(linear_heads.ours(head, "torch", **semantic), head, wanted)
    logps, grads = linear_heads.run(sharded(head, shard, **options), head, wanted)
    summed(grads)
    torch.testing.assert_close(logps, expected, rtol=exact, atol=exact)
    for name in wanted:
        size = max([1.0, *expected_grads[name].abs().flatten().tolist()])
        torch.testing.assert_close(grads[name], expected_grads[name], rtol=exact, atol=exact * size, msg=name)


def check_every_schedule_gives_the_numbers_of_one_device(rank, ranks):
    shard = shard_of(rank)
    head = linear_heads.make_head(V, 31, (12,), bias=True)
    for name in ("score_only", "frozen_head", "list_hold", "recompute"):
        wanted = linear_heads.SCHEDULES[name][0]
        assert_like_one_device(head, shard, wanted, schedule=name)
    small_tiles()
    for name, soft in itertools.product(("frozen_head", "list_hold", "recompute"), ({}, {"softcap": 2.0, "logit_scale": -0.7})):
        wanted = linear_heads.SCHEDULES[name][0]
        assert_like_one_device(head, shard, wanted, schedule=name, **soft)
    for wanted in (("weight",), ("hidden", "bias"), ("bias",)):
        assert_like_one_device(head, shard, wanted, schedule="recompute")


def check_every_regime_is_as_close_to_float64_as_eager(rank, ranks):
    shard = shard_of(rank)
    for regime, schedule in itertools.product(REGIMES, ("frozen_head", "list_hold", "recompute")):
        wanted = ("hidden",) if schedule == "frozen_head" else ("hidden", "weight")
        head = linear_heads.make_head(V, 31, (12,), regime=regime)
        run = linear_heads.run(sharded(head, shard, schedule=schedule), head, wanted)
        compare(head, *run, wanted, f"{regime} {schedule}")


def check_a_tail_is_told_apart_by_the_sums_of_all_ranks(rank, ranks):
    """As on one device, whose tiles are those of the ranks: the same rows count, the same rest is merged."""
    schedules.TAIL_HEAD = schedules.FLAT_TOKENS = 0
    shard = shard_of(rank)
    logits = torch.randn(12, V, generator=torch.Generator().manual_seed(1)).double() * 3
    logits[:, ::5] += 6
    head = linear_heads.make_head(V, 31, labels=logits.softmax(-1).argmax(-1), logits=logits, dtype=torch.float64)
    p = logits.softmax(-1)
    for schedule in ("frozen_head", "list_hold", "recompute"):
        wanted = ("hidden",) if schedule == "frozen_head" else ("hidden", "weight")
        options = dict(schedule=schedule, tail_threshold=0.01)
        _, grads = linear_heads.run(sharded(head, shard, **options), head, wanted)
        _, exact = linear_heads.run(linear_heads.ours(head, "torch", schedule=schedule), head, wanted)
        summed(grads)
        rest = torch.where(p > 0.01, 0, p).sum(1)
        off = (grads["hidden"] - exact["hidden"]).norm(dim=1)
        assert (off <= 2 * rest * head.upstream.abs() * head.weight.norm(dim=1).max() + 1e-12).all()
        assert (off > 1e-9).any(), "nothing was merged"
        if "weight" in wanted:
            kept = grads["weight"].abs().sum(1) > 0
            assert not kept.all() and kept[(p > 0.01).any(0)].all()
            lost = torch.where(p > 0.01, 0, p) * (head.upstream.abs() * head.hidden.norm(dim=1))[:, None]
            assert ((grads["weight"] - exact["weight"]).norm(dim=1) <= lost.sum(0) + 1e-12).all()


def check_logits_are_flat_for_all_ranks_or_for_none(rank, ranks):
    """Together most of the probability lies below the threshold; no rank's rows have most of it."""
    shard = shard_of(rank, (10, 10, 11))
    whole = linear_heads.make_head(V, 31, labels=torch.arange(schedules.FEW_TOKENS))
    head = walk.Head(own(shard, whole.weight), None, 1.0, None, torch.float32, shard.name)
    for threshold, expected in ((0.2, True), (1e-4, False)):
        labels = shard.local_labels(whole.labels, None)
        assert flat.mostly_below(head, whole.hidden, labels, threshold, "torch") == expected


def compare(head, logps, grads, wanted, label, op_options=None):
    op_options = op_options or {}
    summed(grads)
    eager_logps, eager_grads = linear_heads.run(linear_heads.eager(head, **op_options), head, wanted)
    true_logps, true_grads = linear_heads.run(linear_heads.true(head, **op_options), head.double(), wanted)
    assert (logps <= 0).all() and (logps[head.labels == IGNORE] == 0).all(), label
    of_a_logit = (
        2 * linear_heads.largest_logit(head) * linear_heads.FLOAT32_ROUNDING
    )  # two GEMMs of other shapes differ by that
    slack = 16 * linear_heads.FLOAT32_ROUNDING + of_a_logit / true_logps.abs().max().item()
    assert_no_worse_than_eager(logps, eager_logps, true_logps, slack)
    eps = max(gradient_eps(logps), of_a_logit)
    for name in wanted:
        times = linear_heads.rounding_allowance(head.hidden.dtype)
        linear_heads.assert_within(times, grads[name], eager_grads[name], true_grads[name], eps, f"{name}, {label}")


def check_bfloat16_is_as_close_to_float64_as_eager(rank, ranks):
    """With bf16 tiles too, where the machine's own choice would be float32."""
    shard = shard_of(rank, (100, 27, 400))
    for native, schedule in itertools.product((True, False), ("list_hold", "recompute")):
        dtypes.native_bf16 = lambda *_, native=native: native
        head = linear_heads.make_head(527, 31, (12,), dtype=torch.bfloat16, regime="initialisation")
        logps, grads = linear_heads.run(sharded(head, shard, schedule=schedule), head, ("hidden", "weight"))
        for name in ("weight",):  # sums of zeros and one bf16 number are exact
            assert grads[name].dtype == torch.bfloat16
        compare(head, logps, grads, ("hidden", "weight"), f"native {native} {schedule}")


def check_a_target_far_below_another_ranks_largest_logit(rank, ranks):
    """Only the rank of the largest logit raises k: the others must come up to it, whatever they hold."""
    logits = torch.randn(9, V, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    labels = torch.tensor([0, 4, 5, 6, 30, 2, 7, 1, IGNORE])
    logits[0, 20] += 400  # of the last rank, target with the first
    logits[1, 5] += 150  # of the rank with one row
    logits[2, 3] += 90
    logits[3, 3] += 90
    logits[3, 12] += 300  # two ranks raise it, by different amounts
    logits[4, 0] += 1000
    head = linear_heads.make_head(V, 31, labels=labels, logits=logits)
    shard = shard_of(rank)
    for schedule in ("frozen_head", "list_hold", "recompute"):
        wanted = ("hidden",) if schedule == "frozen_head" else ("hidden", "weight")
        run = linear_heads.run(sharded(head, shard, schedule=schedule), head, wanted)
        assert run[0].min() < -900
        compare(head, *run, wanted, schedule)
        assert_like_one_device(head, shard, wanted, schedule=schedule, exact=1e-10)


def check_a_target_at_minus_infinity_has_no_gradient(rank, ranks):
    head = linear_heads.make_head(V, 31, (6,), labels=torch.tensor([3, 5, 20, 3, IGNORE, 8]), bias=True)
    bias = head.bias.clone()
    bias[[3, 5]] = -math.inf
    head = linear_heads.replace(head, bias=bias)
    shard = shard_of(rank)
    for schedule in ("list_hold", "recompute"):
        logps, grads = linear_heads.run(sharded(head, shard, schedule=schedule), head, ("hidden", "weight"))
        assert logps.isneginf().tolist() == [True, True, False, True, False, False]
        assert (grads["hidden"][[0, 1, 3, 4]] == 0).all() and grads["hidden"].isfinite().all()
        assert grads["weight"].isfinite().all()
    logits = F.linear(head.hidden, head.weight, bias)
    mine = leaf(own(shard, logits, -1))
    logps = parallel.token_logps(mine, head.labels, shard=shard)
    assert logps.isneginf().tolist() == [True, True, False, True, False, False]
    logps.where(logps.isfinite(), 0).sum().backward()
    assert (mine.grad[[0, 1, 3, 4]] == 0).all() and mine.grad.isfinite().all()


def check_ranks_without_a_target_and_without_tokens(rank, ranks):
    shard = shard_of(rank)
    for labels in (
        torch.full((4,), 30),
        torch.full((4,), IGNORE),
        torch.zeros(0, dtype=torch.int64),
        torch.tensor([0, IGNORE]),
    ):
        head = linear_heads.make_head(V, 31, labels=labels)
        assert_like_one_device(head, shard, schedule="recompute")
        logits = F.linear(head.hidden, head.weight).double()
        mine = leaf(own(shard, logits, -1))
        logps = parallel.token_logps(mine, labels, shard=shard)
        torch.testing.assert_close(logps, lk.token_logps(logits, labels))
        logps.sum().backward()
        assert mine.grad.isfinite().all()


def check_another_ignore_index_and_what_is_ignored_is_never_read(rank, ranks):
    """An ignore_index that is a row of some rank, and NaN in the ignored hidden states and logits."""
    head = linear_heads.make_head(V, 31, labels=torch.tensor([7, 3, 7, 29, 5]))
    hidden = head.hidden.clone()
    logits = F.linear(hidden, head.weight)
    hidden[[0, 2]] = math.nan
    shard = shard_of(rank)
    expected = slow_loop.token_logps(logits.double(), head.labels, ignore_index=7)
    found = parallel.linear_token_logps(hidden, own(shard, head.weight), head.labels, shard=shard, ignore_index=7)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    logits[[0, 2]] = math.nan
    mine = leaf(own(shard, logits, -1))
    found = parallel.token_logps(mine, head.labels, shard=shard, ignore_index=7)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    found.sum().backward()
    assert (mine.grad[[0, 2]] == 0).all() and mine.grad[[1, 3, 4]].isfinite().all()


def run_logits(head, shard, dtype, **options):
    """-> logps, gradient of the whole logits, the logits."""
    logits = F.linear(head.hidden.double(), head.weight.double(), None if head.bias is None else head.bias.double()).to(dtype)
    return *logps_and_gradient(logits, head.labels, shard, head.upstream, **options), logits


def logps_and_gradient(logits, labels, shard, upstream, **options):
    """From this rank's columns of whole logits; the gradient is whole too."""
    mine = leaf(own(shard, logits, -1))
    logps = parallel.token_logps(mine, labels, shard=shard, **options)
    logps.backward(upstream.to(logps.dtype))
    whole = torch.zeros_like(logits)
    own(shard, whole, -1).copy_(mine.grad)
    dist.all_reduce(whole)
    return logps.detach(), whole


def check_logits_cut_over_ranks(rank, ranks):
    shard = shard_of(rank)
    soft = {"softcap": 3.0, "logit_scale": -0.8}
    for regime, dtype in itertools.product(REGIMES, (torch.float64, torch.float32, torch.bfloat16)):
        for options in ({}, soft) if regime == "initialisation" else ({},):
            head = linear_heads.make_head(V, 31, (3, 4), regime=regime)
            logps, grad, logits = run_logits(head, shard, dtype, **options)
            assert (logps <= 0).all() and logps.shape == head.labels.shape, regime
            results = []
            for x, compute in ((logits, torch.float32), (logits.double(), torch.float64)):
                x = leaf(x)
                out = slow_loop.token_logps(x, head.labels, compute=compute, **options)
                out.backward(head.upstream.to(out.dtype))
                results.append((out.detach(), x.grad))
            (eager, eager_grad), (true, true_grad) = results
            if dtype == torch.float64:
                torch.testing.assert_close(logps, true, rtol=1e-12, atol=1e-14)  # near 0 the loop rounds more than we do
                torch.testing.assert_close(grad, true_grad, rtol=1e-9, atol=1e-12)
            assert_no_worse_than_eager(logps, eager, true)
            linear_heads.assert_within(1, grad, eager_grad, true_grad, gradient_eps(logps), f"{regime} {dtype}")


def check_logits_cut_over_ranks_whose_targets_a_mask_has_pushed_down(rank, ranks):
    """The gradient of the others is their probability; the rule of check_logits_cut_over_ranks allows what l rounds to."""
    shard = shard_of(rank)
    labels = torch.randint(V, (12,), generator=torch.Generator().manual_seed(2))
    for mask in (-70.0, -1e4, -1e9):
        logits = torch.randn(12, V, generator=torch.Generator().manual_seed(1))
        logits[torch.arange(12), labels] = mask
        logits[:, : UNEVEN[0]] -= 100  # a rank whose logits are all far below
        upstream = torch.randn(12, generator=torch.Generator().manual_seed(3))
        _, whole = logps_and_gradient(logits, labels, shard, upstream)
        expected = leaf(logits.double())
        slow_loop.token_logps(expected, labels).backward(upstream.double())
        torch.testing.assert_close(whole.double(), expected.grad, rtol=1e-4, atol=1e-6)


def check_triton_kernels_give_the_numbers_of_the_torch_backend(rank, ranks):
    try:
        import triton  # noqa: F401
    except ImportError:
        return
    shard = shard_of(rank)
    for regime in ("initialisation", "unlikely"):
        head = linear_heads.make_head(V, 31, (5,), regime=regime)
        results = []
        for backend in ("torch", "triton"):
            logps, grads = linear_heads.run(
                sharded(head, shard, schedule="list_hold", backend=backend), head, ("hidden", "weight")
            )
            from_logits, grad, _ = run_logits(head, shard, torch.float32, backend=backend)
            results.append((logps, *summed(grads).values(), from_logits, grad))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(b, a, rtol=2e-4, atol=2e-5)


def check_a_dtensor_head_knows_its_rows(rank, ranks):
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (ranks,))
    head = linear_heads.make_head(V, 31, (6,), bias=True).double()
    weight, bias = (distribute_tensor(x, mesh, [Shard(0)]).requires_grad_() for x in (head.weight, head.bias))
    expected, grads = linear_heads.run(linear_heads.ours(head, "torch"), head, linear_heads.ALL)
    hidden = leaf(head.hidden)
    logps = parallel.linear_token_logps(hidden, weight, head.labels, bias=bias)
    torch.testing.assert_close(logps, expected)
    logps.backward(head.upstream)
    torch.testing.assert_close(hidden.grad, grads["hidden"])
    for name, x in (("weight", weight), ("bias", bias)):
        assert isinstance(x.grad, DTensor)
        torch.testing.assert_close(x.grad.full_tensor(), grads[name])
    whole = distribute_tensor(head.weight, mesh, [Replicate()])
    for wrong, kind, message in (
        (dict(weight=whole), ValueError, "Shard"),
        (dict(weight=weight, shard=shard_of(rank)), ValueError, "leave shard out"),
        (dict(weight=head.weight), TypeError, "VocabShard"),
        (dict(weight=head.weight, shard=shard_of(rank)), ValueError, "rows of its shard"),
    ):
        with pytest.raises(kind, match=message):
            parallel.linear_token_logps(hidden, labels=head.labels, **wrong)


def check_what_only_one_device_can_do_is_refused(rank, ranks):
    shard, head = shard_of(rank), linear_heads.make_head(V, 31, (3,))
    rows, columns = (head.hidden, own(shard, head.weight)), (torch.zeros(3, shard.rows),)
    for function, given, option in (
        (parallel.linear_token_logps, rows, "return_stats"),
        (parallel.token_logps, columns, "return_stats"),
        (parallel.token_logps, columns, "inplace_backward"),
        (parallel.token_logps, columns, "schedule"),
    ):
        with pytest.raises(TypeError, match=option):
            function(*given, head.labels, shard=shard, **{option: True})


def check_shards_are_cut_as_torch_cuts_them(rank, ranks):
    for size in (5, 7, 31, 9):
        chunk = torch.arange(size).chunk(ranks)[rank]
        shard = parallel.VocabShard.even(size)
        assert (shard.start, shard.rows, shard.size) == (int(chunk[0]), len(chunk), size)
    shard = shard_of(rank)
    assert (shard.start, shard.rows, shard.size) == ((0, 5, 6)[rank], UNEVEN[rank], V)
    for bad in (lambda: parallel.VocabShard.even(4), lambda: parallel.VocabShard.of(rank)):
        with pytest.raises(ValueError, match="row"):
            bad()


def check_labels_are_those_of_the_whole_vocabulary(rank, ranks):
    shard = shard_of(rank)
    head = linear_heads.make_head(V, 31, (3,), labels=torch.tensor([0, V - 1, V]))
    for call in (
        lambda: parallel.linear_token_logps(head.hidden, own(shard, head.weight), head.labels, shard=shard),
        lambda: parallel.token_logps(torch.zeros(3, shard.rows), head.labels, shard=shard),
    ):
        with pytest.raises(ValueError, match=re.escape(f"[0, {V})")):
            call()


def check_a_label_that_nobody_could_refuse_gives_no_number_and_no_gradient_either(rank, ranks):
    """As on one GPU: a step that clips or skips by the norm of its gradients must not go on without that token."""
    labels = torch.tensor([0, V - 1, V, IGNORE])
    shard, head = shard_of(rank), linear_heads.make_head(V, 31, (4,), labels=labels)
    readable, validation.readable = validation.readable, lambda x: False
    try:
        for wanted, ignore_index in itertools.product((("hidden",), ("hidden", "weight")), (IGNORE, None)):
            logps, grads = linear_heads.run(sharded(head, shard, ignore_index=ignore_index), head, wanted)
            wrong = [False, False, True, ignore_index is None]
            assert logps.isnan().tolist() == wrong
            assert grads["hidden"].isnan().all(1).tolist() == wrong, (wanted, ignore_index)
            assert "weight" not in wanted or grads["weight"].isnan().any()
        logits = leaf(torch.zeros(4, shard.rows))
        parallel.token_logps(logits, labels, shard=shard).sum().backward()
        assert logits.grad.isnan().all(1).tolist() == [False, False, True, False]
    finally:
        validation.readable = readable


def check_listwise_losses_over_a_cut_vocabulary(rank, ranks):
    batch = make_batch(vocabulary=V)
    shard = shard_of(rank)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(*batch.labels.shape, 31, dtype=torch.float64, generator=generator)
    weight = torch.randn(V, 31, dtype=torch.float64, generator=generator) / 4
    for objective, normalized in itertools.product(("contrastive", "listmle", "lambdarank", "pairwise"), (False, True)):
        options = dict(
            objective=objective, length_normalized=normalized, ref_logps=batch.ref_logps, list_sizes=list(batch.list_sizes)
        )
        h, w = leaf(hidden), leaf(weight)
        expected = lk.fused_linear_listwise_loss(h, w, batch.labels, batch.relevance, **options)
        expected.loss.backward()
        h2, mine = leaf(hidden), leaf(own(shard, weight))
        out = parallel.fused_linear_listwise_loss(h2, mine, batch.labels, batch.relevance, shard=shard, **options)
        out.loss.backward()
        torch.testing.assert_close(tuple(out[:3]), tuple(expected[:3]))
        torch.testing.assert_close(h2.grad, h.grad)
        torch.testing.assert_close(mine.grad, own(shard, w.grad))
        logits = leaf(own(shard, F.linear(hidden, weight), -1))
        out = parallel.fused_listwise_loss(logits, batch.labels, batch.relevance, shard=shard, **options)
        torch.testing.assert_close(tuple(out[:3]), tuple(expected[:3]))
        out.loss.backward()
        torch.testing.assert_close(logits.grad @ own(shard, weight), partial(logits.grad, own(shard, weight), h.grad))
        torch.testing.assert_close(
            parallel.linear_sequence_logps(hidden, own(shard, weight), batch.labels, shard=shard, length_normalized=normalized),
            parallel.sequence_logps(logits.detach(), batch.labels, shard=shard, length_normalized=normalized),
        )


def partial(grad, weight, whole):
    """This rank's part of d hidden, given that all parts make up `whole`."""
    parts = grad @ weight
    total = parts.clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, whole)
    return parts


def model_logps(theta, x):
    """[S] from [S, D]: stands for a model with parameters theta."""
    return -(x @ theta).square() - 0.1


def check_a_list_over_ranks(rank, ranks):
    """Candidates of a prompt on different ranks, 0 to 4 of them: gradients sum up to those of the whole list."""
    for counts in ((4, 1, 2), (3, 0, 2), (2, 2, 2)):
        generator = torch.Generator().manual_seed(7)
        n = sum(counts)
        x, theta = (torch.randn(*size, dtype=torch.float64, generator=generator) for size in ((n, 3), (3,)))
        relevance, ref = (torch.randn(n, dtype=torch.float64, generator=generator) for _ in range(2))
        at = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        sizes = [n - 2, 2]  # the second list may start on any rank
        for objective in ("contrastive", "listmle", "lambdarank"):
            options = dict(list_sizes=sizes, objective=objective)
            whole = leaf(theta)
            expected = lk.listwise_loss(0.3 * (model_logps(whole, x) - ref), relevance, **options)
            (3 * expected).backward()
            mine = leaf(theta)
            scores = 0.3 * (parallel.gather_logps(model_logps(mine, x[at])) - parallel.gather_logps(ref[at]))
            loss = lk.listwise_loss(scores, parallel.gather_logps(relevance[at]), **options)
            torch.testing.assert_close(loss, expected)
            (3 * loss).backward()
            dist.all_reduce(mine.grad)
            torch.testing.assert_close(mine.grad, whole.grad)


def check_a_candidate_over_ranks(rank, ranks):
    """Each rank has some tokens of every candidate: sums of log-probs, and their gradient, are those of all tokens."""
    batch = make_batch(vocabulary=V)
    logits = batch.logits.double()
    t = logits.shape[1]
    cut = (0, t // 2, t - 1, t)  # unequal parts
    mine = slice(cut[rank], cut[rank + 1])
    whole, part = leaf(logits), leaf(logits[:, mine])
    for normalized in (False, True):
        expected = lk.sequence_logps(whole, batch.labels, length_normalized=normalized)
        found = parallel.sum_logps(lk.sequence_logps(part, batch.labels[:, mine]))
        if normalized:
            count = parallel.sum_logps((batch.labels[:, mine] != IGNORE).sum(1).double())
            found = found / count.clamp(min=1)
        torch.testing.assert_close(found, expected)
        losses = [lk.listwise_loss(x, batch.relevance, list_sizes=list(batch.list_sizes)) for x in (expected, found)]
        whole.grad = part.grad = None
        for loss in losses:
            (5 * loss).backward()
        torch.testing.assert_close(part.grad, whole.grad[:, mine])


def check_under_ddp_the_loss_is_multiplied_by_the_ranks(rank, ranks):
    """The convention of the docstring, with a real DistributedDataParallel."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6, 4, dtype=torch.float64, generator=generator)
    relevance = torch.randn(6, dtype=torch.float64, generator=generator)
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1, dtype=torch.float64)
    expected = torch.autograd.grad(
        lk.listwise_loss(model(x)[:, 0].tanh(), relevance, list_sizes=6, objective="listmle"), [model.weight]
    )[0]
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    at = slice(2 * rank, 2 * rank + 2)
    loss = lk.listwise_loss(parallel.gather_logps(ddp(x[at])[:, 0].tanh()), relevance, list_sizes=6, objective="listmle")
    (loss * ranks).backward()
    torch.testing.assert_close(model.weight.grad, expected)


def check_a_smaller_group_than_all_ranks(rank, ranks):
    """Ranks 0 and 2 share a head; rank 1 has no part in it."""
    group = dist.new_group([0, 2])
    if rank == 1:
        return
    shard = parallel.VocabShard.of({0: 10, 2: 21}[rank], group)
    assert shard.start == {0: 0, 2: 10}[rank]
    head = linear_heads.make_head(V, 31, (6,)).double()
    expected, grads = linear_heads.run(linear_heads.ours(head, "torch"), head, ("hidden", "weight"))
    logps, found = linear_heads.run(sharded(head, shard), head, ("hidden", "weight"))
    torch.testing.assert_close(logps, expected)
    torch.testing.assert_close(found["hidden"], grads["hidden"])
    torch.testing.assert_close(own(shard, found["weight"]), own(shard, grads["weight"]))
    gathered = parallel.gather_logps(torch.tensor([float(rank)] * (rank + 1)), group)
    assert gathered.tolist() == [0.0, 2.0, 2.0, 2.0]

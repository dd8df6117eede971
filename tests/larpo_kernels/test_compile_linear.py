"""torch.compile(fullgraph=True) gives the linear ops' eager numbers; their registered ops keep torch.library's promises."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_map

import larpo_kernels as lk
from tests.helpers.batches import IGNORE, leaf, make_batch
from tests.helpers.linear_heads import ALL, make_head, run
from tests.larpo_kernels.test_compile import Recorder


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def token_logps(head, batch, backend):
    return lambda hidden, weight, bias: lk.linear_token_logps(
        hidden, weight, head.labels, bias=bias, softcap=5.0, backend=backend
    )


def sequence_logps(head, batch, backend):
    return lambda hidden, weight, bias: lk.linear_sequence_logps(
        hidden, weight, head.labels, bias=bias, cu_seqlens=batch.cu_seqlens, length_normalized=True, backend=backend
    )


def listwise_loss(head, batch, backend):
    return lambda hidden, weight, bias: (
        lk.fused_linear_listwise_loss(
            hidden,
            weight,
            head.labels,
            batch.relevance,
            **batch.layout,
            bias=bias,
            objective="listmle",
            ref_logps=batch.ref_logps,
            reduction="none",
            return_stats=True,
            backend=backend,
        ).loss
    )


OPS = [token_logps, sequence_logps, listwise_loss]


def head_and_batch(device, packed):
    """NaN in the rows that must not be read."""
    batch = make_batch((2, 1), device=device)
    batch = batch.packed() if packed else batch
    head = make_head(31, 8, device=device, bias=True, labels=batch.labels.cpu())
    return replace(head, hidden=head.hidden.masked_fill((head.labels == IGNORE)[..., None], math.nan)), batch


def assert_compiled_is_eager(op, head, batch, wanted, backend, compiler):
    function = op(head, batch, backend)
    with torch.no_grad():
        size = function(head.hidden, head.weight, head.bias).shape
    upstream = torch.linspace(-1, 2, size.numel(), device=head.hidden.device).view(size)
    eager, eager_grads = run(function, head, wanted, upstream)
    compiled, grads = run(torch.compile(function, fullgraph=True, backend=compiler), head, wanted, upstream)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
    for name in wanted:
        torch.testing.assert_close(grads[name], eager_grads[name], rtol=1e-4, atol=1e-6)
    if "hidden" in wanted:
        assert (grads["hidden"][head.labels == IGNORE] == 0).all()


@pytest.mark.parametrize(
    ("wanted", "packed"),
    [(ALL, False), (ALL, True), (("hidden",), False), ((), True)],
    ids=["padded", "packed", "frozen", "scoring"],
)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_one_graph_gives_eagers_numbers(device, op, wanted, packed):
    assert_compiled_is_eager(op, *head_and_batch(device, packed), wanted, None, "aot_eager")


def test_one_graph_gives_eagers_numbers_on_each_backend(backend, device):
    assert_compiled_is_eager(listwise_loss, *head_and_batch(device, False), ALL, backend, "aot_eager")


def test_bfloat16_in_one_graph(device):
    """Which dtype to compute in is asked of the processor."""
    head, _ = head_and_batch(device, False)
    head = replace(head, **{name: getattr(head, name).bfloat16() for name in ALL})

    def function(hidden, weight, bias):
        return lk.linear_token_logps(hidden, weight, head.labels, bias=bias)

    compiled, _ = run(torch.compile(function, fullgraph=True, backend="aot_eager"), head, ALL)
    torch.testing.assert_close(compiled, run(function, head, ALL)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["beta", "logit_scale", "softcap"])
def test_an_option_that_changes_from_step_to_step(device, name):
    """The second value of a number is traced as a symbol."""
    head, batch = head_and_batch(device, False)

    def loss(hidden, value):
        return lk.fused_linear_listwise_loss(
            hidden, head.weight, head.labels, batch.relevance, **batch.layout, **{name: value}
        ).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for value in (0.5, 0.7, 0.9):
        torch.testing.assert_close(compiled(head.hidden, value), loss(head.hidden, value), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", ["list_hold", "recompute"])
def test_a_schedule_of_ones_own_in_one_graph(device, schedule):
    head, _ = head_and_batch(device, False)

    def function(hidden, weight, bias):
        return lk.linear_token_logps(hidden, weight, head.labels, bias=bias, schedule=schedule)

    eager, eager_grads = run(function, head, ALL)
    compiled, grads = run(torch.compile(function, fullgraph=True, backend="aot_eager"), head, ALL)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
    for name in ALL:
        torch.testing.assert_close(grads[name], eager_grads[name], rtol=1e-4, atol=1e-6)


def test_a_model_with_tied_weights_in_one_graph(device):
    head, batch = head_and_batch(device, False)
    tokens = head.labels.clamp(min=0)
    layer = torch.nn.Linear(8, 8, device=device)

    def train(weight):
        hidden = torch.tanh(layer(torch.nn.functional.embedding(tokens, weight)))
        return lk.fused_linear_listwise_loss(hidden, weight, head.labels, batch.relevance, **batch.layout).loss

    x = leaf(head.weight)
    (expected,) = torch.autograd.grad(train(x), x)
    (grad,) = torch.autograd.grad(torch.compile(train, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_no_recompilation_for_another_length_or_another_mask(device, op):
    """The first length compiles, the second makes it dynamic, no other compiles again; nor does what is ignored."""
    counter = CompileCounterWithBackend("aot_eager")
    widths = ((4, 1), (5, 0), (6, 2), (9, 3), (13, 1))  # and prompts
    batches = [make_batch((3, 3), (width,) * 6, device=device, padding=0, prompt=prompt) for width, prompt in widths]

    @torch.compile(fullgraph=True, backend=counter)
    def function(hidden, weight, labels, relevance, ref_logps):
        batch = replace(batches[0], labels=labels, relevance=relevance, ref_logps=ref_logps, list_sizes=(3, 3))
        head = replace(like, labels=labels)
        return op(head, batch, None)(hidden, weight, None)

    like = make_head(31, 8, device=device)
    frames = []
    for batch in batches:
        head = make_head(31, 8, device=device, labels=batch.labels.cpu())
        out = function(leaf(head.hidden), leaf(head.weight), batch.labels, batch.relevance, batch.ref_logps)
        out.sum().backward()
        frames.append(counter.frame_count)
    assert frames[0] == 1 and frames[1] <= 2 and set(frames[1:]) == {frames[1]}


# ---- torch.library


def plain(labels):
    return lambda hidden, weight, bias: lk.linear_token_logps(hidden, weight, labels, schedule="recompute", backend="torch")


@pytest.fixture(scope="module")
def recorded():
    """Every call of a linear op that steps of each schedule make."""
    with Recorder() as recorder:
        for dtype in (torch.float32, torch.bfloat16):
            head = make_head(31, 8, (2, 3), dtype, bias=True)
            for wanted, schedule in ((), "score_only"), (("hidden",), "frozen_head"), (ALL, "list_hold"), (ALL, "recompute"):
                stats = schedule == "recompute"

                def function(hidden, weight, bias, head=head, schedule=schedule, stats=stats):
                    out = lk.linear_token_logps(
                        hidden, weight, head.labels, bias=bias, schedule=schedule, return_stats=stats, backend="torch"
                    )
                    return out.logps if stats else out

                run(function, head, wanted)
            run(plain(head.labels), head, ("weight",))
            run(plain(torch.full_like(head.labels, IGNORE)), head, ("hidden", "weight"))
    return recorder.calls


@pytest.mark.parametrize("name", ["linear_logps", "linear_logps_backward"])
def test_registered_ops_are_opcheck_clean(recorded, name):
    op = getattr(torch.ops.larpo_kernels, name).default
    assert len(recorded[op]) >= 8
    seen = set()
    for args, kwargs in recorded[op]:
        shapes = str(tree_map(lambda x: (x.shape, x.dtype, x.requires_grad) if isinstance(x, torch.Tensor) else x, args))
        if shapes not in seen:
            seen.add(shapes)
            torch.library.opcheck(op, args, kwargs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU walks small heads too")
def test_the_ops_of_small_heads_are_opcheck_clean():
    with Recorder() as recorder:
        for dtype, wanted in ((torch.float32, ALL), (torch.bfloat16, ("hidden",)), (torch.float64, ())):
            head = make_head(31, 8, (2, 3), dtype, bias=True)
            head.labels[0, 1] = IGNORE
            run(partial(lk.linear_token_logps, labels=head.labels), head, wanted)
    ops = torch.ops.larpo_kernels
    assert recorder.calls.keys() == {ops.small_linear_logps.default, ops.small_linear_logps_backward.default}
    for op, calls in recorder.calls.items():
        for args, kwargs in calls:
            torch.library.opcheck(op, args, kwargs)


@pytest.mark.parametrize("name", ["linear_logps", "linear_logps_backward"])
def test_opcheck_with_all_tokens_walked(name):
    """As in a compiled graph, where shapes may not depend on labels: token_indices is None."""
    ops = torch.ops.larpo_kernels

    head = make_head(31, 8, (6,), bias=True)
    x = {key: leaf(getattr(head, key)) for key in ALL}
    options = (IGNORE, 1.0, None, torch.float32)
    forward = (*x.values(), head.labels, None, False, *options, torch.float32, 31, False, True, "torch")
    if name == "linear_logps":
        torch.library.opcheck(ops.linear_logps, forward)
        return
    logps, _, _, *kept = (tensor.detach() for tensor in ops.linear_logps(*forward))
    given = [tensor.detach() for tensor in x.values()]
    backward = (head.upstream.float(), *given, head.labels, None, logps, *kept, False, *options, True, True, True, "torch")
    torch.library.opcheck(ops.linear_logps_backward, backward)

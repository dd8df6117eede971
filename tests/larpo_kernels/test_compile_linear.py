"""torch.compile(fullgraph=True) gives the linear ops' eager numbers; their registered ops keep torch.library's promises."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import larpo_kernels as lk
from tests.helpers.batches import IGNORE, leaf, make_batch
from tests.helpers.linear_heads import ALL, make_head, run
from tests.helpers.recorded_ops import Recorder, opcheck

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def token_logps(head, batch, backend, **options):
    options = {"softcap": 5.0, "backend": backend, **options}
    return lambda hidden, weight, bias: lk.linear_token_logps(hidden, weight, head.labels, bias=bias, **options)


def sequence_logps(head, batch, backend):
    options = dict(cu_seqlens=batch.cu_seqlens, length_normalized=True, backend=backend)
    return lambda hidden, weight, bias: lk.linear_sequence_logps(hidden, weight, head.labels, bias=bias, **options)


def listwise_loss(head, batch, backend):
    options = dict(objective="listmle", ref_logps=batch.ref_logps, reduction="none", return_stats=True, backend=backend)
    given = dict(labels=head.labels, relevance=batch.relevance, **batch.layout, **options)
    return lambda hidden, weight, bias: lk.fused_linear_listwise_loss(hidden, weight, bias=bias, **given).loss


OPS = [token_logps, sequence_logps, listwise_loss]


def head_and_batch(device, packed):
    """NaN in the rows that must not be read."""
    batch = make_batch((2, 1), device=device)
    batch = batch.packed() if packed else batch
    head = make_head(31, 8, device=device, bias=True, labels=batch.labels.cpu())
    return replace(head, hidden=head.hidden.masked_fill((head.labels == IGNORE)[..., None], math.nan)), batch


def assert_compiled_is_eager(op, head, batch, wanted, backend=None):
    function = op(head, batch, backend)
    with torch.no_grad():
        size = function(head.hidden, head.weight, head.bias).shape
    upstream = torch.linspace(-1, 2, size.numel(), device=head.hidden.device).view(size)
    eager, eager_grads = run(function, head, wanted, upstream)
    compiled, grads = run(torch.compile(function, fullgraph=True, backend="aot_eager"), head, wanted, upstream)
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
    assert_compiled_is_eager(op, *head_and_batch(device, packed), wanted)


def test_one_graph_gives_eagers_numbers_on_each_backend(backend, device):
    assert_compiled_is_eager(listwise_loss, *head_and_batch(device, False), ALL, backend)


def test_bfloat16_in_one_graph(device):
    """Which dtype to compute in is asked of the processor."""
    head, _ = head_and_batch(device, False)
    head = replace(head, **{name: getattr(head, name).bfloat16() for name in ALL})

    def function(hidden, weight, bias):
        return lk.linear_token_logps(hidden, weight, head.labels, bias=bias)

    compiled, _ = run(torch.compile(function, fullgraph=True, backend="aot_eager"), head, ALL)
    torch.testing.assert_close(compiled, run(function, head, ALL)[0], rtol=1e-5, atol=1e-6)


def test_options_that_change_from_step_to_step(device):
    """The second value of a number is traced as a symbol."""
    head, batch = head_and_batch(device, False)

    def loss(hidden, beta, logit_scale, softcap):
        options = dict(beta=beta, logit_scale=logit_scale, softcap=softcap)
        return lk.fused_linear_listwise_loss(hidden, head.weight, head.labels, batch.relevance, **batch.layout, **options).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for options in ((0.5, 1.0, 3.0), (0.7, 1.2, 3.1), (0.9, 1.4, 3.2)):
        torch.testing.assert_close(compiled(head.hidden, *options), loss(head.hidden, *options), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", ["list_hold", "recompute"])
def test_a_schedule_of_ones_own_in_one_graph(device, schedule):
    assert_compiled_is_eager(partial(token_logps, schedule=schedule), *head_and_batch(device, False), ALL)


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


STEPS = [((), "score_only"), (("hidden",), "frozen_head"), (ALL, "list_hold"), (ALL, "recompute"), (("weight",), "recompute")]


@pytest.fixture(scope="module")
def recorded():
    """Every call of a linear op that steps of each schedule make."""

    def logps_of(head, schedule, stats=False):
        def function(hidden, weight, bias):
            options = dict(schedule=schedule, return_stats=stats, backend="torch")
            out = lk.linear_token_logps(hidden, weight, head.labels, bias=bias, **options)
            return out.logps if stats else out

        return function

    with Recorder() as recorder:
        for dtype, steps in ((torch.float32, STEPS), (torch.bfloat16, STEPS[1:-1])):
            head = make_head(31, 8, (2, 3), dtype, bias=dtype == torch.float32)
            for wanted, schedule in steps:
                wanted = [name for name in wanted if getattr(head, name) is not None]
                run(logps_of(head, schedule, stats=schedule == "recompute"), head, wanted)
        nothing = replace(head, labels=torch.full_like(head.labels, IGNORE))
        run(logps_of(nothing, "recompute"), nothing, ("hidden", "weight"))
    return recorder.calls


@pytest.mark.parametrize("name", ["linear_logps", "linear_logps_backward"])
def test_registered_ops_are_opcheck_clean(recorded, name):
    op = getattr(torch.ops.larpo_kernels, name).default
    assert len(recorded[op]) >= 8
    opcheck(op, recorded[op])


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
        opcheck(op, calls)


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

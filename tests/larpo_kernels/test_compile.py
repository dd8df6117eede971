"""torch.compile(fullgraph=True) gives eager's numbers; the registered ops keep torch.library's promises."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import larpo_kernels as lk
from tests.helpers.batches import IGNORE, Batch, leaf, make_batch
from tests.helpers.recorded_ops import Recorder, opcheck

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def token_logps(batch, logits, backend):
    return lk.token_logps(logits, batch.labels, backend=backend)


def token_stats(batch, logits, backend):
    return tuple(lk.token_logps(logits, batch.labels, return_stats=True, softcap=5.0, backend=backend))


def sequence_logps(batch, logits, backend):
    options = dict(length_normalized=True, logit_scale=0.5, backend=backend)
    return lk.sequence_logps(logits, batch.labels, cu_seqlens=batch.cu_seqlens, **options)


def fused_listwise_loss(batch, logits, backend):
    options = dict(objective="listmle", ref_logps=batch.ref_logps, return_stats=True, backend=backend)
    return tuple(lk.fused_listwise_loss(logits, batch.labels, batch.relevance, **batch.layout, **options))


def weighted_lambdarank(batch, logits, backend):
    options = dict(objective=lk.LambdaRank(weighting="dcg2", k=2), reduction="none", backend=backend)
    out = lk.fused_listwise_loss(logits, batch.labels, batch.relevance.abs(), **batch.layout, **options)
    return out.loss, out.scores


def listwise_loss(batch, logits, backend):
    scores = logits.flatten(1).sum(-1) if batch.cu_seqlens is None else logits[: len(batch.relevance)].sum(-1)
    return lk.listwise_loss(scores, batch.relevance, list_sizes=list(batch.list_sizes), objective="lambdarank", backend=backend)


OPS = [token_logps, token_stats, sequence_logps, fused_listwise_loss, weighted_lambdarank, listwise_loss]


@pytest.fixture(params=["padded", "packed"])
def batch(request, device):
    batch = make_batch(device=device)
    return batch if request.param == "padded" else batch.packed()


def with_junk(batch, op):
    """NaN in the rows that must not be read."""
    if op is not listwise_loss:
        batch.logits[batch.labels == IGNORE] = math.nan
    return batch


def step(op, batch, backend):
    """logits -> what the op returns and the gradient it sends back, for one loss over all of it."""

    def run(logits):
        out = op(batch, logits, backend)
        parts = out if isinstance(out, tuple) else (out,)
        return tuple(part for part in parts if part is not None)

    return run


def outputs_and_gradient(run, logits):
    x = leaf(logits)
    parts = run(x)
    sum(
        (part * torch.linspace(1, 2, part.numel(), device=part.device).view(part.shape)).sum()
        for part in parts
        if part.requires_grad
    ).backward()
    return [part.detach() for part in parts], x.grad


def assert_compiled_is_eager(op, batch, backend, compiler):
    run = step(op, with_junk(batch, op), backend)
    eager_parts, eager_grad = outputs_and_gradient(run, batch.logits)
    compiled = torch.compile(run, fullgraph=True, backend=compiler)
    parts, grad = outputs_and_gradient(compiled, batch.logits)
    assert len(parts) == len(eager_parts)
    for part, eager_part in zip(parts, eager_parts, strict=True):
        torch.testing.assert_close(part, eager_part, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, eager_grad, rtol=1e-6, atol=1e-7)
    if op is not listwise_loss:
        assert (grad[batch.labels == IGNORE] == 0).all()


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_one_graph_gives_eagers_numbers(batch, op):
    assert_compiled_is_eager(op, batch, None, "aot_eager")


def test_one_graph_gives_eagers_numbers_on_either_backend(backend, device):
    assert_compiled_is_eager(fused_listwise_loss, make_batch((2, 1), device=device), backend, "aot_eager")


@pytest.mark.slow
def test_inductor_gives_eagers_numbers(device):
    assert_compiled_is_eager(fused_listwise_loss, make_batch(device=device), None, "inductor")


def test_a_model_and_its_loss_in_one_graph(device):
    """The logits are an intermediate of the graph, as in training."""
    batch = make_batch(device=device)
    head = torch.nn.Linear(8, 31, bias=False, device=device)
    hidden = torch.randn(*batch.labels.shape, 8, device=device)

    def train(hidden):
        return lk.fused_listwise_loss(head(hidden), batch.labels, batch.relevance, **batch.layout).loss

    train(hidden).backward()
    expected, head.weight.grad = head.weight.grad, None
    torch.compile(train, fullgraph=True, backend="aot_eager")(hidden).backward()
    torch.testing.assert_close(head.weight.grad, expected, rtol=1e-5, atol=1e-7)


def test_a_shifted_view_in_one_graph(device):
    batch = make_batch(device=device)
    labels = batch.labels[:, 1:]

    def run(model_logits):
        return (lk.token_logps(model_logits[:, :-1], labels),)

    eager, eager_grad = outputs_and_gradient(run, batch.logits)
    compiled, grad = outputs_and_gradient(torch.compile(run, fullgraph=True, backend="aot_eager"), batch.logits)
    assert torch.equal(compiled[0], eager[0]) and torch.equal(grad, eager_grad)


@pytest.mark.parametrize("op", [token_logps, sequence_logps, fused_listwise_loss], ids=lambda op: op.__name__)
def test_no_recompilation_for_another_length(device, op):
    """The first length compiles, the second makes it dynamic, no other compiles again."""
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def run(logits, labels, relevance, ref_logps):
        return op(Batch(logits, labels, relevance, ref_logps, lengths=(), list_sizes=(3, 3)), logits, None)

    frames = []
    for width in (4, 5, 6, 9, 13):
        batch = make_batch((3, 3), (width,) * 6, device=device, padding=0)
        out = run(leaf(batch.logits), batch.labels, batch.relevance, batch.ref_logps)
        (out[0] if isinstance(out, tuple) else out).sum().backward()
        frames.append(counter.frame_count)
    assert frames[0] == 1 and frames[1] <= 2 and set(frames[1:]) == {frames[1]}


# ---- torch.library


def registered_ops():
    """Names of this package's ops on the logits side and the list side."""
    names = {n.split(".")[0] for n in torch._C._dispatch_get_all_op_names() if n.startswith("larpo_kernels::")}
    return sorted(name.split("::")[1] for name in names if "linear" not in name)


@pytest.fixture(scope="module")
def recorded():
    """Every call that a padded and a packed step, in place and not, make."""
    with Recorder() as recorder:
        for batch in (make_batch((2, 1)), make_batch((2, 1)).packed()):
            for op in OPS:
                outputs_and_gradient(step(op, batch, "torch"), batch.logits)
            x = leaf(batch.logits) * 1
            lk.token_logps(x, batch.labels, inplace_backward=True, backend="torch").sum().backward()
    return recorder.calls


@pytest.mark.parametrize("name", registered_ops())
def test_registered_ops_are_opcheck_clean(recorded, name):
    op = getattr(torch.ops.larpo_kernels, name).default
    assert op in recorded, f"no step of the package calls {name}"
    opcheck(op, recorded[op], most=4)


def test_there_are_ops_to_check():
    assert {"token_logps", "token_logps_backward"} <= set(registered_ops())

"""What holds of every op alike: the same bits again, gradients in any order of backwards, ignored tokens, nothing at all."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

import larpo_kernels as lk
from tests.helpers import linear_heads
from tests.helpers.batches import IGNORE, leaf, make_batch
from tests.helpers.interpreted import few_interpreted

LENGTHS = (2, 1, 3, 2, 3)  # of candidates in lists of 2, 1 and 2; nothing but its prompt is left of the second
HEAD = ("hidden", "weight", "bias")
MEANS = {"length_normalized": True}


@dataclass(frozen=True)
class Op:
    function: Callable
    wanted: tuple[str, ...] = ("logits",)  # what requires grad
    packed: bool = False
    options: dict | None = None


ONE_TILE = "in one tile"
OPS = {
    "token_logps": Op(lk.token_logps),
    "sequence_logps": Op(lk.sequence_logps),
    "sequence_logps, packed": Op(lk.sequence_logps, packed=True, options=MEANS),
    "fused_listwise_loss": Op(lk.fused_listwise_loss),
    "fused_listwise_loss, packed": Op(lk.fused_listwise_loss, packed=True, options=MEANS),
    ONE_TILE: Op(lk.linear_token_logps, HEAD),  # a CPU forms such logits at once
    "frozen_head": Op(lk.linear_token_logps, ("hidden",), options={"schedule": "frozen_head"}),
    "list_hold": Op(lk.linear_token_logps, HEAD, options={"schedule": "list_hold"}),
    "recompute": Op(lk.linear_token_logps, HEAD, options={"schedule": "recompute"}),
    "holding a part": Op(lk.linear_token_logps, HEAD, options={"memory_budget": "half"}),
    "linear_sequence_logps": Op(lk.linear_sequence_logps, HEAD, True, MEANS | {"schedule": "list_hold"}),
    "fused_linear_listwise_loss": Op(lk.fused_linear_listwise_loss, HEAD, options={"schedule": "recompute"}),
    "fused_linear_listwise_loss, packed": Op(lk.fused_linear_listwise_loss, ("hidden",), True, {"schedule": "frozen_head"}),
}
FEW = ["token_logps", "sequence_logps, packed", "fused_listwise_loss", "frozen_head", "list_hold", "recompute"]
EVERY = few_interpreted(OPS, FEW)
FROM_LOGITS = [name for name, op in OPS.items() if op.wanted == ("logits",)]
OF_TOKENS = ["token_logps", ONE_TILE, "frozen_head", "list_hold", "recompute"]
OF_LISTS = [name for name, op in OPS.items() if "listwise_loss" in op.function.__name__]


@dataclass(frozen=True)
class Call:
    """An op and its arguments, of which those in x are differentiated."""

    function: Callable
    x: dict
    given: dict

    @property
    def rows(self):
        """Name of what has a row for each token."""
        return next(iter(self.x))

    @property
    def dtype(self):
        return self.x[self.rows].dtype

    @property
    def ignored(self):
        return self.given["labels"] == IGNORE

    def changed(self, **arguments):
        x = {name: arguments.pop(name, value) for name, value in self.x.items()}
        return replace(self, x=x, given={**self.given, **arguments})

    def cast(self, dtype):
        return self.changed(**{name: value.to(dtype) for name, value in self.x.items()})

    def spoilt(self):
        """With junk of every kind in the rows that are ignored."""
        junk = torch.tensor([math.nan, math.inf, -math.inf], device=self.ignored.device)
        junk = junk[torch.arange(self.ignored.numel(), device=junk.device) % 3].view_as(self.ignored)[..., None]
        return self.changed(**{self.rows: torch.where(self.ignored[..., None], junk, self.x[self.rows].float()).to(self.dtype)})

    def __call__(self, **x):
        out = self.function(**self.given, **{**self.x, **x})
        return getattr(out, "loss", out)

    def leaves(self):
        return {name: leaf(value) for name, value in self.x.items()}

    def gradients(self, upstream=None):
        """[value, gradient of each x] for ones from above, or `upstream`."""
        x = self.leaves()
        out = self(**x)
        upstream = torch.ones_like(out) if upstream is None else upstream
        return [out.detach(), *torch.autograd.grad(out, list(x.values()), upstream)]


def make_call(op, device="cpu", dtype=torch.float32, *, sizes=(2, 1, 2), lengths=LENGTHS, vocabulary=70, width=8, **options):
    batch = make_batch(sizes, lengths, vocabulary, dtype, device)
    batch = batch.packed() if op.packed else batch
    options = {"labels": batch.labels, **(op.options or {}), **options}
    if op.packed:
        options["cu_seqlens"] = batch.cu_seqlens
    if "listwise_loss" in op.function.__name__:  # a loss for each list
        lists = dict(list_sizes=list(sizes), relevance=batch.relevance, ref_logps=batch.ref_logps, reduction="none")
        options |= lists | {"objective": "listmle"}
    if op.wanted == ("logits",):
        return Call(op.function, {"logits": batch.logits}, options)
    head = linear_heads.make_head(vocabulary, width, dtype=dtype, device=device, bias=True, labels=batch.labels.cpu())
    if options.get("memory_budget") == "half":
        options |= linear_heads.scheduled("auto_holding_a_part", head)[1]
    return Call(
        op.function,
        {name: getattr(head, name) for name in op.wanted},
        options | {name: getattr(head, name) for name in HEAD if name not in op.wanted},
    )


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    """Two blocks of tokens that count, two tiles of the vocabulary."""
    if ONE_TILE not in request.node.callspec.params.values():
        linear_heads.use_small_tiles(monkeypatch, tokens=4, by_use=True)


@pytest.fixture(params=EVERY)
def call(request, backend, device):
    return make_call(OPS[request.param], device, backend=backend)


def assert_same_bits(found, expected):
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


# ---- runs and graphs


def test_run_to_run_the_same_bits(call):
    for dtype in (torch.float32, torch.bfloat16):
        assert_same_bits(call.cast(dtype).gradients(), call.cast(dtype).gradients())


def test_the_callers_tensors_stay_intact(call):
    x = call.leaves()
    tensors = [*x.values(), *(value for value in call.given.values() if isinstance(value, torch.Tensor))]
    before = [(t.detach().clone(), t._version) for t in tensors]
    call(**x).sum().backward()
    for tensor, (values, version) in zip(tensors, before, strict=True):
        assert torch.equal(tensor.detach(), values) and tensor._version == version


def test_no_gradient_is_tracked_where_none_is_asked_for(call):
    plain = call()
    with torch.no_grad():
        scored = call(**call.leaves())
    assert not plain.requires_grad and not scored.requires_grad and torch.equal(plain, scored)


def test_an_expanded_upstream_gradient_counts_once(call):
    """sum().backward() hands over one number with stride 0."""
    x = call.leaves()
    call(**x).sum().backward()
    assert_same_bits([value.grad for value in x.values()], call.gradients()[1:])


@pytest.mark.parametrize("name", OF_LISTS)
def test_a_mean_spreads_what_comes_from_above_over_all_lists(name, device):
    call = make_call(OPS[name], device, backend="torch")
    each = call().numel()
    expected = call.gradients(torch.full((each,), -3.5 / each, device=device))
    found = call.changed(reduction="mean").gradients(torch.tensor(-3.5, device=device))
    torch.testing.assert_close(found[0], expected[0].mean())
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-6, atol=1e-9)
    assert expected[0][1] == 0 and len(call.given["list_sizes"]) == each == 3  # the second list has one candidate


def test_graphs_keep_apart_and_run_twice(call):
    """As of a policy and its reference: forwards in order, backwards in reverse, each twice through a retained graph."""
    calls = [call, call.changed(**{call.rows: call.x[call.rows] * 0.5})]
    leaves = [one.leaves() for one in calls]
    outs = [one(**x) for one, x in zip(calls, leaves, strict=True)]
    upstream = torch.linspace(-1, 2, outs[0].numel(), device=outs[0].device).view_as(outs[0])
    for out in reversed(outs):
        out.backward(upstream, retain_graph=True)
        out.backward(upstream)
    for one, x in zip(calls, leaves, strict=True):
        for value, once in zip(x.values(), one.gradients(upstream)[1:], strict=True):
            torch.testing.assert_close(value.grad, 2 * once, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", OPS)
def test_gradients_are_finite_differences_in_float64(name):
    options = {"softcap": 2.0, "logit_scale": 1.5, "backend": "torch"}
    call = make_call(OPS[name], dtype=torch.float64, lengths=(2, 1, 3, 2, 2), vocabulary=5, width=3, **options)
    assert torch.autograd.gradcheck(lambda *x: call(**dict(zip(call.x, x, strict=True))), list(call.leaves().values()))


@pytest.mark.parametrize("name", FROM_LOGITS)
def test_inplace_backward_writes_the_same_gradient_over_the_logits(name, backend, device, dtype):
    call = make_call(OPS[name], device, dtype, backend=backend).spoilt()
    expected = call.gradients()[1]
    logits = leaf(call.x["logits"])
    activations = logits * 1
    out = call.changed(inplace_backward=True)(logits=activations)
    assert torch.equal(activations.detach().nan_to_num(), logits.detach().nan_to_num()), "the forward must not write"
    out.sum().backward()
    assert torch.equal(logits.grad, expected)
    assert torch.equal(activations.detach(), expected), "the gradient should live in the logits' memory"


# ---- ignored tokens


def test_junk_in_ignored_rows_touches_nothing(call):
    found = call.spoilt().gradients()
    assert_same_bits(found, call.gradients())
    assert (found[1][call.ignored] == 0).all()
    assert torch.equal(call.spoilt()(), call()), "where no gradient is asked for"


@pytest.mark.parametrize("name", OF_TOKENS)
def test_a_nan_upstream_gradient_of_an_ignored_token_touches_nothing(name, backend, device):
    call = make_call(OPS[name], device, backend=backend)
    upstream = torch.linspace(-1, 2, call.ignored.numel(), device=device).view_as(call.ignored)
    assert_same_bits(call.gradients(upstream.masked_fill(call.ignored, math.nan)), call.gradients(upstream))


def test_everything_ignored_is_finite_and_in_the_graph(call):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        nothing = call.changed(labels=torch.full_like(call.given["labels"], IGNORE)).spoilt().cast(dtype)
        out, *grads = nothing.gradients()
        assert out.isfinite().all() and ("list_sizes" in call.given or (out == 0).all())
        assert torch.equal(nothing(), out)
        for x, grad in zip(nothing.x.values(), grads, strict=True):
            assert grad.shape == x.shape and (grad == 0).all()


def test_any_ignore_index_gives_the_same_bits(call):
    labels = call.given["labels"]
    call = call.changed(labels=labels.where(labels != 0, 1))
    expected = call.gradients()
    for index in (0, 70):  # the first row of the vocabulary, and behind the last
        other = call.changed(labels=call.given["labels"].masked_fill(call.ignored, index), ignore_index=index)
        assert_same_bits(other.gradients(), expected)


@pytest.mark.parametrize("name", EVERY)
def test_nothing_at_all_is_zero_and_in_the_graph(name, backend, device):
    call = make_call(OPS[name], device, sizes=(), lengths=(), backend=backend)
    for reduction in ("none", "mean", "sum") if "list_sizes" in call.given else (None,):
        out, *grads = (call.changed(reduction=reduction) if reduction else call).gradients()
        assert out.numel() == (reduction in ("mean", "sum")) and (out == 0).all()
        for x, grad in zip(call.x.values(), grads, strict=True):
            assert grad.shape == x.shape and (grad == 0).all()


@pytest.mark.parametrize("name", OF_TOKENS)
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)], ids=str)
def test_no_tokens_in_any_shape(name, shape, backend, device):
    call = make_call(OPS[name], device, backend=backend)
    rows = torch.zeros(*shape, call.x[call.rows].shape[-1], device=device)
    call = call.changed(labels=torch.zeros(shape, dtype=torch.long, device=device), **{call.rows: rows})
    out, *grads = call.gradients()
    assert out.shape == call().shape == shape and all((grad == 0).all() for grad in grads)

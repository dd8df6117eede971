"""Bad values where nothing may look at them first: in a compiled graph, and on a GPU. NaN, and no read outside a buffer."""

import pytest
import torch

import larpo_kernels as lk
from larpo_kernels import validation
from tests.helpers.linear_heads import make_head, ours, run

V, N = 11, 3
BORDERS = [
    [0, 5, 1, 3],  # back and forth
    [-4, 2, 3],  # before the beginning
    [0, 2, 10**12],  # behind the end
    [0, 1, 2],  # a token left out
    [1, 3, 3],  # not from 0
]


EAGER_OR_COMPILED = pytest.mark.parametrize(  # a graph that starts Triton's kernels is also in test_compile*.py
    "unread", ["eager", pytest.param("compiled", marks=pytest.mark.slow_interpreted)], indirect=True
)


@pytest.fixture
def unread(request, monkeypatch):
    """Calls a function as on a GPU: values are not looked at; or, as "compiled", in a graph of torch.compile."""
    if getattr(request, "param", "eager") == "eager":
        monkeypatch.setattr(validation, "readable", lambda x: False)
        return lambda function, *args, **options: function(*args, **options)

    def call(function, *args, **options):
        torch._dynamo.reset()
        return torch.compile(function, backend="aot_eager", fullgraph=True)(*args, **options)

    return call


def data(device):
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(N, V, generator=draw).to(device).requires_grad_()
    hidden, weight = (torch.randn(n, 4, generator=draw).to(device).requires_grad_() for n in (N, V))
    return logits, hidden, weight, torch.randint(V, (N,), generator=draw).to(device)


@pytest.mark.parametrize("schedule", ["score_only", "frozen_head", "list_hold", "recompute"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_what_nobody_looked_at_gives_what_it_gives_otherwise(schedule, packed, backend, device, monkeypatch):
    """13 of 18 tokens count, of candidates side by side as of one long row: which ones, a GPU is asked later than a CPU."""
    wanted = {"score_only": (), "frozen_head": ("hidden",)}.get(schedule, ("hidden", "weight"))
    labels = torch.arange(18) % V
    labels[[0, 4, 5, 11, 17]] = -100
    head = make_head(V, 4, labels=labels if packed else labels.view(3, 6), device=device)
    results = []
    for readable in (validation.readable, lambda x: False):
        monkeypatch.setattr(validation, "readable", readable)
        results.append(run(ours(head, backend, schedule=schedule), head, wanted))
    (read, read_grads), (unread, unread_grads) = results
    torch.testing.assert_close(unread, read)
    for name in wanted:
        torch.testing.assert_close(unread_grads[name], read_grads[name])


def and_one_compiled(name, values):
    """Each value in eager mode, and the first in a compiled graph: it is the graph that is to be seen there, not the values."""
    compiled = pytest.param("compiled", values[0], marks=pytest.mark.slow_interpreted)
    return pytest.mark.parametrize(
        ("unread", name), [compiled, *(("eager", value) for value in values)], indirect=["unread"], ids=str
    )


@and_one_compiled("borders", BORDERS)
def test_borders_that_do_not_cover_the_tokens_give_nan(borders, unread, backend, device):
    logits, hidden, weight, labels = data(device)
    cu = torch.tensor(borders, device=device)
    relevance = torch.arange(float(len(cu) - 1), device=device)
    of_lists = {"cu_seqlens": cu, "list_sizes": len(cu) - 1, "backend": backend}
    fused = unread(lk.fused_listwise_loss, logits, labels, relevance, **of_lists)
    assert fused.loss.isnan()
    fused.loss.backward()
    linear = unread(lk.fused_linear_listwise_loss, hidden, weight, labels, relevance, **of_lists)
    assert linear.loss.isnan()
    for logps in (
        unread(lk.sequence_logps, logits, labels, cu_seqlens=cu, backend=backend),
        unread(lk.linear_sequence_logps, hidden, weight, labels, cu_seqlens=cu, backend=backend),
    ):
        assert logps.isnan().any() and logps.shape == (len(cu) - 1,)


@and_one_compiled("sizes", [[5, -1], [4, 0], [2, 1], [3, 3], [10**12, 4 - 10**12]])
@pytest.mark.parametrize("objective", ["pairwise", "contrastive", "lambdarank"])
def test_lists_that_do_not_cover_the_candidates_give_nan(sizes, objective, unread, backend, device):
    scores = torch.tensor([0.5, 1.0, -1.0, 0.0], device=device, requires_grad=True)
    sizes, relevance = (torch.tensor(x, device=device) for x in (sizes, [3.0, 2.0, 1.0, 0.0]))
    loss = unread(lk.listwise_loss, scores, relevance, list_sizes=sizes, objective=objective, backend=backend)
    assert loss.isnan()
    loss.backward()


def test_wrong_borders_of_one_candidate_reach_the_loss_of_its_list_whatever_the_objective(unread, backend, device):
    logits, _, _, labels = data(device)
    cu, relevance = torch.tensor([0, 2, 1, 3], device=device), torch.arange(3.0, device=device)
    for objective in ("pairwise", "contrastive", "listmle", "lambdarank", "listnet"):
        options = dict(cu_seqlens=cu, list_sizes=3, objective=objective, backend=backend)
        assert unread(lk.fused_listwise_loss, logits, labels, relevance, **options).loss.isnan(), objective


def test_inductor_reads_nothing_outside_either(device):
    _, hidden, weight, labels = data(device)
    cu = torch.tensor([0, 2, 10**12], device=device)
    torch._dynamo.reset()
    found = torch.compile(lk.linear_sequence_logps, fullgraph=True)(hidden, weight, labels, cu_seqlens=cu)
    assert found.isnan().tolist() == [False, True]


@EAGER_OR_COMPILED
def test_borders_that_do_are_taken_as_they_are(unread, backend, device):
    logits, _, _, labels = data(device)
    labels[1] = -100
    cu = torch.tensor([0, 2, 2, 3], device=device)
    found = unread(lk.sequence_logps, logits, labels, cu_seqlens=cu, backend=backend)
    true = lk.reference.sequence_logps(logits.double(), labels, cu_seqlens=cu)
    assert (found - true).abs().max() < 1e-6 and found[1] == 0


def test_an_ignore_index_that_int32_labels_cannot_hold_ignores_none_of_them(unread, backend, device):
    logits, hidden, weight, labels = data(device)
    labels[0] = 1  # 2^32 + 1 in 32 bits
    for function, *given in ((lk.token_logps, logits), (lk.linear_token_logps, hidden, weight)):
        assert (unread(function, *given, labels.int(), ignore_index=2**32 + 1, backend=backend) < 0).all()


@and_one_compiled("label", [V, -1, 10**9])
def test_a_label_out_of_range_gives_nan_for_its_token_only(label, unread, backend, device):
    logits, hidden, weight, labels = data(device)
    good = lk.token_logps(logits, labels, backend=backend)
    labels = labels.clone()
    labels[1] = label
    for found in (
        unread(lk.token_logps, logits, labels, backend=backend),
        unread(lk.linear_token_logps, hidden, weight, labels, backend=backend),
    ):
        assert found.isnan().tolist() == [False, True, False]
    for found in (
        unread(lk.token_logps, logits, labels, return_stats=True, backend=backend),
        unread(lk.linear_token_logps, hidden, weight, labels, return_stats=True, backend=backend),
    ):
        assert all(x.isnan().tolist() == [False, True, False] for x in found)
    found = unread(lk.token_logps, logits, labels, backend=backend)
    assert torch.equal(found[[0, 2]], good[[0, 2]])
    found[[0, 2]].sum().backward()
    assert logits.grad[[0, 2]].isfinite().all()


def logps_and_gradients(call, device, labels=None, **options):
    """Of each token and its inputs: from logits, from hidden states, and of a frozen head."""
    logits, hidden, weight, own = data(device)
    labels = own if labels is None else labels
    linear = lk.linear_token_logps
    for function, *given in ((lk.token_logps, logits), (linear, hidden, weight), (linear, hidden, weight.detach())):
        logps = call(function, *given, labels, **options)
        upstream = torch.arange(1.0, N + 1, device=device)
        yield logps.detach(), *torch.autograd.grad(logps, [x for x in given if x.requires_grad], upstream)


@EAGER_OR_COMPILED
def test_without_an_ignore_index_every_label_counts(unread, backend, device):
    found = logps_and_gradients(unread, device, ignore_index=None, backend=backend)
    expected = logps_and_gradients(lambda function, *args: function(*args), device)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@EAGER_OR_COMPILED
def test_without_an_ignore_index_a_label_that_is_no_column_gives_nan(unread, backend, device):
    """Padding that was said to count must show, in what is computed and in what is learned of it."""
    labels = torch.tensor([3, -100, 5], device=device)
    for logps, *grads in logps_and_gradients(unread, device, labels, ignore_index=None, backend=backend):
        assert logps.isnan().tolist() == [False, True, False]
        assert grads[0].isnan().any(-1).tolist() == [False, True, False]

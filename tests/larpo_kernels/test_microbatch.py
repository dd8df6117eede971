"""Micro-batching over candidates gives the gradient of the whole list, whatever the slice."""

import contextlib

import pytest
import torch

import larpo_kernels as lk

SIZES = [3, 1, 4]
RELEVANCE = torch.tensor([0.3, 0.1, 0.9, 0.0, 2.0, 2.0, -1.0, 0.5])


class Scorer(torch.nn.Module):
    """8 candidates of 5 tokens, hidden states from a layer with dropout, then a head."""

    def __init__(self, dropout=0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.x, body, head = (torch.randn(*shape, generator=generator) for shape in ((8, 5, 6), (6, 12), (50, 12)))
        self.labels = torch.randint(50, (8, 5), generator=generator)
        self.body, self.head = torch.nn.Parameter(body), torch.nn.Parameter(head)
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, at):
        hidden = self.dropout(self.x[at] @ self.body)
        return lk.linear_sequence_logps(hidden, self.head, self.labels[at])

    def grads(self):
        return [p.grad.clone() for p in self.parameters()]


def whole(model, objective, ref):
    scores = 0.2 * (model(slice(0, 8)) - ref)
    loss = lk.listwise_loss(scores, RELEVANCE, list_sizes=SIZES, objective=objective)
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("slice_size", [1, 3, 8, 100])
@pytest.mark.parametrize("objective", ["contrastive", "listmle", "lambdarank"])
def test_gradient_of_slices_is_the_gradient_of_the_whole(slice_size, objective):
    ref = torch.linspace(-20, -15, 8)
    one, other = Scorer(), Scorer()
    loss = whole(one, objective, ref)
    out = lk.backward_in_slices(
        other, RELEVANCE, list_sizes=SIZES, slice_size=slice_size, objective=objective, ref_logps=ref, beta=0.2
    )
    torch.testing.assert_close(out.loss, loss, rtol=1e-6, atol=1e-6)
    for a, b in zip(other.grads(), one.grads(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not (out.loss.requires_grad or out.logps.requires_grad or out.scores.requires_grad)


@pytest.mark.parametrize("slice_size", [3, 100])
def test_another_loss_of_the_same_numbers(slice_size):
    def loss(logps, ref):
        scores = logps - ref
        return (scores - RELEVANCE).square().mean(), scores

    ref = torch.linspace(-20, -15, 8)
    one, other = Scorer(), Scorer()
    expected, scores = loss(one(slice(0, 8)), ref)
    expected.backward()
    out = lk.backward_in_slices(other, RELEVANCE, list_sizes=SIZES, slice_size=slice_size, ref_logps=ref, loss=loss)
    torch.testing.assert_close(out.loss, expected.detach())
    torch.testing.assert_close(out.scores, scores.detach())
    assert not (out.loss.requires_grad or out.logps.requires_grad or out.scores.requires_grad)
    for a, b in zip(other.grads(), one.grads(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_dropout_draws_the_same_masks_in_both_passes():
    model = Scorer(dropout=0.5)
    seen = {}

    def logps(at):
        value = model(at)
        seen.setdefault(at.start, []).append(value.detach().clone())
        return value

    torch.manual_seed(1)
    lk.backward_in_slices(logps, RELEVANCE, list_sizes=SIZES, slice_size=3)
    after = torch.rand(1)
    for first, second in seen.values():
        assert torch.equal(first, second)
    assert not torch.equal(seen[0][0], Scorer()(slice(0, 3)).detach()), "dropout was active"
    seen.clear()
    torch.manual_seed(1)
    lk.backward_in_slices(logps, RELEVANCE, list_sizes=SIZES, slice_size=3, replay_rng=False)
    assert not torch.equal(*seen[0]), "without replay the masks differ"
    torch.manual_seed(1)
    with torch.no_grad():
        for a in range(0, 8, 3):
            model(slice(a, min(a + 3, 8)))
    assert torch.equal(torch.rand(1), after), "the second pass leaves the generator where the first one left it"


def test_gradients_are_synchronised_in_the_last_slice_only():
    events = []

    @contextlib.contextmanager
    def no_sync():
        events.append("no sync")
        yield

    def backward(x):
        events.append("backward")
        x.backward()

    lk.backward_in_slices(Scorer(), RELEVANCE, list_sizes=SIZES, slice_size=3, no_sync=no_sync, backward=backward)
    assert events == ["no sync", "backward", "no sync", "backward", "backward"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slice_size": 0}, "slice_size must be an int >= 1, got 0"),
        ({"reduction": "none"}, "reduction must be 'mean' or 'sum'"),
        ({"beta": -1.0}, "beta must be > 0"),
        ({"list_sizes": [3, 3]}, "list_sizes must sum to the number of candidates, 8"),
        ({"ref_logps": torch.zeros(3)}, r"ref_logps must be \[8\]"),
    ],
)
def test_bad_input_is_refused(change, message):
    model = Scorer()
    with pytest.raises(ValueError, match=message):
        lk.backward_in_slices(model, RELEVANCE, **({"list_sizes": SIZES, "slice_size": 3} | change))
    assert all(p.grad is None for p in model.parameters())


def test_a_function_that_returns_the_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"logps must return \[3\] for candidates 0:3, got shape \[3, 1\]"):
        lk.backward_in_slices(lambda at: Scorer()(at)[:, None], RELEVANCE, list_sizes=SIZES, slice_size=3)


@pytest.mark.parametrize("num_slices", [None, 2, 3, 5])
def test_more_slices_than_candidates_fill_run_empty(num_slices):
    """As a rank with fewer candidates than others must: as many forwards and backwards, the same gradient."""
    expected, model = Scorer(), Scorer()
    whole(expected, "listmle", torch.zeros(8))
    calls = []

    def logps(at):
        calls.append((at.start, at.stop))
        return model(slice(0, 3))[:0] if at.start == at.stop else model(at)

    backwards = []

    def backward(loss):
        backwards.append(loss.backward())

    options = dict(list_sizes=SIZES, slice_size=3, num_slices=num_slices, objective="listmle", beta=0.2)
    lk.backward_in_slices(logps, RELEVANCE, **options, backward=backward)
    slices = max(3, num_slices or 0)
    assert calls == 2 * [(0, 3), (3, 6), (6, 8), (8, 8), (8, 8)][:slices] and len(backwards) == slices
    for a, b in zip(model.grads(), expected.grads(), strict=True):
        torch.testing.assert_close(a, b)

"""Derivatives that these ops do not have are refused: a second one, which would be silently zero, forward mode, torch.func."""

import pytest
import torch

import larpo_kernels as lk

NAMES = ("listwise_loss", "token_logps", "in place", "fused_listwise_loss", "linear_token_logps", "frozen_head")


def operation(name, backend, device):
    """-> a function to a number, and where to take it."""
    scores, logits, hidden, weight = (torch.randn(s, device=device) for s in ((4,), (4, 3, 20), (4, 3, 8), (20, 8)))
    labels, relevance = torch.randint(20, (4, 3), device=device), torch.randn(4, device=device)
    lists = dict(list_sizes=4, objective="listmle", backend=backend)
    return {
        "listwise_loss": (lambda x: lk.listwise_loss(x, relevance, **lists), scores),
        "token_logps": (lambda x: lk.token_logps(x, labels, backend=backend).square().sum(), logits),
        "in place": (lambda x: lk.token_logps(x * 1, labels, inplace_backward=True, backend=backend).square().sum(), logits),
        "fused_listwise_loss": (lambda x: lk.fused_listwise_loss(x, labels, relevance, **lists).loss, logits),
        "linear_token_logps": (lambda x: lk.linear_token_logps(x, weight, labels, backend=backend).square().sum(), hidden),
        "frozen_head": (
            lambda x: lk.fused_linear_listwise_loss(x, weight, labels, relevance, schedule="frozen_head", **lists).loss,
            hidden,
        ),
    }[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_second_derivative_is_refused_and_not_zero(name, backend, device):
    function, x = operation(name, backend, device)
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(function(x), x, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"autograd formula|does not (have|support)|not implemented"):
        torch.autograd.grad(g.square().sum(), x)


@pytest.mark.parametrize("name", NAMES)
def test_a_tangent_is_refused_and_not_lost(name, backend, device):
    function, x = operation(name, backend, device)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(function, (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("name", NAMES)
def test_a_transform_of_torch_func_is_refused_in_one_sentence(name, backend, device):
    function, x = operation(name, backend, device)
    with pytest.raises(NotImplementedError, match=r"inside a transform of torch\.func .*, use torch\.autograd$"):
        torch.func.grad(function)(x)


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_a_transform_left_behind_is_its_own_again(name, backend, device):
    function, x = operation(name, backend, device)
    x, kept = x.clone().requires_grad_(), []
    torch.func.grad(lambda one: (kept.append(one), one.sum())[1])(x)
    (found,) = torch.autograd.grad(function(kept[0]), x)
    (expected,) = torch.autograd.grad(function(x), x)
    assert torch.equal(found, expected)

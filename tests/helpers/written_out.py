"""A loss against its formula written out: equal values and equal gradients."""

import torch


def assert_equal_losses(ours, plain, *inputs, rtol=1e-12, atol=1e-12):
    """Two functions of the same tensors agree in value and in the gradients of -1.7 times it. Returns our gradients."""
    sides = [[x.clone().requires_grad_() for x in inputs] for _ in range(2)]
    losses = ours(*sides[0]), plain(*sides[1])
    torch.testing.assert_close(*losses, rtol=rtol, atol=atol)
    options = dict(allow_unused=True, materialize_grads=True)
    gradients = [torch.autograd.grad(-1.7 * loss, side, **options) for loss, side in zip(losses, sides, strict=True)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
    return gradients[0]

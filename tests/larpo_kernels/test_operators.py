"""Eager calls run the ops' functions themselves; whoever looks at operators sees registered ones, and the same numbers."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import larpo_kernels as lk
from larpo_kernels.objectives import OBJECTIVES

STEPS = {
    "fused_listwise_loss": ["token_logps", "scores_and_listwise_loss", "listwise_loss_backward", "token_logps_backward"],
    "sequence_logps": ["token_logps", "candidate_logps", "token_logps_backward"],
    "list_hold": ["linear_logps", "scores_and_listwise_loss", "listwise_loss_backward", "linear_logps_backward"],
}


def step(name, device):
    """-> a function of one tensor to a number, and that tensor."""
    torch.manual_seed(0)
    logits, hidden, weight = (torch.randn(s, device=device) for s in ((4, 3, 20), (4, 3, 8), (20, 8)))
    labels, relevance = torch.randint(20, (4, 3), device=device), torch.randn(4, device=device)
    labels[1, 0] = -100
    return {
        "fused_listwise_loss": (lambda x: lk.fused_listwise_loss(x, labels, relevance, list_sizes=2).loss, logits),
        "sequence_logps": (lambda x: lk.sequence_logps(x, labels).square().sum(), logits),
        "list_hold": (
            lambda x: (
                lk.fused_linear_listwise_loss(
                    hidden, x, labels, relevance, list_sizes=2, schedule="list_hold", backend="torch"
                ).loss
            ),
            weight,
        ),
    }[name]


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops += [op._schema.name.split("::")[1]] if op.namespace == "larpo_kernels" else []
        return op(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("name", STEPS)
def test_a_dispatch_mode_sees_every_op_and_changes_no_number(name, device):
    function, x = step(name, device)
    x.requires_grad_()
    (plain,) = torch.autograd.grad(function(x), x)
    with Seen() as seen:
        (observed,) = torch.autograd.grad(function(x), x)
    assert seen.ops == STEPS[name] and torch.equal(observed, plain)


def test_a_mode_around_the_backward_alone_sees_that(device):
    function, x = step("fused_listwise_loss", device)
    loss = function(x.requires_grad_())
    with Seen() as seen:
        loss.backward()
    assert seen.ops == STEPS["fused_listwise_loss"][2:]


def test_a_subclass_of_a_tensor_reaches_its_own_dispatch(device):
    function, x = step("fused_listwise_loss", device)
    loss = function(x.as_subclass(Subclass).requires_grad_())
    assert isinstance(loss, Subclass) and torch.equal(loss.as_subclass(torch.Tensor), function(x))


@pytest.mark.parametrize("name", STEPS)
def test_what_an_eager_call_keeps_can_be_moved_and_is_freed_by_its_backward(name, device):
    """Offloading (saved tensor hooks) sees every tensor that is kept, and a second backward is refused, not wrong."""
    function, x = step(name, device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t.clone())[1], lambda t: t):
        value = function(x.requires_grad_())
    (once,) = torch.autograd.grad(value, x, retain_graph=True)
    (twice,) = torch.autograd.grad(value, x)
    assert x.shape in kept and torch.equal(once, twice)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, x)


@pytest.mark.parametrize("name", STEPS)
def test_a_profile_names_the_ops(name, device):
    function, x = step(name, device)
    with torch.autograd.profiler.profile() as profile:
        function(x.requires_grad_()).backward()
    names = [event.name for event in profile.function_events if event.name.startswith("larpo_kernels::")]
    assert names == [f"larpo_kernels::{op}" for op in STEPS[name]]


@pytest.mark.parametrize("name", STEPS)
def test_gradients_in_batches_are_those_of_each(name, device):
    function, x = step(name, device)
    value = function(x.requires_grad_())
    grad = torch.tensor([1.0, -2.0], device=device)
    (batch,) = torch.autograd.grad(value, x, grad, is_grads_batched=True, retain_graph=True)
    assert torch.equal(batch, torch.stack([torch.autograd.grad(value, x, g, retain_graph=True)[0] for g in grad]))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_caller_may_write_to_the_losses_it_gets(objective, device):
    logits, labels = torch.randn(4, 3, 20, dtype=torch.float64, device=device), torch.randint(20, (4, 3), device=device)
    relevance, weight = torch.arange(4.0, device=device), torch.tensor([2.0, 3.0], dtype=torch.float64, device=device)
    options = dict(list_sizes=2, reduction="none", objective=objective)
    logits.requires_grad_()
    losses = [lk.fused_listwise_loss(logits, labels, relevance, **options).loss for _ in range(2)]
    losses[0].mul_(weight)
    assert torch.equal(*(torch.autograd.grad(x.sum(), logits)[0] for x in (losses[0], losses[1] * weight)))


def test_export_keeps_the_ops(device):
    function, x = step("fused_listwise_loss", device)

    class Module(torch.nn.Module):
        def forward(self, x):
            return function(x)

    graph = torch.export.export(Module(), (x,)).graph
    names = [node.target._schema.name for node in graph.nodes if node.op == "call_function" and hasattr(node.target, "_schema")]
    assert [n for n in names if n.startswith("larpo_kernels")] == [
        "larpo_kernels::token_logps",
        "larpo_kernels::scores_and_listwise_loss",
    ]

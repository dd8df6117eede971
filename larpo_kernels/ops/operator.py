"""Ops, each stated once and run in one of two ways.

Plain tensors in eager mode get the functions themselves, in one autograd function for a whole loss: through the dispatcher
a short call takes longer than its arithmetic does. Where something intercepts operators (torch.compile, export, a dispatch
mode such as a FLOP counter, functorch, a tensor subclass) the same functions run as registered ops: opaque to a tracer, with
shapes and derivatives that it knows.

They are registered by `torch.library.Library` itself: what `torch.library.custom_op` wraps around an op imports
torch._dynamo at the first call, which takes more than a second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import Parameter, Signature
from typing import Any, get_type_hints

import torch
from torch import Tensor

from .flops import FORMULAS, known_to_counters

NAMESPACE = "larpo_kernels"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
PLAIN = frozenset({Tensor, torch.nn.Parameter, torch.dtype, type(None), bool, int, float, str})


def are_intercepted(args: Sequence[Any]) -> bool:
    """Whether something intercepts operators on these tensors: then the registered ops must be called."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or args[0].is_meta
        or torch._C._functorch.is_legacy_batchedtensor(args[0])  # a gradient, with is_grads_batched
        or not (PLAIN.issuperset(map(type, args)) or all(type(x) in PLAIN or not isinstance(x, Tensor) for x in args))
    )


class Operator:
    """A function of tensors and plain values, and the same one registered under its name.

    function: takes one named tuple.
    arguments: the type of that, whose fields are the arguments of the registered op.
    fake: the same function of tensors without values.
    flops: (shapes of the arguments, shapes of the results) -> operations that a counter is to count.
    """

    def __init__(
        self,
        function: Callable,
        arguments: type[tuple],
        *,
        fake: Callable,
        mutates: tuple[str, ...] = (),
        flops: Callable | None = None,
    ):
        self.function, self.arguments, self.name = function, arguments, (name := function.__name__)
        LIBRARY.define(name + _schema(function, arguments, mutates), tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, _registered(function, arguments), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", _registered(fake, arguments), lib=LIBRARY)
        packet = getattr(getattr(torch.ops, NAMESPACE), name)
        self.registered = packet.default
        if flops:
            FORMULAS[packet] = lambda *args, out_shape, **options: flops(arguments(*args, **options), out_shape)
        if not mutates:
            self._register_autograd()

    def _register_autograd(self) -> None:
        torch.library.register_autograd(self.registered, _no_derivative, lib=LIBRARY)

    def __call__(self, *args):
        if not are_intercepted(args):
            return self.eagerly(self.arguments(*args))
        known_to_counters()
        return self.registered(*args)

    def eagerly(self, args: tuple):
        """The function itself, under the name of the op where a profiler asks for one."""
        if not torch.autograd._profiler_enabled():
            return self.function(args)
        with torch.profiler.record_function(f"{NAMESPACE}::{self.name}"):
            return self.function(args)


def _schema(function: Callable, arguments: type[tuple], mutates: tuple[str, ...]) -> str:
    """Of a function that takes the fields of `arguments` one by one."""
    result, defaults = get_type_hints(function)["return"], arguments._field_defaults
    parameters = [
        Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, annotation=hint, default=defaults.get(name, Parameter.empty))
        for name, hint in get_type_hints(arguments).items()
    ]

    def flat():
        pass

    flat.__signature__ = Signature(parameters, return_annotation=None if result is type(None) else result)
    return torch.library.infer_schema(flat, mutates_args=mutates)


def _registered(function: Callable, arguments: type[tuple]) -> Callable:
    """The function as a registered op: it takes the fields one by one, and what it returns are dense tensors, an empty one
    where there is none."""

    def run(*args, **kwargs):
        out = function(arguments(*args, **kwargs))
        if not isinstance(out, tuple):
            return out if out is None else out.contiguous()
        like = next(x for x in out if x is not None)
        return tuple(like.new_empty(0) if x is None else x.contiguous() for x in out)

    return run


class Differentiable(Operator):
    """An op with a derivative.

    function: the first `inputs` of its arguments are differentiable. It returns `outputs` results, the first of them
        differentiable, and after them whatever the backward needs (only tensors where it is registered).
    save: (arguments, what the function returned) -> the tensors that the backward needs, and the rest that it needs.
    backward: (those tensors, that rest, the gradient, which inputs need one) -> the gradient of each input.
    """

    def __init__(
        self,
        function: Callable,
        arguments: type[tuple],
        *,
        fake: Callable,
        inputs: int,
        outputs: int,
        save: Callable,
        backward: Callable,
        flops: Callable | None = None,
    ):
        self.inputs, self.outputs, self.save, self.backward = inputs, outputs, save, backward
        super().__init__(function, arguments, fake=fake, flops=flops)

    def _register_autograd(self) -> None:
        num_args = len(self.arguments._fields)

        def setup_context(ctx, inputs, output):
            tensors, ctx.rest = self.save(self.arguments(*inputs), output)
            ctx.save_for_backward(*tensors)
            ctx.mark_non_differentiable(*output[1:])
            ctx.set_materialize_grads(False)

        def backward(ctx, grad, *_):
            if grad is None:
                return (None,) * num_args
            grads = self.backward(ctx.saved_tensors, ctx.rest, grad, ctx.needs_input_grad[: self.inputs])
            return *grads, *(None,) * (num_args - self.inputs)

        torch.library.register_autograd(self.registered, backward, setup_context=setup_context, lib=LIBRARY)


class EagerOnly(Differentiable):
    """A Differentiable whose shapes depend on values, or whose last argument no schema can describe. Where operators are
    intercepted `otherwise` runs in its place, a registered op of the same arguments but the last."""

    def __init__(
        self, function: Callable, arguments: type[tuple], otherwise: Differentiable, *, save: Callable, backward: Callable
    ):
        self.function, self.arguments, self.save, self.backward = function, arguments, save, backward
        self.name, self.inputs, self.outputs = otherwise.name, otherwise.inputs, otherwise.outputs
        self.registered = lambda *args: otherwise.registered(*args[:-1])


Step = tuple[Differentiable, tuple]  # an op and its arguments; the first is None where the step before it gives it


def run(op: Differentiable, args: tuple, then: Differentiable | None = None, then_args: tuple = ()) -> tuple:
    """The outputs of op; with `then`, whose first argument is the first of them, its outputs and the other ones of op."""
    if are_intercepted((*args, *then_args)):
        known_to_counters()
        out = op.registered(*args)[: op.outputs]
        return out if then is None else (*then.registered(out[0], *then_args[1:])[: then.outputs], *out[1:])
    inputs = args[: op.inputs]
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return _Chain.apply(op, args[op.inputs :], then, then_args, *inputs)[:-1]
    out = op.eagerly(args)[: op.outputs]
    return out if then is None else (*then.eagerly(then.arguments(out[0], *then_args[1:]))[: then.outputs], *out[1:])


class _Chain(torch.autograd.Function):
    """One op, or two of which the second takes the first one's result, as one node of the graph.

    Its last output is an anchor for a second derivative: an empty tensor with this node as its history, where no input is
    saved that would have it.
    (With a `setup_context` of its own every call would inspect the signature of `forward`.)
    """

    @staticmethod
    def forward(ctx, op, options, then, then_args, *inputs):
        args = op.arguments(*inputs, *options)  # inputs as autograd hands them on: without wrappers that a transform left
        out = op.eagerly(args)
        tensors, ctx.rest = op.save(args, out)
        ctx.op, ctx.then, ctx.of_op = op, then, len(tensors)
        results = out[: op.outputs]
        if then is not None:
            then_args = then.arguments(out[0], *then_args[1:])
            last = then.eagerly(then_args)
            of_then, ctx.rest_of_then = then.save(then_args, last)
            tensors = (*tensors, *of_then)
            results = (*last[: then.outputs], *results[1:])
        anchor = None if any(x is inputs[0] for x in tensors) else results[0].new_empty(0)
        ctx.save_for_backward(*tensors, anchor)
        ctx.mark_non_differentiable(*(x for x in results[1:] if x is not None))
        ctx.set_materialize_grads(False)
        return *results, anchor

    @staticmethod
    def backward(ctx, grad, *_):
        nothing = (None,) * 4
        if grad is None:
            return *nothing, *(None,) * ctx.op.inputs
        (*tensors, anchor), needs = ctx.saved_tensors, ctx.needs_input_grad[len(nothing) :]
        if not torch.is_grad_enabled():
            return *nothing, *_gradients(ctx, tensors, grad, needs)
        grads = _gradients(ctx, [None if x is None else x.detach() for x in tensors], grad.detach(), needs)
        return *nothing, *(None if x is None else _Once.apply(x, anchor, grad, *tensors) for x in grads)


def _gradients(ctx, tensors, grad, needs) -> tuple:
    if ctx.then is not None:
        (grad,) = ctx.then.backward(tensors[ctx.of_op :], ctx.rest_of_then, grad, (True,))
    return ctx.op.backward(tensors[: ctx.of_op], ctx.rest, grad, needs)


class _Once(torch.autograd.Function):
    """A gradient that depends on the other arguments, by no formula: a second derivative is refused, not zero."""

    @staticmethod
    def forward(ctx, gradient, *others):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *_):
        _no_derivative()


def _no_derivative(*_):
    raise RuntimeError("larpo_kernels' ops are differentiable once: a second derivative is not implemented")

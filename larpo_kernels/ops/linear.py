"""Hidden states x weight -> token log-probs, by the walk over tiles; backward is GEMMs."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple, get_type_hints

import torch
from torch import Tensor

from .. import backends
from ..linear import flat, walk
from ..linear.dtypes import stored_dtype
from ..linear.schedules import is_recorded
from ..linear.tail import Tail, all_rows_count
from ..linear.tile_shapes import walked_tokens
from ..linear.vocab_shard import ELSEWHERE
from . import small_linear
from .flops import gemm
from .operator import Differentiable, EagerOnly, Operator, Step, are_intercepted
from .small_linear import SMALL_LINEAR_LOGPS, fake_gradients


class Arguments(NamedTuple):
    hidden: Tensor  # [S, T, H] or [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    labels: Tensor  # [S, T] or [N]
    token_indices: Tensor | None  # [n] positions of the tokens that count; None: all are walked, ignored or not
    checked: bool  # the labels have been read: each lies in the vocabulary or is ignored; without token_indices, all count
    ignore_index: int | None
    logit_scale: float
    softcap: float | None
    compute: torch.dtype
    stored: torch.dtype
    held_rows: int
    fuse_hidden_grad: bool
    stats: bool
    backend: str
    group: str = ""  # of the ranks that share the vocabulary (linear/vocab_shard.py): labels are local


class BackwardArguments(NamedTuple):
    grad: Tensor  # of the labels' shape, any strides
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    token_indices: Tensor | None
    logps: Tensor  # of the labels' shape
    total: Tensor  # [n], and so on: walk.Saved
    shift: Tensor
    shift_correction: Tensor
    dlogp_dhidden: Tensor
    held: Tensor
    checked: bool
    ignore_index: int | None
    logit_scale: float
    softcap: float | None
    compute: torch.dtype
    needs_hidden: bool
    needs_weight: bool
    needs_bias: bool
    backend: str
    group: str = ""


class _WalkedTokens:
    """Which of all N tokens are walked: the way there, and back."""

    def __init__(self, a: Arguments | BackwardArguments):
        self.shape, self.token_indices = a.labels.shape, a.token_indices
        labels = a.labels.reshape(-1)
        self.num_tokens = labels.shape[0]
        self.token_mask = self.wrong = None  # [N] bool: which count, where that is no index; which labels name no row
        if not a.checked:
            safe = labels.long().clamp(ELSEWHERE if a.group else 0, a.weight.shape[0] - 1)
            self.wrong = safe != labels
            if a.ignore_index is not None:
                token_mask = labels != a.ignore_index
                self.wrong &= token_mask
                safe = torch.where(token_mask, safe, 0)
                self.token_mask = token_mask if a.token_indices is None else None
            labels = safe
        self.count = self.num_tokens if a.token_indices is None else a.token_indices.shape[0]
        self.total = walked_tokens(self.count)
        self.labels = self.take(labels.long()).contiguous()
        self.all_hidden = a.hidden

    @functools.cached_property
    def hidden(self) -> Tensor:
        return self.take(self.all_hidden.reshape(-1, self.all_hidden.shape[-1]))

    @property
    def all(self) -> bool:
        """Whether they are the N tokens as they stand."""
        return self.total == self.count == self.num_tokens and self.token_mask is None

    def take(self, x: Tensor) -> Tensor:
        """x [N, ...] of the tokens that are walked: those that count, or all with 0 for the rest; then zeros to a multiple.

        An ignored token may hold anything, and a NaN would spread through sums over tokens: it must not be read.
        """
        if self.all:
            return x
        if self.token_mask is not None:
            x = torch.where(self.token_mask.view(-1, *[1] * (x.dim() - 1)), x, 0)
        if self.total == self.count:
            return x if self.token_indices is None else x.index_select(0, self.token_indices)
        out = x.new_empty(self.total, *x.shape[1:])
        out[self.count :] = 0
        if self.token_indices is None:
            out[: self.count] = x
        else:
            torch.index_select(x, 0, self.token_indices, out=out[: self.count])
        return out

    def upstream(self, grad: Tensor) -> Tensor:
        """Gradients of all tokens' log-probs -> of those that are walked: NaN where the log-prob is, of a wrong label."""
        grad = grad.reshape(-1)
        return self.take(grad if self.wrong is None else grad.masked_fill(self.wrong, torch.nan))

    def put(self, x: Tensor) -> Tensor:
        """Results of the tokens that were walked -> of all: 0 where ignored, NaN where the label was out of range."""
        if self.token_indices is not None and not self.all:
            x = x.new_zeros(self.num_tokens).index_copy_(0, self.token_indices, x[: self.count])
        else:
            x = x[: self.num_tokens]
        if self.token_mask is not None:
            x = torch.where(self.token_mask, x, 0)
        return (x if self.wrong is None else x.masked_fill(self.wrong, torch.nan)).view(self.shape)

    def put_rows(self, x: Tensor, out: Tensor) -> None:
        """Rows of the tokens that were walked -> of all, out [N, H]."""
        if self.token_indices is not None:
            out.zero_().index_copy_(0, self.token_indices, x[: self.count])
        else:
            out.copy_(x[: self.count])


def linear_logps(a: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logps, entropy, top1 of the labels' shape, then walk.Saved of the tokens that are walked."""
    return _forward(a)


def _head(a: Arguments | BackwardArguments) -> walk.Head:
    return walk.Head(a.weight, a.bias, a.logit_scale, a.softcap, a.compute, a.group)


def _forward(a: Arguments, tail: Tail | None = None):
    tokens = _WalkedTokens(a)
    results, saved = walk.forward(
        _head(a),
        tokens.hidden,
        tokens.labels,
        held_rows=a.held_rows if tail is None else 0,
        held_dtype=a.stored,
        fuse_hidden_grad=a.fuse_hidden_grad,
        stats=a.stats,
        backend=a.backend,
        tail=tail,
    )
    return *(None if x is None else tokens.put(x) for x in results), *saved


def _fake(a: Arguments):
    n = walked_tokens(a.labels.numel() if a.token_indices is None else a.token_indices.shape[0])
    sums = torch.float64 if a.compute == torch.float64 else torch.float32
    all_tokens, walked = a.hidden.new_empty(a.labels.shape, dtype=sums), a.hidden.new_empty(n, dtype=sums)
    stats = (torch.empty_like(all_tokens), torch.empty_like(all_tokens)) if a.stats else (None, None)
    dlogp_dhidden = a.hidden.new_empty((n if a.fuse_hidden_grad else 0, a.hidden.shape[-1]), dtype=sums)
    held = a.hidden.new_empty((a.held_rows, n), dtype=a.stored)
    saved = walk.Saved(walked, torch.empty_like(walked), torch.empty_like(walked), dlogp_dhidden, held)
    return all_tokens, *stats, *saved


def linear_logps_backward(a: BackwardArguments) -> tuple[Tensor, Tensor, Tensor]:
    """d hidden, d weight, d bias; none where not needed."""
    return _backward(a)


def _backward(a: BackwardArguments, tail: Tail | None = None):
    d_hidden, d_weight, d_bias = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if needed else None
        for x, needed in ((a.hidden, a.needs_hidden), (a.weight, a.needs_weight), (a.bias, a.needs_bias))
    )
    saved = walk.Saved(a.total, a.shift, a.shift_correction, a.dlogp_dhidden, a.held)
    tokens = _WalkedTokens(a)
    d_all = d_walked = None
    if a.needs_hidden:
        d_all = d_walked = d_hidden.view(-1, a.hidden.shape[-1])
        if not tokens.total == tokens.count == tokens.num_tokens:  # they are padded, or not all of them
            d_walked = a.hidden.new_empty(tokens.total, a.hidden.shape[-1])
    if saved.dlogp_dhidden.shape[0]:
        grad = tokens.upstream(a.grad).to(saved.dlogp_dhidden.dtype)
        backends.get(a.backend).scale_rows(saved.dlogp_dhidden, grad, d_walked)
    else:
        walk.backward(
            _head(a),
            tokens.hidden,
            tokens.labels,
            tokens.upstream(a.grad),
            tokens.take(a.logps.reshape(-1)),
            saved,
            d_hidden=d_walked,
            d_weight=d_weight,
            d_bias=d_bias,
            backend=a.backend,
            tail=tail,
        )
    if d_walked is not d_all:
        tokens.put_rows(d_walked, d_all)
    return d_hidden, d_weight, d_bias


def _save(a: Arguments, out):
    logps, _, _, *saved = out
    hidden, weight = a.hidden, a.weight
    if walk.Saved(*saved).dlogp_dhidden.shape[0]:  # then the backward reads only their shapes: the tensors can be freed
        hidden, weight = (x.new_empty_strided(x.shape, (0,) * x.dim()) for x in (hidden, weight))
    options = (a.checked, a.ignore_index, a.logit_scale, a.softcap, a.compute)
    return (hidden, weight, a.bias, a.labels, a.token_indices, logps, *saved), (options, (a.backend, a.group))


def _gradient(tensors, rest, grad, needs):
    options, where = rest
    grads = _linear_logps_backward(grad, *tensors, *options, *needs, *where)
    return tuple(g if needed else None for g, needed in zip(grads, needs, strict=True))


def _flops(a: Arguments, out) -> int:
    """Shapes instead of tensors. One GEMM, and E^T W where d hidden is fused into the forward."""
    saved = walk.Saved(*out[3:])
    return (2 if saved.dlogp_dhidden[0] else 1) * gemm(saved.total, a.weight)


def _backward_flops(a: BackwardArguments, out) -> int:
    """One GEMM for each gradient, and one for the rows of the vocabulary whose E is formed again."""
    if a.dlogp_dhidden[0]:
        return 0
    again = gemm(a.total, (a.weight[0] - a.held[0], a.weight[1]))
    return (int(a.needs_hidden) + int(a.needs_weight)) * gemm(a.total, a.weight) + again


_linear_logps_backward = Operator(linear_logps_backward, BackwardArguments, fake=fake_gradients, flops=_backward_flops)
_linear_logps = Differentiable(
    linear_logps, Arguments, fake=_fake, flops=_flops, inputs=3, outputs=3, save=_save, backward=_gradient
)


# ---- with a tail (linear/tail.py)


TailArguments = NamedTuple("TailArguments", [*get_type_hints(Arguments).items(), ("tail", Tail)])  # to be filled


def _save_with_tail(a: TailArguments, out):
    tensors, rest = _save(a, out)
    return (*tensors, *a.tail.tensors()), (rest, len(tensors), a.tail.filled(itertools.repeat(None)))


def _gradient_with_tail(tensors, rest, grad, needs):
    (options, where), count, tail = rest
    tail = tail.filled(iter(tensors[count:]))
    return _backward(BackwardArguments(grad, *tensors[:count], *options, *needs, *where), tail)


_linear_logps_with_tail = EagerOnly(
    lambda a: _forward(a, a.tail), TailArguments, _linear_logps, save=_save_with_tail, backward=_gradient_with_tail
)


def find_token_indices(labels: Tensor, ignore_index: int | None) -> Tensor | None:
    """Positions [n] on the flat token axis of those that count; None where all do, or shapes may not depend on values. On a
    GPU this waits for the device: only it knows n."""
    if ignore_index is None or is_recorded(labels):
        return None
    return (labels.reshape(-1) != ignore_index).nonzero()[:, 0]


def _is_flat(a: Arguments, threshold: float) -> bool:
    """Whether a few of the tokens that count show no tail.

    False where operators are intercepted: the answer is a value, which no graph may depend on.
    """
    if are_intercepted((a.hidden, a.weight, a.bias, a.labels)):
        return False
    indices = a.token_indices
    at = torch.tensor(flat.places(a.labels.numel() if indices is None else indices.shape[0]), device=a.labels.device)
    at = at if indices is None else indices[at]
    hidden = a.hidden.detach().reshape(-1, a.hidden.shape[-1])[at]
    few = _WalkedTokens(a._replace(hidden=hidden, labels=a.labels.reshape(-1)[at], token_indices=None))
    return flat.mostly_below(_head(a), few.hidden, few.labels, threshold, a.backend)


def linear_step(
    tensors: tuple,  # hidden, weight, bias, labels, token_indices as `find_token_indices` gives them
    checked: bool,
    plan,  # schedules.Plan
    compute: torch.dtype,  # of the tiles
    transform: tuple,  # ignore_index, logit_scale, softcap
    stats: bool,
    backend: str,
    group: str = "",  # name of the ranks that share the vocabulary; weight, bias and labels are then this rank's (VocabShard)
) -> Step:
    """logps, entropy, top1 of hidden states by a plan."""
    hidden, weight, _, labels, token_indices = tensors
    ignore_index, logit_scale, softcap = transform
    transform = ignore_index, float(logit_scale), softcap
    if plan.one_tile:
        return SMALL_LINEAR_LOGPS, small_linear.Arguments(*tensors, *transform, compute, stats, backend)
    stored, fuse = stored_dtype(compute, hidden.dtype), plan.schedule == "frozen_head"
    kept = (compute, stored, plan.held_rows, fuse)
    args = Arguments(*tensors, checked, *transform, *kept, stats, backend, group)
    if plan.tail_threshold is None:
        return _linear_logps, args
    tokens = labels.numel() if token_indices is None else token_indices.shape[0]
    if plan.if_flat and _is_flat(args, plan.tail_threshold):
        held_rows = plan.if_flat.held_rows
        all_rows_count(tokens, weight.shape[0], held_rows * walked_tokens(tokens) * stored.itemsize)
        fuse = plan.if_flat.schedule == "frozen_head"
        return _linear_logps, args._replace(held_rows=held_rows, fuse_hidden_grad=fuse)
    most_held = plan.held_rows * walked_tokens(tokens) * stored.itemsize
    tail = Tail(plan.tail_threshold, tokens, plan.tail_tile, stored, most_held, fuse)
    return _linear_logps_with_tail, TailArguments(*args, tail)

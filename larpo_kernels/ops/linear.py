"""Hidden states x weight -> token log-probs, by the walk over tiles; backward is GEMMs."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .. import backends
from ..linear import flat, schedules, walk
from ..linear.tail import Tail, all_rows_count
from ..linear.vocab_shard import ELSEWHERE
from .operator import Differentiable, EagerOnly, Operator, Step, looked_at
from .small_linear import small_linear_step


class _Walked:
    """Which of all N tokens are walked: the way there, and back."""

    def __init__(
        self, labels: Tensor, keep: Tensor | None, checked: bool, ignore_index: int | None, vocab_size: int, group: str
    ):
        self.shape, self.keep = labels.shape, keep
        labels = labels.reshape(-1)
        self.num_tokens = labels.shape[0]
        self.counted = self.wrong = None  # [N] bool: which count, where that is no index; which labels name no row
        if not checked:
            safe = labels.long().clamp(ELSEWHERE if group else 0, vocab_size - 1)
            self.wrong = safe != labels
            if ignore_index is not None:
                counted = labels != ignore_index
                self.wrong &= counted
                safe = torch.where(counted, safe, 0)
                self.counted = counted if keep is None else None
            labels = safe
        self.count = self.num_tokens if keep is None else keep.shape[0]
        self.total = schedules.walked_tokens(self.count)
        self.labels = self.take(labels.long())

    @property
    def all(self) -> bool:
        """Whether they are the N tokens as they stand."""
        return self.total == self.count == self.num_tokens and self.counted is None

    def take(self, x: Tensor) -> Tensor:
        """x [N, ...] of the tokens that are walked: those that count, or all with 0 for the rest; then zeros to a multiple.

        What an ignored token holds must not be read: a NaN would spread through sums over tokens.
        """
        if self.all:
            return x
        if self.counted is not None:
            x = torch.where(self.counted.view(-1, *[1] * (x.dim() - 1)), x, 0)
        if self.total == self.count:
            return x if self.keep is None else x.index_select(0, self.keep)
        out = x.new_empty(self.total, *x.shape[1:])
        out[self.count :] = 0
        if self.keep is None:
            out[: self.count] = x
        else:
            torch.index_select(x, 0, self.keep, out=out[: self.count])
        return out

    def upstream(self, grad: Tensor) -> Tensor:
        """Gradients of all tokens' log-probs -> of those that are walked: NaN where the log-prob is, of a wrong label."""
        grad = grad.reshape(-1)
        return self.take(grad if self.wrong is None else grad.masked_fill(self.wrong, torch.nan))

    def put(self, x: Tensor) -> Tensor:
        """Results of the tokens that were walked -> of all: 0 where ignored, NaN where the label was out of range."""
        if self.keep is not None and not self.all:
            x = x.new_zeros(self.num_tokens).index_copy_(0, self.keep, x[: self.count])
        else:
            x = x[: self.num_tokens]
        if self.counted is not None:
            x = torch.where(self.counted, x, 0)
        return (x if self.wrong is None else x.masked_fill(self.wrong, torch.nan)).view(self.shape)

    def put_rows(self, x: Tensor, out: Tensor) -> None:
        """Rows of the tokens that were walked -> of all, out [N, H]."""
        if self.keep is not None:
            out.zero_().index_copy_(0, self.keep, x[: self.count])
        else:
            out.copy_(x[: self.count])


def linear_logps(
    hidden: Tensor,  # [S, T, H] or [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [S, T] or [N]
    keep: Tensor | None,  # [n] positions of the tokens that count; None: all are walked, ignored or not
    checked: bool,  # the labels have been read: each lies in the vocabulary or is ignored; without keep, all count
    ignore_index: int | None,
    logit_scale: float,
    softcap: float | None,
    compute: torch.dtype,
    stored: torch.dtype,
    held_rows: int,
    one_pass: bool,
    stats: bool,
    backend: str,
    group: str = "",  # of the ranks that share the vocabulary (linear/vocab_shard.py): labels are local
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # walk.Kept; its first three of all tokens
    return _forward(
        None, hidden, weight, bias, labels, keep, checked, ignore_index, logit_scale, softcap, compute, stored, held_rows,
        one_pass, stats, backend, group,
    )  # fmt: skip


def _forward(
    tail, hidden, weight, bias, labels, keep, checked, ignore_index, logit_scale, softcap, compute, stored, held_rows,
    one_pass, stats, backend, group,
):  # fmt: skip
    tokens = _Walked(labels, keep, checked, ignore_index, weight.shape[0], group)
    kept = walk.forward(
        walk.Head(weight, bias, logit_scale, softcap, compute, group),
        tokens.take(hidden.reshape(-1, hidden.shape[-1])),
        tokens.labels,
        held_rows=held_rows if tail is None else 0,
        held_dtype=stored,
        one_pass=one_pass,
        stats=stats,
        backend=backend,
        tail=tail,
    )
    stats = (tokens.put(kept.entropy), tokens.put(kept.top1)) if stats else (None, None)
    return tokens.put(kept.logps), *stats, *kept[3:]


def _fake(
    hidden, weight, bias, labels, keep, checked, ignore_index, logit_scale, softcap, compute, stored, held_rows, one_pass,
    stats, backend, group="",
):  # fmt: skip
    n = schedules.walked_tokens(labels.numel() if keep is None else keep.shape[0])
    sums = torch.float64 if compute == torch.float64 else torch.float32
    all_tokens, walked = hidden.new_empty(labels.shape, dtype=sums), hidden.new_empty(n, dtype=sums)
    stats = (torch.empty_like(all_tokens), torch.empty_like(all_tokens)) if stats else (None, None)
    unit_grad = hidden.new_empty((n if one_pass else 0, hidden.shape[-1]), dtype=sums)
    return (
        all_tokens, *stats, walked, torch.empty_like(walked), torch.empty_like(walked), unit_grad,
        hidden.new_empty((held_rows, n), dtype=stored),
    )  # fmt: skip


def linear_logps_backward(
    grad: Tensor,  # of the labels' shape, any strides
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    keep: Tensor | None,
    logps: Tensor,  # of the labels' shape
    total: Tensor,  # [n], and so on: walk.Kept
    centre: Tensor,
    level: Tensor,
    unit_grad: Tensor,
    held: Tensor,
    checked: bool,
    ignore_index: int | None,
    logit_scale: float,
    softcap: float | None,
    compute: torch.dtype,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    backend: str,
    group: str = "",
) -> tuple[Tensor, Tensor, Tensor]:  # d hidden, d weight, d bias; none where not needed
    return _backward(
        None, grad, hidden, weight, bias, labels, keep, logps, total, centre, level, unit_grad, held, checked, ignore_index,
        logit_scale, softcap, compute, needs_hidden, needs_weight, needs_bias, backend, group,
    )  # fmt: skip


def _backward(
    tail, grad, hidden, weight, bias, labels, keep, logps, total, centre, level, unit_grad, held, checked, ignore_index,
    logit_scale, softcap, compute, needs_hidden, needs_weight, needs_bias, backend, group,
):  # fmt: skip
    d_hidden, d_weight, d_bias = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if needed else None
        for x, needed in ((hidden, needs_hidden), (weight, needs_weight), (bias, needs_bias))
    )
    tokens = _Walked(labels, keep, checked, ignore_index, weight.shape[0], group)
    d_all = d_walked = None
    if needs_hidden:
        d_all = d_walked = d_hidden.view(-1, hidden.shape[-1])
        if not tokens.total == tokens.count == tokens.num_tokens:  # they are padded, or not all of them
            d_walked = hidden.new_empty(tokens.total, hidden.shape[-1])
    if unit_grad.shape[0]:
        grad = tokens.upstream(grad).to(unit_grad.dtype)
        backends.get(backend).scale_rows(unit_grad, grad, d_walked)
    else:
        logps = tokens.take(logps.reshape(-1))
        walk.backward(
            walk.Head(weight, bias, logit_scale, softcap, compute, group),
            tokens.take(hidden.reshape(-1, hidden.shape[-1])),
            tokens.labels,
            tokens.upstream(grad),
            walk.Kept(logps, logps, logps, total, centre, level, unit_grad, held),
            d_hidden=d_walked,
            d_weight=d_weight,
            d_bias=d_bias,
            backend=backend,
            tail=tail,
        )
    if d_walked is not d_all:
        tokens.put_rows(d_walked, d_all)
    return d_hidden, d_weight, d_bias


def _fake_backward(
    grad, hidden, weight, bias, labels, keep, logps, total, centre, level, unit_grad, held, checked,
    ignore_index, logit_scale, softcap, compute, needs_hidden, needs_weight, needs_bias, backend, group="",
):  # fmt: skip
    return tuple(
        x.new_empty(x.shape) if needed else None
        for x, needed in ((hidden, needs_hidden), (weight, needs_weight), (bias, needs_bias))
    )


def _save(args, out):
    hidden, weight, bias, labels, keep, checked, ignore_index, logit_scale, softcap, compute, *_, backend, group = args
    logps, _, _, *kept = out
    unit_grad = kept[3]
    if unit_grad.shape[0]:  # then the backward reads only their shapes: the tensors can be freed
        hidden, weight = (x.new_empty_strided(x.shape, (0,) * x.dim()) for x in (hidden, weight))
    options = (checked, ignore_index, logit_scale, softcap, compute)
    return (hidden, weight, bias, labels, keep, logps, *kept), (options, (backend, group))


def _gradient(tensors, rest, grad, needs):
    options, where = rest
    grads = _linear_logps_backward(grad, *tensors, *options, *needs, *where)
    return tuple(g if needed else None for g, needed in zip(grads, needs, strict=True))


_linear_logps_backward = Operator(linear_logps_backward, _fake_backward)
_linear_logps = Differentiable(linear_logps, _fake, inputs=3, outputs=3, save=_save, backward=_gradient)


# ---- with a tail told apart: the arguments of linear_logps, then a walk's Tail to be filled


def _save_with_tail(args, out):
    tensors, rest = _save(args[:-1], out)
    tail = args[-1]
    return (*tensors, *tail.tensors()), (rest, len(tensors), tail.filled(itertools.repeat(None)))


def _gradient_with_tail(tensors, rest, grad, needs):
    (options, where), count, tail = rest
    tail = tail.filled(iter(tensors[count:]))
    return _backward(tail, grad, *tensors[:count], *options, *needs, *where)


_with_tail = EagerOnly(
    lambda *args: _forward(args[-1], *args[:-1]), _linear_logps, save=_save_with_tail, backward=_gradient_with_tail
)


def counted_tokens(labels: Tensor, ignore_index: int | None) -> Tensor | None:
    """Positions [n] on the flat token axis of those that count; None where all do, or shapes may not depend on values. On a
    GPU this waits for the device: only it knows n."""
    if ignore_index is None or schedules.is_recorded(labels):
        return None
    return (labels.reshape(-1) != ignore_index).nonzero()[:, 0]


def _is_flat(threshold, head, hidden, labels, keep, checked, ignore_index, backend) -> bool:
    """Whether a few of the tokens that count show no tail; not asked where somebody looks at operators."""
    if looked_at((hidden, head.weight, head.bias, labels)):
        return False
    at = torch.tensor(flat.places(labels.numel() if keep is None else keep.shape[0]), device=labels.device)
    at = at if keep is None else keep[at]
    few = _Walked(labels.reshape(-1)[at], None, checked, ignore_index, head.weight.shape[0], head.group)
    hidden = few.take(hidden.detach().reshape(-1, hidden.shape[-1])[at])
    return flat.mostly_below(head, hidden, few.labels, threshold, backend)


def linear_step(
    hidden, weight, bias, labels, keep, checked, plan, *, ignore_index, logit_scale, softcap, backend, stats=False,
    group="",
) -> Step:  # fmt: skip
    """logps, entropy, top1 of hidden states by a schedules.Plan; keep as `counted_tokens` gives it.

    group: name of the ranks that share the vocabulary; weight, bias and labels are then this rank's (shards.VocabShard).
    """
    compute = schedules.dtype_of_tiles(hidden, weight, sharded=bool(group))
    stored, tokens = schedules.stored_dtype(compute, hidden.dtype), labels.numel() if keep is None else keep.shape[0]
    if plan.if_flat and _is_flat(
        plan.tail_threshold, walk.Head(weight, bias, float(logit_scale), softcap, compute, group), hidden, labels, keep,
        checked, ignore_index, backend,
    ):  # fmt: skip
        plan = plan.if_flat
        all_rows_count(tokens, weight.shape[0], plan.held_rows * schedules.walked_tokens(tokens) * stored.itemsize)
    if plan.one_tile:
        return small_linear_step(
            hidden, weight, bias, labels, keep, ignore_index=ignore_index, logit_scale=logit_scale, softcap=softcap,
            compute=compute, stats=stats, backend=backend,
        )  # fmt: skip
    one_pass = plan.schedule == "frozen_head"
    args = (
        hidden, weight, bias, labels, keep, checked, ignore_index, float(logit_scale), softcap, compute, stored,
        plan.held_rows, one_pass, stats, backend, group,
    )  # fmt: skip
    if plan.tail_threshold is None:
        return _linear_logps, args
    most_held = plan.held_rows * schedules.walked_tokens(tokens) * stored.itemsize
    return _with_tail, (*args, Tail(plan.tail_threshold, tokens, plan.tail_tile, stored, most_held, one_pass))

"""Hidden states x weight -> token log-probs, by the walk over tiles; backward is GEMMs."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..linear import schedules, walk
from ..linear.vocab_shard import ELSEWHERE
from .flops import known_to_counters


@torch.library.custom_op("larpo_kernels::linear_logps", mutates_args=())
def _linear_logps(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [N]
    keep: Tensor | None,  # [n] the tokens that count; None: all N are walked, ignored or not
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    compute: torch.dtype,
    stored: torch.dtype,
    held_rows: int,
    one_pass: bool,
    stats: bool,
    backend: str,
    group: str = "",  # of the ranks that share the vocabulary (linear/vocab_shard.py): labels are local
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # walk.Kept; its first three over all N
    labels, counted, wrong = _labels_in_range(labels, weight.shape[0], ignore_index, group)
    head = walk.Head(weight, bias, logit_scale, softcap, compute, group)
    kept = walk.forward(
        head,
        _walked(hidden, keep, counted),
        _walked(labels, keep, counted),
        held_rows=held_rows,
        held_dtype=stored,
        one_pass=one_pass,
        stats=stats,
        backend=backend,
    )
    to_all = lambda x: _to_all(x, keep, counted, wrong)  # noqa: E731
    stats = (to_all(kept.entropy), to_all(kept.top1)) if stats else (kept.entropy, kept.top1)
    return to_all(kept.logps), *stats, *kept[3:]


def _labels_in_range(labels: Tensor, vocab_size: int, ignore_index: int, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """Labels that may index the weight, which of them count, and which were neither in range nor ignored."""
    counted = labels != ignore_index
    safe = labels.long().clamp(ELSEWHERE if group else 0, vocab_size - 1)
    return torch.where(counted, safe, 0), counted, counted & (safe != labels)


def _walked(x: Tensor, keep: Tensor | None, counted: Tensor) -> Tensor:
    """x [N, ...] of the tokens that are walked: those that count, or all with 0 for the rest; then zeros to a multiple.

    What an ignored token holds must not be read: a NaN would spread through sums over tokens.
    """
    n = counted.shape[0] if keep is None else keep.shape[0]
    if n == schedules.walked_tokens(n) == counted.shape[0] and keep is not None:
        return x
    out = x.new_zeros(schedules.walked_tokens(n), *x.shape[1:])
    if keep is None:
        out[:n] = torch.where(counted.view(-1, *[1] * (x.dim() - 1)), x, 0)
    else:
        torch.index_select(x, 0, keep, out=out[:n])
    return out


def _to_all(x: Tensor, keep: Tensor | None, counted: Tensor, wrong: Tensor) -> Tensor:
    """Results of the tokens that were walked -> of all tokens: 0 where ignored, NaN where the label was out of range."""
    if keep is None:
        x = torch.where(counted, x[: counted.shape[0]], 0)
    else:
        x = x.new_zeros(wrong.shape).index_copy_(0, keep, x[: keep.shape[0]])
    return x.masked_fill_(wrong, torch.nan)


@_linear_logps.register_fake
def _(
    hidden, weight, bias, labels, keep, ignore_index, logit_scale, softcap, compute, stored, held_rows, one_pass, stats,
    backend, group="",
):  # fmt: skip
    n = schedules.walked_tokens(hidden.shape[0] if keep is None else keep.shape[0])
    sums = torch.float64 if compute == torch.float64 else torch.float32
    all_tokens, walked = hidden.new_empty(labels.shape, dtype=sums), hidden.new_empty(n, dtype=sums)
    stat = torch.empty_like(all_tokens) if stats else all_tokens.new_empty(0)
    unit_grad = hidden.new_empty((n if one_pass else 0, hidden.shape[1]), dtype=sums)
    return (
        all_tokens, stat, torch.empty_like(stat), walked, torch.empty_like(walked), torch.empty_like(walked),
        unit_grad, hidden.new_empty((held_rows, n), dtype=stored),
    )  # fmt: skip


@torch.library.custom_op("larpo_kernels::linear_logps_backward", mutates_args=())
def _linear_logps_backward(
    grad: Tensor,  # [N], any stride
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    keep: Tensor | None,
    logps: Tensor,  # [N]
    total: Tensor,  # [n], and so on: walk.Kept
    centre: Tensor,
    level: Tensor,
    unit_grad: Tensor,
    held: Tensor,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    compute: torch.dtype,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    backend: str,
    group: str = "",
) -> tuple[Tensor, Tensor, Tensor]:  # d hidden, d weight, d bias; empty where not needed
    new = lambda x, needed: torch.empty(x.shape if needed else (0,), dtype=x.dtype, device=x.device)  # noqa: E731
    d_hidden, d_weight = new(hidden, needs_hidden), new(weight, needs_weight)
    d_bias = new(weight if bias is None else bias, needs_bias)
    labels, counted, _ = _labels_in_range(labels, weight.shape[0], ignore_index, group)
    n = hidden.shape[0] if keep is None else keep.shape[0]
    d_walked = d_hidden
    if needs_hidden and not total.shape[0] == n == hidden.shape[0]:  # padded back to N, the tokens that count are not N
        d_walked = hidden.new_empty(total.shape[0], hidden.shape[1])
    if unit_grad.shape[0]:
        walk.scale_rows(unit_grad, _walked(grad, keep, counted), d_walked)
    else:
        hidden, labels, grad, logps = (_walked(x, keep, counted) for x in (hidden, labels, grad, logps))
        walk.backward(
            walk.Head(weight, bias, logit_scale, softcap, compute, group),
            hidden,
            labels,
            grad,
            walk.Kept(logps, logps, logps, total, centre, level, unit_grad, held),
            d_hidden=d_walked if needs_hidden else None,
            d_weight=d_weight if needs_weight else None,
            d_bias=d_bias if needs_bias else None,
            backend=backend,
        )
    if needs_hidden and keep is not None and d_walked is not d_hidden:
        d_hidden.zero_().index_copy_(0, keep, d_walked[:n])
    elif d_walked is not d_hidden:
        d_hidden.copy_(d_walked[:n])
    return d_hidden, d_weight, d_bias


@_linear_logps_backward.register_fake
def _(
    grad, hidden, weight, bias, labels, keep, logps, total, centre, level, unit_grad, held,
    ignore_index, logit_scale, softcap, compute, needs_hidden, needs_weight, needs_bias, backend, group="",
):  # fmt: skip
    new = lambda x, needed: x.new_empty(x.shape if needed else (0,))  # noqa: E731
    return new(hidden, needs_hidden), new(weight, needs_weight), new(weight if bias is None else bias, needs_bias)


def _linear_setup(ctx, inputs, output):
    hidden, weight, bias, labels, keep, ignore_index, logit_scale, softcap, compute, *_, backend, group = inputs
    logps, _, _, *kept = output
    unit_grad = kept[3]
    if unit_grad.shape[0]:  # then the backward reads only their shapes: the tensors can be freed
        hidden, weight = (x.new_empty(()).expand(x.shape) for x in (hidden, weight))
    ctx.options = (ignore_index, logit_scale, softcap, compute)
    ctx.where = (backend, group)
    ctx.save_for_backward(hidden, weight, bias, labels, keep, logps, *kept)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _linear_autograd(ctx, grad, *_):
    if grad is None:
        return (None,) * 15
    needs = ctx.needs_input_grad[:3]
    grads = _linear_logps_backward(grad, *ctx.saved_tensors, *ctx.options, *needs, *ctx.where)
    return *(g if needed else None for g, needed in zip(grads, needs, strict=True)), *(None,) * 12


_linear_logps.register_autograd(_linear_autograd, setup_context=_linear_setup)


def counted_tokens(labels: Tensor, ignore_index: int) -> Tensor | None:
    """Indices [n] of the tokens that count; None where shapes may not depend on values: in a compiled graph and while a
    CUDA graph is captured. On a GPU this waits for the device: only it knows n."""
    if torch.compiler.is_compiling() or (labels.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    return (labels != ignore_index).nonzero()[:, 0]


def linear_logps(
    hidden, weight, bias, labels, keep, plan, *, ignore_index, logit_scale, softcap, stats=False, backend=None, group=""
):
    """-> logps, entropy, top1 [N] of hidden [N, H] by a schedules.Plan; keep as `counted_tokens` gives it.

    group: name of the ranks that share the vocabulary; weight, bias and labels are then this rank's (shards.VocabShard).
    """
    known_to_counters()
    compute = schedules.dtype_of_tiles(hidden, weight, sharded=bool(group))
    backend = backends.pick(backend, hidden, compute)
    stored = schedules.stored_dtype(compute, hidden.dtype)
    one_pass = plan.schedule == "frozen_head"
    return _linear_logps(
        hidden, weight, bias, labels, keep, ignore_index, float(logit_scale), softcap,
        compute, stored, plan.held_rows, one_pass, stats, backend, group,
    )[:3]  # fmt: skip

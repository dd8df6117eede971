"""The autograd graph, once, as torch.library ops: opaque to torch.compile, the same on every backend.

    token_logps     logits, labels        -> l_t                      backward: one row pass over the logits
    linear_logps    hidden, weight        -> l_t                      backward: GEMMs (schedules.py)
    candidate_logps l_t                   -> L_s                      backward: a gather
    list_stage      l_t                   -> loss, L_s, g_s           backward: a gather of c_s, formed in the forward

The vocabulary side ends in l_t, one number per token; the list side starts there. Fused losses chain the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, schedules, walk
from .layout import owners

SUM, MEAN = "sum", "mean"


def _logps_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --- logits -> token log-probs ---------------------------------------------------------------------------------------


@torch.library.custom_op("larpo_kernels::token_logps", mutates_args=())
def _token_logps(
    logits: Tensor,  # [S, T, V], unit stride on V
    labels: Tensor,  # [S, T]
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    stats: bool,
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # logps, entropy, top1: [S, T]; the last two are empty without stats
    return backends.get(backend).token_logps(logits, labels, ignore_index, logit_scale, softcap, stats)


@_token_logps.register_fake
def _(logits, labels, ignore_index, logit_scale, softcap, stats, inplace_backward, backend):
    out = logits.new_empty(labels.shape, dtype=_logps_dtype(logits))
    stat = torch.empty_like(out) if stats else out.new_empty(0)
    return out, stat, torch.empty_like(stat)


@torch.library.custom_op("larpo_kernels::token_logps_backward", mutates_args=())
def _token_logps_backward(
    grad: Tensor,  # [S, T], any strides
    logits: Tensor,
    labels: Tensor,
    logps: Tensor,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    backend: str,
) -> Tensor:  # d logits [S, T, V], contiguous
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    backends.get(backend).token_logps_backward(grad, logits, labels, logps, ignore_index, logit_scale, softcap, out)
    return out


@_token_logps_backward.register_fake
def _(grad, logits, labels, logps, ignore_index, logit_scale, softcap, backend):
    return logits.new_empty(logits.shape)


@torch.library.custom_op("larpo_kernels::token_logps_backward_", mutates_args=("logits",))
def _token_logps_backward_(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    logps: Tensor,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    backend: str,
) -> None:
    backends.get(backend).token_logps_backward(grad, logits, labels, logps, ignore_index, logit_scale, softcap, logits)


def _token_logps_setup(ctx, inputs, output):
    logits, labels, ignore_index, logit_scale, softcap, _, ctx.inplace, backend = inputs
    ctx.options = (ignore_index, logit_scale, softcap, backend)
    ctx.save_for_backward(logits, labels, output[0])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _token_logps_autograd(ctx, grad, *_):
    if grad is None:
        return (None,) * 8
    logits, labels, logps = ctx.saved_tensors
    # A traced backward may not write to a saved input; there the option has nothing to save anyway.
    if ctx.inplace and not torch.compiler.is_compiling():
        _token_logps_backward_(grad, logits, labels, logps, *ctx.options)
        return (logits,) + (None,) * 7
    return (_token_logps_backward(grad, logits, labels, logps, *ctx.options),) + (None,) * 7


_token_logps.register_autograd(_token_logps_autograd, setup_context=_token_logps_setup)


def token_logps(tokens, *, ignore_index, logit_scale, softcap, stats=False, inplace_backward=False, backend=None):
    """-> logps, entropy, top1 of layout.Tokens holding logits."""
    logits = tokens.values if tokens.values.stride(-1) == 1 else tokens.values.contiguous()
    backend = backends.pick(backend, logits)
    return _token_logps(
        logits, tokens.labels, ignore_index, float(logit_scale), softcap, stats, inplace_backward, backend
    )


# --- hidden x weight -> token log-probs ------------------------------------------------------------------------------


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # walk.Kept; its first three over all N
    labels, counted, wrong = _labels_in_range(labels, weight.shape[0], ignore_index)
    head = walk.Head(weight, bias, logit_scale, softcap, compute)
    if keep is not None:
        hidden, labels, counted = hidden[keep], labels[keep], None
    elif counted is not None:
        hidden = torch.where(counted[:, None], hidden, 0)  # NaN in an ignored row would poison sums over tokens
    kept = walk.forward(
        head, hidden, labels, held_rows=held_rows, held_dtype=stored, one_pass=one_pass, stats=stats, backend=backend
    )
    results = [_to_all(x, keep, counted, wrong) if x.shape[0] else x for x in kept[:3]]
    return *results, *kept[3:]


def _labels_in_range(labels: Tensor, vocab_size: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels that may index the weight, which of them count, and which were neither in range nor ignored."""
    counted = labels != ignore_index
    safe = labels.long().clamp(0, vocab_size - 1)
    return torch.where(counted, safe, 0), counted, counted & (safe != labels)


def _to_all(x: Tensor, keep: Tensor | None, counted: Tensor | None, wrong: Tensor) -> Tensor:
    """Results of the tokens that were walked -> of all tokens: 0 where ignored, NaN where the label was out of range."""
    x = torch.where(counted, x, 0) if keep is None else x.new_zeros(wrong.shape).index_copy_(0, keep, x)
    return x.masked_fill_(wrong, torch.nan)


@_linear_logps.register_fake
def _(
    hidden, weight, bias, labels, keep, ignore_index, logit_scale, softcap, compute, stored, held_rows, one_pass, stats, backend
):
    n = hidden.shape[0] if keep is None else keep.shape[0]
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
) -> tuple[Tensor, Tensor, Tensor]:  # d hidden, d weight, d bias; empty where not needed
    new = lambda x, needed: torch.empty(x.shape if needed else (0,), dtype=x.dtype, device=x.device)  # noqa: E731
    d_hidden, d_weight = new(hidden, needs_hidden), new(weight, needs_weight)
    d_bias = new(weight if bias is None else bias, needs_bias)
    labels, counted, _ = _labels_in_range(labels, weight.shape[0], ignore_index)
    all_tokens = d_hidden
    if keep is not None:
        hidden, labels, grad, logps = hidden[keep], labels[keep], grad[keep], logps[keep]
        d_hidden = hidden.new_empty(hidden.shape if needs_hidden else (0,))
    else:
        hidden, grad = torch.where(counted[:, None], hidden, 0), torch.where(counted, grad, 0)
    if unit_grad.shape[0]:
        walk.scale_rows(unit_grad, grad, d_hidden)
    else:
        walk.backward(
            walk.Head(weight, bias, logit_scale, softcap, compute),
            hidden,
            labels,
            grad,
            walk.Kept(logps, logps, logps, total, centre, level, unit_grad, held),
            d_hidden=d_hidden if needs_hidden else None,
            d_weight=d_weight if needs_weight else None,
            d_bias=d_bias if needs_bias else None,
            backend=backend,
        )
    if needs_hidden and keep is not None:
        d_hidden = all_tokens.zero_().index_copy_(0, keep, d_hidden)
    return d_hidden, d_weight, d_bias


@_linear_logps_backward.register_fake
def _(
    grad, hidden, weight, bias, labels, keep, logps, total, centre, level, unit_grad, held,
    ignore_index, logit_scale, softcap, compute, needs_hidden, needs_weight, needs_bias, backend,
):  # fmt: skip
    new = lambda x, needed: x.new_empty(x.shape if needed else (0,))  # noqa: E731
    return new(hidden, needs_hidden), new(weight, needs_weight), new(weight if bias is None else bias, needs_bias)


def _linear_setup(ctx, inputs, output):
    hidden, weight, bias, labels, keep, ignore_index, logit_scale, softcap, compute, *_, backend = inputs
    logps, _, _, *kept = output
    ctx.options = (ignore_index, logit_scale, softcap, compute)
    ctx.backend = backend
    ctx.save_for_backward(hidden, weight, bias, labels, keep, logps, *kept)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _linear_autograd(ctx, grad, *_):
    if grad is None:
        return (None,) * 14
    needs = ctx.needs_input_grad[:3]
    grads = _linear_logps_backward(grad, *ctx.saved_tensors, *ctx.options, *needs, ctx.backend)
    return *(g if needed else None for g, needed in zip(grads, needs, strict=True)), *(None,) * 11


_linear_logps.register_autograd(_linear_autograd, setup_context=_linear_setup)


def linear_logps(hidden, weight, bias, labels, plan, *, ignore_index, logit_scale, softcap, stats=False, backend=None):
    """-> logps, entropy, top1 [N] of hidden [N, H] by a schedules.Plan."""
    backend = backends.pick(backend, hidden)
    compute = schedules.compute_dtype(hidden.dtype, weight.dtype, hidden.device.type)
    stored = schedules.stored_dtype(compute, hidden.dtype)
    keep = None
    if not _static_shapes(hidden):  # how many tokens count is known to the device only; on a GPU this waits for it
        keep = (labels != ignore_index).nonzero()[:, 0]
    one_pass = plan.schedule == "frozen_head"
    return _linear_logps(
        hidden, weight, bias, labels, keep, ignore_index, float(logit_scale), softcap,
        compute, stored, plan.held_rows, one_pass, stats, backend,
    )[:3]  # fmt: skip


def _static_shapes(x: Tensor) -> bool:
    """Whether shapes may not depend on values: in a compiled graph and while a CUDA graph is captured."""
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


# --- token log-probs -> candidates -----------------------------------------------------------------------------------


@torch.library.custom_op("larpo_kernels::candidate_logps", mutates_args=())
def _candidate_logps(
    logps: Tensor,  # [N], 0 where ignored
    counted: Tensor | None,  # [N] bool: given, the mean over the tokens that count; None, the sum
    cu_tokens: Tensor,  # [S+1]
    backend: str,
) -> tuple[Tensor, Tensor]:  # L [S], dL/dl of each candidate's tokens [S]
    return backends.get(backend).candidate_logps(logps, counted, cu_tokens)


@_candidate_logps.register_fake
def _(logps, counted, cu_tokens, backend):
    out = logps.new_empty(cu_tokens.shape[0] - 1)
    return out, torch.empty_like(out)


def _candidate_setup(ctx, inputs, output):
    ctx.num_tokens = inputs[0].shape[0]
    ctx.save_for_backward(inputs[2], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _candidate_autograd(ctx, grad, _):
    if grad is None:
        return None, None, None, None
    cu_tokens, share = ctx.saved_tensors
    return _spread(grad * share, cu_tokens, ctx.num_tokens), None, None, None


_candidate_logps.register_autograd(_candidate_autograd, setup_context=_candidate_setup)


def _spread(per_segment: Tensor, cu: Tensor, n: int) -> Tensor:
    """The value of its segment for each of n items; no items, no segments: empty."""
    if n == 0 or per_segment.shape[0] == 0:
        return per_segment.new_zeros(n)
    return per_segment[owners(cu, n)]


def candidate_logps(logps, counted, cu_tokens, backend):
    backend = backends.pick(backend, logps)
    return _candidate_logps(logps.reshape(-1), counted, cu_tokens, backend)[0]


# --- token log-probs -> lists ----------------------------------------------------------------------------------------


@torch.library.custom_op("larpo_kernels::list_stage", mutates_args=())
def _list_stage(
    logps: Tensor,  # [N], 0 where ignored
    counted: Tensor | None,  # [N] bool: given, candidates average over the tokens that count; None, they sum
    cu_tokens: Tensor | None,  # [S+1]; None: every token is a candidate
    cu_lists: Tensor,  # [L+1]
    relevance: Tensor,  # [S]
    ref_logps: Tensor | None,  # [S]
    beta: float,
    objective: str,
    weighting: str,
    k: int,
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # loss [L], logps [S], scores [S], c = dloss/dl of the candidate's tokens [S]
    return backends.get(backend).list_stage(
        logps, counted, cu_tokens, cu_lists, relevance, ref_logps, beta, objective, weighting, k, temperature
    )


@_list_stage.register_fake
def _(logps, counted, cu_tokens, cu_lists, relevance, ref_logps, beta, objective, weighting, k, temperature, backend):
    out = logps.new_empty(relevance.shape, dtype=_logps_dtype(logps))
    return out.new_empty(cu_lists.shape[0] - 1), out, torch.empty_like(out), torch.empty_like(out)


def _list_setup(ctx, inputs, output):
    logps, _, cu_tokens, cu_lists, *_ = inputs
    ctx.num_tokens, ctx.dtype, ctx.per_token = logps.shape[0], logps.dtype, cu_tokens is None
    ctx.save_for_backward(output[3], cu_lists, *(() if ctx.per_token else (cu_tokens,)))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _list_autograd(ctx, grad, *_):
    if grad is None:
        return (None,) * 12
    c, cu_lists, *cu_tokens = ctx.saved_tensors
    c = c * _spread(grad, cu_lists, c.shape[0])
    if not ctx.per_token:
        c = _spread(c, cu_tokens[0], ctx.num_tokens)
    return (c.to(ctx.dtype),) + (None,) * 11


_list_stage.register_autograd(_list_autograd, setup_context=_list_setup)


def list_stage(logps, counted, cu_tokens, cu_lists, relevance, ref_logps, objective, *, beta, backend):
    """-> loss [L] (differentiable), logps [S], scores [S]."""
    backend = backends.pick(backend, logps)
    loss, logps, scores, _ = _list_stage(
        logps.reshape(-1),
        counted,
        cu_tokens,
        cu_lists,
        relevance,
        ref_logps,
        float(beta),
        objective.name,
        getattr(objective, "weighting", None) or "none",
        getattr(objective, "k", None) or 0,
        float(getattr(objective, "temperature", 1.0)),
        backend,
    )
    return loss, logps, scores


def reduce(loss: Tensor, reduction: str) -> Tensor:
    """[L] -> mean or sum over lists, or as it is; no lists: 0, still in the graph."""
    if reduction == "none":
        return loss
    total = loss.sum()
    return total / max(loss.shape[0], 1) if reduction == "mean" else total

"""Exact candidate micro-batching: the gradient of a whole list's loss with the activations of a slice of candidates."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from . import validation
from .objectives import Objective, implicit_rewards, listwise_loss, resolve
from .outputs import ListwiseLossOutput


def backward_in_slices(
    logps: Callable[[slice], Tensor],
    relevance: Tensor,
    *,
    list_sizes: int | Sequence[int] | Tensor,
    slice_size: int,
    num_slices: int | None = None,
    objective: str | Objective = "contrastive",
    ref_logps: Tensor | None = None,
    beta: float = 0.1,
    reduction: str = "mean",
    loss: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]] | None = None,
    backward: Callable[[Tensor], None] = torch.Tensor.backward,
    no_sync: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    replay_rng: bool = True,
) -> ListwiseLossOutput:
    """Computes the listwise loss of all candidates and accumulates its exact gradient, a slice of candidates at a time.

    The loss needs every candidate's log-likelihood at once, its gradient does not: dF/dtheta = sum_s c_s dL_s/dtheta
    with c_s = dF/dL_s. So one pass without gradient collects L, the list side gives c, and a second pass runs
    backward on (c * L).sum() per slice. Peak activation memory is that of one slice; the price is one more forward.

    Args:
        logps: given a slice of the candidate axis, returns their log-likelihoods [n] with a graph to the parameters
            (`linear_sequence_logps` of that slice, say). Called twice for each slice.
        relevance: [S] reward of each candidate, higher is better.
        list_sizes: candidates per list: an int m (S = lists * m), or sizes that sum to S. Lists may span slices.
        slice_size: candidates per slice, >= 1; the last slice may be smaller.
        num_slices: run at least so many slices, the last ones with no candidate. Where a forward or a backward is
            collective (FSDP, DDP) all ranks must run as many: pass the largest number on any rank. For an empty slice
            `logps` returns [0], with a graph through the whole model: `logps_of_any_candidate[:0]`.
        objective: "pairwise", "contrastive", "listmle", "lambdarank", "listnet", or an objective object.
        ref_logps: [S] log-likelihood of each candidate under the reference policy; None for a reference-free loss.
        beta: scale of the implicit reward, > 0.
        reduction: over lists, "mean" or "sum".
        loss: another loss of the same numbers, instead of objective, beta and reduction: given all log-likelihoods [S] and
            ref_logps, returns (one number, scores [S]). Only what it does with the log-likelihoods gets a gradient.
        backward: called with each slice's scalar instead of `Tensor.backward` (`accelerator.backward`, a loss scaler).
        no_sync: makes a context for all but the last backward (`ddp_model.no_sync`): gradients are reduced once.
        replay_rng: run each slice's second pass with the random state of its first, so that dropout draws the same
            masks and the gradient stays exact. On CUDA the state of the current device is replayed.

    Returns:
        loss, logps and scores [S], all detached, since the gradient is already in the parameters' .grad.

    Raises:
        ValueError: slice_size, reduction or another argument out of range, or `logps` returning another number of values.

    >>> theta = torch.tensor([0.5, -1.0, 2.0, 0.0], requires_grad=True)  # stands for a model
    >>> out = backward_in_slices(lambda s: theta[s] * 3, torch.tensor([3.0, 2.0, 1.0, 0.0]), list_sizes=4, slice_size=2)
    >>> theta.grad
    tensor([-0.2262,  0.0470,  0.1157,  0.0635])
    """
    if not isinstance(slice_size, int) or isinstance(slice_size, bool) or slice_size < 1:
        raise ValueError(f"slice_size must be an int >= 1, got {slice_size!r}")
    if reduction == "none":
        raise ValueError("reduction must be 'mean' or 'sum' here: a backward needs one number")
    validation.check_options(beta=beta, reduction=reduction)
    objective = resolve(objective)
    s = relevance.shape[0]
    validation.lists(list_sizes, s, relevance.device)  # refused before the first pass, not after it
    slices = [slice(a, min(a + slice_size, s)) for a in range(0, s, slice_size)]
    slices += [slice(s, s)] * max(0, (num_slices or 0) - len(slices))
    states = []
    parts = []
    with torch.no_grad():
        for at in slices:
            states.append(_rng_state() if replay_rng else None)
            parts.append(_checked(logps(at), at))
    all_logps = torch.cat(parts).detach().requires_grad_() if parts else relevance.new_zeros(0).float().requires_grad_()
    ref = validation.ref_logps(ref_logps, s, all_logps)
    with torch.enable_grad():
        if loss is None:
            scores = implicit_rewards(all_logps, ref, beta)
            value = listwise_loss(scores, relevance, list_sizes=list_sizes, objective=objective, reduction=reduction)
        else:
            value, scores = loss(all_logps, ref)
    (c,) = torch.autograd.grad(value, all_logps)
    for i, at in enumerate(slices):
        with no_sync() if i < len(slices) - 1 else contextlib.nullcontext(), _replayed(states[i]):
            backward((c[at] * logps(at)).sum())
    return ListwiseLossOutput(value.detach(), all_logps.detach(), scores.detach())


def _checked(part: Tensor, at: slice) -> Tensor:
    if tuple(part.shape) != (at.stop - at.start,):
        raise ValueError(
            f"logps must return [{at.stop - at.start}] for candidates {at.start}:{at.stop}, got shape {validation.shape(part)}"
        )
    return part


def _rng_state() -> tuple[Tensor, Tensor | None]:
    gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    return torch.get_rng_state(), gpu


@contextlib.contextmanager
def _replayed(state):
    """Runs with an earlier random state, then goes on from where the generators were."""
    if state is None:
        yield
        return
    cpu, gpu = state
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if gpu is not None else []):
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu)
        yield

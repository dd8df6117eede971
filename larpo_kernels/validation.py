"""Tokens -> candidates -> lists: what the caller handed over, validated once, in the public functions, and brought to one form.

Two borders describe a ragged layout. What is equal needs none: there is nothing to build, to check or to read then.

    cu_tokens [S+1]   candidate s owns the tokens cu_tokens[s] : cu_tokens[s+1] of the flat token axis; None: padded, [S, T]
    cu_lists  [L+1]   list l owns the candidates cu_lists[l] : cu_lists[l+1]; None: every list has list_size candidates

Checks of shape and dtype cost nothing and always run. Checks of values (labels in range, borders in order, no NaN in
relevance) read the tensors: they run where that is free, on a CPU outside torch.compile. On a GPU they would stop the
host, so the backends clamp every border, and a label out of range, borders that do not cover the tokens and lists that do
not cover the candidates give NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

SIZES = int | Sequence | torch.Tensor  # of lists
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Tokens(NamedTuple):
    """Logits or hidden states with their labels, in one form."""

    values: torch.Tensor  # [S, T, V or H] or [N, V or H]
    labels: torch.Tensor  # [S, T] or [N], int32 or int64
    cu_tokens: torch.Tensor | None  # [candidates + 1] of packed tokens; None if padded, or where candidates do not matter
    checked: bool  # the labels were read: each lies in the vocabulary or is ignored
    token_indices: torch.Tensor | None  # [n] positions on the flat token axis of those that count, if checked; None: all count

    @property
    def num_candidates(self) -> int:
        return self.values.shape[0] if self.cu_tokens is None else self.cu_tokens.shape[0] - 1


def shape(x: torch.Tensor) -> str:
    return "[" + ", ".join(str(int(n)) for n in x.shape) + "]"


def readable(x: torch.Tensor) -> bool:
    """Whether looking at the values of x is free."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def is_integer(x: torch.Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def _tensor(name: str, x: Any) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")


def _same_device(name: str, x: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{name} is on {x.device}, {other_name} is on {other.device}: both must be on one device")


def check_floats(name: str, x: Any, dims: Sequence[int], what: str) -> None:
    _tensor(name, x)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.dim() not in dims:
        raise ValueError(f"{name} must be {what}, got shape {shape(x)}")
    if torch.compiler.is_compiling():
        return
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise NotImplementedError(f"{name} carries a tangent: these ops have no forward-mode derivative (jvp, jacfwd)")
    if torch._C._are_functorch_transforms_active() and torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise NotImplementedError(
            f"{name} is inside a transform of torch.func (grad, vjp, vmap): these ops have no rule for it, use torch.autograd"
        )


def check_values(name: str, x: Any) -> None:
    """Logits or hidden states."""
    last = "V" if name == "logits" else "H"
    check_floats(name, x, (2, 3), f"[S, T, {last}] (padded) or [N, {last}] (packed)")


def tokens(
    name: str,
    values: torch.Tensor,
    labels: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    vocab_size: int,
    ignore_index: int | None,
    need_candidates: bool,
) -> Tokens:
    """Checks the labels and borders of logits or hidden states, which were checked by themselves, and returns all in one form
    without a copy. vocab_size: the range of the labels.
    """
    _tensor("labels", labels)
    if not is_integer(labels):
        raise TypeError(f"labels must have an integer dtype, got {labels.dtype}")
    if labels.shape != values.shape[:-1]:
        want = shape(values[..., 0])
        raise ValueError(f"labels must have the shape {want} of {name} without its last axis, got {shape(labels)}")
    _same_device("labels", labels, name, values)
    if ignore_index is not None and (not isinstance(ignore_index, int) or isinstance(ignore_index, bool)):
        raise TypeError(f"ignore_index must be an int or None, got {ignore_index!r}")
    if labels.dtype != torch.int64 and (labels.dtype != torch.int32 or not -(1 << 31) <= (ignore_index or 0) < 1 << 31):
        labels = labels.long()  # ignore_index or the size of the vocabulary may lie outside their range
    if vocab_size == 0 or values.shape[-1] == 0:
        raise ValueError(f"{name} must have a last axis of at least 1, got shape {shape(values)}")
    checked = readable(labels)
    token_indices = _token_indices(labels, vocab_size, ignore_index) if checked else None
    if values.dim() == 3:
        if cu_seqlens is not None:
            last = "V" if name == "logits" else "H"
            raise ValueError(f"cu_seqlens belongs to packed {name} [N, {last}]; got it with padded {name} {shape(values)}")
        return Tokens(values, labels, None, checked, token_indices)
    if need_candidates:
        cu_seqlens = _borders(cu_seqlens, values.shape[0], name, values)
    return Tokens(values, labels, cu_seqlens, checked, token_indices)


def token_mask(labels: torch.Tensor, ignore_index: int | None) -> torch.Tensor:
    """Whether each label counts; without ignore_index all do."""
    return torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index


def _token_indices(labels: torch.Tensor, vocab_size: int, ignore_index: int | None) -> torch.Tensor | None:
    """Positions of the tokens that count, None if all do; labels that are neither in range nor ignored are refused."""
    if labels.numel() == 0 or _are_all_columns(labels, vocab_size, but=-1 if ignore_index is None else ignore_index):
        return None
    flat = labels.reshape(-1)
    token_indices = token_mask(flat, ignore_index).nonzero().view(-1)
    if token_indices.shape[0] and not _are_all_columns(flat[token_indices], vocab_size):
        wrong = token_mask(labels, ignore_index) & ((labels < 0) | (labels >= vocab_size))
        where = tuple(int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"labels must lie in [0, {vocab_size}){_or_be(ignore_index)}, "
            f"got {int(labels[where])} at position {where} ({int(wrong.sum())} out of range)"
        )
    return token_indices if token_indices.shape[0] < flat.shape[0] else None


def _or_be(ignore_index: int | None) -> str:
    return "" if ignore_index is None else f" or be ignore_index={ignore_index}"


def _are_all_columns(labels: torch.Tensor, vocab_size: int, but: int = -1) -> bool:
    """Whether each label lies in the vocabulary, and none can be `but`: by one read of the smallest and the largest."""
    least, most = map(int, labels.aminmax())
    return least >= 0 and most < vocab_size and not least <= but <= most


def check_head(hidden: Any, weight: Any, bias: Any) -> None:
    """Hidden states against the head that is applied to them."""
    check_values("hidden", hidden)
    _tensor("weight", weight)
    for name, x in (("hidden", hidden), ("weight", weight)):
        if hasattr(x, "device_mesh"):
            raise TypeError(
                f"{name} is a DTensor, sharded over {x.device_mesh}: pass a whole tensor, {name}.full_tensor(), or compute "
                "the loss inside the wrapped model's forward, where FSDP has gathered it"
            )
    if weight.numel() == 0:
        raise ValueError(
            f"weight is empty, shape {shape(weight)}: a ZeRO-3 or FSDP shard that was not gathered? Gather it first "
            "(deepspeed.zero.GatheredParameters, or the loss inside the wrapped model's forward)"
        )
    check_floats("weight", weight, (2,), "[V, H]")
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must be [V, H] with H = {hidden.shape[-1]}, the last axis of hidden {shape(hidden)}; got {shape(weight)}"
        )
    _same_device("weight", weight, "hidden", hidden)
    if bias is not None:
        check_floats("bias", bias, (1,), "[V]")
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(f"bias must be [{weight.shape[0]}], one value per row of weight, got shape {shape(bias)}")
        _same_device("bias", bias, "hidden", hidden)


def _borders(cu_seqlens: Any, n: int, name: str, values: torch.Tensor) -> torch.Tensor:
    if cu_seqlens is None:
        raise ValueError(f"cu_seqlens is needed with packed {name} {shape(values)}: [S+1] token borders from 0 to {n}")
    _tensor("cu_seqlens", cu_seqlens)
    if not is_integer(cu_seqlens):
        raise TypeError(f"cu_seqlens must have an integer dtype, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must be [S+1], got shape {shape(cu_seqlens)}")
    _same_device("cu_seqlens", cu_seqlens, name, values)
    if readable(cu_seqlens):
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != n:
            raise ValueError(
                f"cu_seqlens must start at 0 and end at {n}, the number of packed tokens; "
                f"it goes from {int(cu_seqlens[0])} to {int(cu_seqlens[-1])}"
            )
        falls = (cu_seqlens[1:] < cu_seqlens[:-1]).nonzero()
        if falls.numel():
            i = int(falls[0])
            raise ValueError(
                f"cu_seqlens must not decrease, got {int(cu_seqlens[i])} then {int(cu_seqlens[i + 1])} at position {i + 1}"
            )
    return cu_seqlens.long()


def lists(
    list_sizes: int | Sequence[int] | torch.Tensor, num_candidates: int, device: torch.device
) -> tuple[torch.Tensor | None, int]:
    """Borders of the lists on the candidate axis, [L+1] int64, and the size of every list.

    Where the host knows that all lists have one size there are no borders (None); otherwise the size is 0.
    """
    if not isinstance(list_sizes, SIZES) or isinstance(list_sizes, bool | str):
        raise TypeError(f"list_sizes must be an int, a sequence of ints or an int tensor, got {type(list_sizes).__name__}")
    if isinstance(list_sizes, int):
        if list_sizes < 1:
            raise ValueError(f"list_sizes must be >= 1, got {list_sizes}")
        if num_candidates % list_sizes:
            raise ValueError(f"list_sizes={list_sizes} must divide the number of candidates, which is {num_candidates}")
        return None, list_sizes
    if isinstance(list_sizes, torch.Tensor):
        if not is_integer(list_sizes):
            raise TypeError(f"list_sizes must have an integer dtype, got {list_sizes.dtype}")
        if list_sizes.dim() != 1:
            raise ValueError(f"list_sizes must be an int or [lists], got shape {shape(list_sizes)}")
        known = list_sizes.tolist() if readable(list_sizes) else None
    else:
        known = list(list_sizes)
        if not all(isinstance(m, int) and not isinstance(m, bool) for m in known):
            raise TypeError(f"list_sizes must hold ints, got {known!r}")
    if known is not None:
        _check_sizes(known, num_candidates)
        if known and all(m == known[0] for m in known):
            return None, known[0]
    sizes = list_sizes.long() if isinstance(list_sizes, torch.Tensor) else torch.tensor(known, dtype=torch.int64)
    return torch.nn.functional.pad(_to_device(sizes, device).cumsum(0), (1, 0)), 0


def _to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x there. From pageable memory the copy would wait for all work that the GPU has under way."""
    if x.device.type == "cpu" and device.type == "cuda" and not torch.compiler.is_compiling():
        if torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "list_sizes is on the CPU, and a CUDA graph is being captured: its copy would be gone at the first replay. "
                f"Pass an int or a tensor on {device}"
            )
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def _check_sizes(sizes: Sequence[int], num_candidates: int) -> None:
    if any(m < 1 for m in sizes):
        raise ValueError(f"list_sizes must all be >= 1, got {min(sizes)}")
    if sum(sizes) != num_candidates:
        raise ValueError(f"list_sizes must sum to the number of candidates, {num_candidates}; they sum to {sum(sizes)}")


def check_scores(scores: torch.Tensor) -> None:
    check_floats("scores", scores, (1,), "[S], one per candidate")


def _per_candidate(
    name: str, x: Any, num_candidates: int, like: torch.Tensor, *, why_finite: str | None = None
) -> torch.Tensor:
    """why_finite: what has an infinite value, for the message; None where it may be infinite."""
    _tensor(name, x)
    if x.is_complex():
        raise TypeError(f"{name} must be real, got {x.dtype}")
    if tuple(x.shape) != (num_candidates,):
        raise ValueError(f"{name} must be [{int(num_candidates)}], one value per candidate, got shape {shape(x)}")
    _same_device(name, x, "the data", like)
    x = x.detach() if x.requires_grad else x
    if x.is_floating_point() and readable(x) and not math.isfinite(x.sum()):  # one read finds NaN, infinity or an overflow
        if x.isnan().any():
            raise ValueError(f"{name} must not be NaN, got NaN at position {int(x.isnan().nonzero()[0])}")
        if why_finite and x.isinf().any():
            at = int(x.isinf().nonzero()[0])
            raise ValueError(f"{name} must be finite: {why_finite} has {float(x[at])} at position {at}")
    return x


def wide(device: torch.device) -> torch.dtype:
    """float64 where the device has it (Apple's GPUs do not)."""
    return torch.float32 if device.type == "mps" else torch.float64


def relevance(
    x: Any, cu_lists: torch.Tensor | None, like: torch.Tensor, num_candidates: int, *, by_value: bool = False
) -> torch.Tensor:
    """Relevance [S], wide, so that close rewards keep their order; NaN where only the device can know that the lists do
    not cover the candidates.

    Integers that are too large for that are replaced by their ranks among all candidates, unless by_value: the objective
    reads more than an order. Then they are refused; NaN where only the device knows them.
    """
    x = _per_candidate("relevance", x, num_candidates, like)
    number = x.to(wide(like.device))
    exact = 2 ** {torch.float64: 53, torch.float32: 24}[number.dtype]
    if is_integer(x) and torch.iinfo(x.dtype).max > exact:
        if not by_value:
            number = _dense_ranks(x).to(number.dtype)
        elif not readable(x):
            number = torch.where(number.abs() < exact, number, torch.nan)
        elif number.numel() and number.abs().max() >= exact:
            at = int(number.abs().argmax())
            raise ValueError(
                f"relevance must lie between -{exact} and {exact} where the objective reads its value, or its order is lost; "
                f"got {int(x[at])} at position {at}"
            )
    if cu_lists is not None and not readable(cu_lists):
        covered = (cu_lists[-1] == num_candidates) & (cu_lists.diff() >= 1).all()
        number = torch.where(covered, number, torch.nan)
    return number


def _dense_ranks(x: torch.Tensor) -> torch.Tensor:
    """0, 1, ... for the different integers of x from the least on, without waiting for a device."""
    if x.dtype == torch.uint64:  # few operations take it
        x = x.view(torch.int64) ^ torch.iinfo(torch.int64).min
    x = x.long()
    ordered, at = x.sort()
    ranks = torch.nn.functional.pad((ordered[1:] != ordered[:-1]).long(), (1, 0)).cumsum(0)[: x.shape[0]]
    return torch.empty_like(x).scatter_(0, at, ranks)


def ref_logps(x: Any, num_candidates: int, like: torch.Tensor) -> torch.Tensor | None:
    if x is None:
        return None
    why = "a reference that rules a candidate out"  # less that of the policy it would be no number
    x = _per_candidate("ref_logps", x, num_candidates, like, why_finite=why)
    return x.to(torch.float64 if like.dtype == torch.float64 else torch.float32)


def check_options(*, beta: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None, reduction: str = "mean"):
    """The scalar options that every op shares."""
    positive("beta", beta)
    _number("logit_scale", logit_scale)
    if softcap is not None:
        positive("softcap", softcap)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def _number(name: str, x: Any) -> None:
    if isinstance(x, bool) or not isinstance(x, int | float):
        raise TypeError(f"{name} must be a float, got {type(x).__name__}")
    if not -math.inf < x < math.inf:  # math.isfinite can't be traced
        raise ValueError(f"{name} must be finite, got {x}")


def probability(name: str, x: Any) -> None:
    if isinstance(x, bool) or not isinstance(x, int | float):
        raise TypeError(f"{name} must be None or a probability, a float, got {type(x).__name__}")
    if not 0 < x < 1:
        raise ValueError(f"{name} must be None or a probability between 0 and 1, got {x}")


def positive(name: str, x: Any) -> None:
    _number(name, x)
    if x <= 0:
        raise ValueError(f"{name} must be > 0, got {x}")


def owners(cu: torch.Tensor, n: int) -> torch.Tensor:
    """For each of n items the index of its segment; borders cu [segments + 1]. Never out of range, whatever the borders."""
    inner = cu[1:-1].contiguous()  # without the outer two: no result is beyond the last segment
    return torch.searchsorted(inner, torch.arange(n, device=cu.device, dtype=cu.dtype), right=True)

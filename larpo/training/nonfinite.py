"""A loss or weights that are not finite: found before an update is made of them, and before they are written.

A loss that is NaN or infinite makes every weight NaN in one update, and nothing restores them. So each batch is checked
between its forward and its backward, on all ranks together. The CPU waits for one flag a batch (which ranks exchange), instead
of the one that transformers' logging_nan_inf_filter waits for. Gradients are not checked: under fp16 the loss scaler meets
infinite ones and skips such updates itself.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ON_NONFINITE = ("raise", "skip")
IN_A_ROW = 20  # batches left out one after the other: then it is not the batches
SKIPPING = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)  # gradients are whole on every rank


class NonFiniteError(FloatingPointError):
    """A loss, log-likelihoods or weights that are NaN or infinite."""


class SkippedBatch(Exception):
    """This batch adds nothing to its update: no rank may run its backward."""


class FiniteLoss:
    """Checks every batch of training; see the module."""

    def __init__(self, accelerator: Accelerator, on_nonfinite: str):
        self.accelerator, self.on_nonfinite = accelerator, on_nonfinite
        self.skipped = self.in_a_row = 0
        if on_nonfinite == "skip" and (kind := _no_skipping(accelerator)):
            raise ValueError(
                f"on_nonfinite='skip' works in one process and under DDP, without fp16; here is {kind}. Use 'raise'"
            )

    def check(
        self, model: nn.Module, inputs: dict[str, Any], step: int, *, may_skip: bool = True, **found: Tensor | None
    ) -> None:
        """Raises NonFiniteError, or SkippedBatch where that was asked for, if anything in `found` is NaN or infinite.

        found: the loss [] and what it was computed from [S], by name; `scores` only serve to say where it comes from.
        """
        found = {name: x.detach() for name, x in found.items() if x is not None}
        finite = torch.cat([x.reshape(-1) for name, x in found.items() if name != "scores"]).isfinite().all()
        if self.accelerator.num_processes > 1:
            finite = self.accelerator.reduce((~finite).int()) == 0
        if finite:  # waits for the forward
            self.in_a_row = 0
            return
        where, bad = _where(inputs, found), nonfinite_parameters(model)
        if self.accelerator.num_processes > 1:
            of_ranks = gather_object([(where, bad)])
            where = "; ".join(dict.fromkeys(one for one, _ in of_ranks if one))
            bad = list(dict.fromkeys(name for _, names in of_ranks for name in names))
        if self.on_nonfinite == "skip" and may_skip and not bad and self.in_a_row < IN_A_ROW:
            self.skipped += 1
            self.in_a_row += 1
            if self.accelerator.is_main_process:
                warnings.warn(f"step {step}: a batch is left out, {where}", stacklevel=2)
            raise SkippedBatch
        raise NonFiniteError(f"training stops at step {step}: {where}. {_advice(found, bad)}")


def finish_update_without(model: nn.Module, accelerator: Accelerator) -> None:
    """Replaces the backward of a batch that is left out: the last backward of an update would have exchanged gradients."""
    if accelerator.num_processes == 1 or not accelerator.sync_gradients:
        return
    for p in model.parameters():
        if p.grad is not None:  # on all ranks alike: they ran the same backwards
            torch.distributed.all_reduce(p.grad)
            p.grad /= accelerator.num_processes


def nonfinite_parameters(model: nn.Module) -> list[str]:
    """Names of parameters that hold NaN or infinity; of a sharded model in this rank's shards."""
    names, largest = [], []
    for name, p in model.named_parameters():
        values = getattr(p, "ds_tensor", p.detach())  # of ZeRO-3
        values = values.to_local() if hasattr(values, "to_local") else values
        if values.dtype in FLOATING and values.numel() and not values.is_meta:
            names.append(name)
            largest.append(torch.linalg.vector_norm(values, ord=torch.inf).float())  # no copy of the weights
    return [name for name, x in zip(names, largest, strict=True) if not x.isfinite()]


def refuse_nonfinite_weights(model: nn.Module, where: Any, accelerator: Accelerator | None = None) -> None:
    """Raises NonFiniteError for a model that must not be written. accelerator: of a sharded model; all its ranks call this."""
    bad = nonfinite_parameters(model)
    if accelerator is not None:
        bad = list(dict.fromkeys(name for names in gather_object([bad]) for name in names))
    if bad:
        raise NonFiniteError(f"{_parameters(bad)}: training has diverged, and nothing is written to {where}. {LOWER}")


LOWER = "Train again, in another output_dir, with a lower learning_rate or max_grad_norm, or a longer warm-up"


def _no_skipping(accelerator: Accelerator) -> str | None:
    if accelerator.distributed_type not in SKIPPING:
        return accelerator.distributed_type.value
    return "fp16" if accelerator.mixed_precision == "fp16" else None


def _where(inputs: dict[str, Any], found: dict[str, Tensor]) -> str:
    """What of a batch is not finite, and in which rows of the data; "" where all is."""
    lists = torch.arange(len(inputs["list_sizes"])).repeat_interleave(inputs["list_sizes"].cpu())
    numbers = inputs["row_number"].tolist() if "row_number" in inputs else list(range(len(inputs["list_sizes"])))
    parts = []
    for name, x in found.items():
        bad = ~x.isfinite().cpu()
        if x.dim() == 0 and bad:
            parts.append(f"the {name} is {x.item()} in the batch of rows {_some(numbers)}")
        elif bad.any():
            rows = [numbers[i] for i in lists[bad].unique().tolist()]
            parts.append(f"{int(bad.sum())} of {len(x)} {name} are not finite, in rows {_some(rows)}")
    return ", ".join(parts)


def _advice(found: dict[str, Tensor], bad: list[str]) -> str:
    if bad:
        return f"{_parameters(bad)}: an earlier update had a gradient that was not. {LOWER}"
    if "logps" in found and not found["logps"].isfinite().any():
        return f"The weights are finite, as before this step, but may have become too large. {LOWER}"
    return (
        "The weights are finite, as before this step. Look at these rows (numbered from 0) and at the reference's "
        "log-likelihoods of them; on_nonfinite='skip' leaves such batches out and counts them"
    )


def _parameters(bad: list[str]) -> str:
    return f"{len(bad)} of the model's parameters are not finite ({_some(bad)})"


def _some(items: list[Any], most: int = 8) -> str:
    shown = ", ".join(map(str, items[:most]))
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"

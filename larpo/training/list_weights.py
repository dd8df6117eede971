"""Every list of an update weighs the same, and none twice: over accumulated batches of different sizes and over ranks.

The gradient of an update is that of the mean loss over the N lists of its accumulation window on all ranks. A batch of n of
them has the mean loss F, and what it adds is n F / N. Libraries divide by other numbers: transformers by the batches of the
window, DDP, FSDP and DeepSpeed by the ranks. So a batch counts as one of N / (n ranks) batches of its size.

Where the lists of an epoch do not fill every rank's last batch, accelerate fills it with lists from the epoch's beginning:
each rank must run a batch, since forwards and backwards are collective. Those are run and left out of what is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.collator import first_lists

if TYPE_CHECKING:
    from accelerate import Accelerator

Batch = dict[str, Any]


def lists_of_window(batches: Sequence[Batch], accelerator: Accelerator) -> int | Tensor:
    """Lists of these batches on all ranks; with several ranks a tensor [] that stays on the device, so that the CPU does not
    wait for it."""
    lists = sum(len(batch["list_sizes"]) for batch in batches)
    if accelerator.num_processes == 1:
        return lists
    return accelerator.reduce(torch.full((), lists, device=accelerator.device))


def batches_of_window(lists: int | Tensor, batch: Batch, accelerator: Accelerator) -> float | Tensor:
    """The number to divide this batch's mean loss by, in an accumulation window of so many lists on all ranks."""
    return lists / (max(1, len(batch["list_sizes"])) * accelerator.num_processes)  # the loss of no list is 0


def without_repeats(batch: Batch, accelerator: Accelerator) -> Batch:
    """The batch that a prepared data loader has just given, without the lists that only fill it up."""
    state = accelerator.gradient_state
    if not state.end_of_dataloader:
        return batch
    own = _own_lists(state.active_dataloader)
    return batch if own is None else first_lists(batch, own)


def _own_lists(dataloader: Any) -> int | None:
    """Lists of this rank's last batch that no rank has had; None for all.

    Ranks take whole batches in turn (accelerate.data_loader.BatchSamplerShard), so what is left goes to the first ranks.
    """
    shard = getattr(dataloader, "batch_sampler", None)
    while shard is not None and not hasattr(shard, "process_index"):
        shard = getattr(shard, "batch_sampler", None)
    if shard is None or shard.drop_last or not shard.even_batches:
        return None
    if shard.batch_size is None:  # batches of different sizes: those that fill up are repeated whole
        left = len(shard.batch_sampler) % shard.num_processes
        return 0 if left and shard.process_index >= left else None
    left = len(shard.batch_sampler.sampler) % (shard.batch_size * shard.num_processes)
    return max(0, min(left - shard.process_index * shard.batch_size, shard.batch_size)) if left else None

"""What FSDP and DeepSpeed do to parameters: whether they are cut over processes, replaced in place, or held gathered."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from accelerate.utils import DistributedType
from torch import nn

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import TrainingArguments


def on_deepspeed(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether parameters are cut over processes: by FSDP and ZeRO-3. ZeRO-1 and 2 leave them whole."""
    if on_deepspeed(accelerator):
        return accelerator.state.deepspeed_plugin.zero_stage == 3
    return accelerator.distributed_type == DistributedType.FSDP


def will_replace_parameters(args: TrainingArguments) -> bool:
    """Whether FSDP or DeepSpeed will shard or cast parameters in place; known before accelerate is set up."""
    asked = (os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true" for name in ("FSDP", "DEEPSPEED"))
    return bool(args.fsdp or args.deepspeed) or any(asked)


@contextlib.contextmanager
def whole_weights() -> Iterator[None]:
    """A model that is loaded within has its weights in every process. With fsdp_cpu_ram_efficient_loading, as FSDP is to hand
    them on, some versions of transformers read them in one process of a node, and all make new ones (a head) only there."""
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before = os.environ.pop(name, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before


def most_of_all_ranks(n: int, device: torch.device) -> int:
    most = torch.tensor(n, device=device)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return int(most)


def reshard(model: nn.Module) -> None:
    """Frees the weights that FSDP2 keeps gathered until a backward (the head, the last norm); without FSDP2 it does nothing."""
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()

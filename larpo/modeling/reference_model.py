"""A copy of the policy as the reference, which training leaves unchanged or moves slowly."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

REFERENCE_FILE = "reference.safetensors"


def frozen_copy(model: nn.Module, *, share_frozen: bool = True) -> nn.Module:
    """The model as it is now, without gradients, in eval mode.

    share_frozen: parameters that do not require grad are not copied but shared: with LoRA or a frozen trunk the
    reference costs only what is trained. Must be off where parameters are sharded over processes.
    """
    shared = {id(p): p for p in model.parameters() if not p.requires_grad} if share_frozen else {}
    reference = copy.deepcopy(model, memo=shared)
    return reference.requires_grad_(False).eval()


def without_dropout(model: nn.Module) -> nn.Module:
    """Sets every dropout of the model to 0: modules, and numbers that a forward reads (`self.dropout`, `self.layerdrop`)."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model


class SyncReference(TrainerCallback):
    """Moves the reference towards the policy: ref = alpha * policy + (1 - alpha) * ref, every `steps` steps.

    `save` and `load` are for checkpoints, which hold the policy only. All processes call them.
    """

    def __init__(self, policy: nn.Module, reference: nn.Module, alpha: float, steps: int):
        self.policy, self.reference = policy, reference  # not their parameters: sharded ones may take their place
        self.alpha, self.steps = alpha, steps

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps == 0:
            for _, policy, reference in self._moved():
                reference.lerp_(policy.to(reference.dtype), self.alpha)

    def _moved(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        """(name, the policy's, the reference's) of the parameters that are not shared; shared ones are not trained."""
        for (name, policy), reference in zip(self.policy.named_parameters(), self.reference.parameters(), strict=True):
            if reference is not policy:
                yield name, policy, reference

    @torch.no_grad()
    def save(self, folder: str | Path, *, write: bool) -> None:
        """Writes the parameters that moved, whole, on the process with `write`."""
        from safetensors.torch import save_file

        whole = {name: _whole(p).cpu().contiguous() for name, _, p in self._moved()}
        if write:
            Path(folder).mkdir(parents=True, exist_ok=True)
            save_file(whole, Path(folder) / REFERENCE_FILE)

    @torch.no_grad()
    def load(self, folder: str | Path) -> None:
        """Loads what `save` wrote. Raises ValueError where nothing was written."""
        from safetensors.torch import load_file

        path = Path(folder) / REFERENCE_FILE
        if not path.is_file():
            raise ValueError(
                f"{folder} holds no {REFERENCE_FILE}: with sync_ref_model a run goes on only from a checkpoint that was "
                "written with it, since the reference has moved"
            )
        whole = load_file(path)
        for name, _, p in self._moved():
            p.copy_(_laid_out_as(whole[name].to(p.device), p))


def _whole(p: Tensor) -> Tensor:
    return p.full_tensor() if hasattr(p, "full_tensor") else p  # FSDP2 shards it


def _laid_out_as(whole: Tensor, p: Tensor) -> Tensor:
    if not hasattr(p, "full_tensor"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, p.device_mesh, p.placements)

"""The reference policy: the policy as it is now, held apart from what training does to it."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import TrainerCallback


def frozen_copy(model: nn.Module, *, share_frozen: bool = True) -> nn.Module:
    """The model as it is now, without gradients, in eval mode.

    share_frozen: parameters that do not require grad are not copied but shared: with LoRA or a frozen trunk the
    reference costs only what is trained. Must be off where parameters are sharded over processes.
    """
    shared = {id(p): p for p in model.parameters() if not p.requires_grad} if share_frozen else {}
    reference = copy.deepcopy(model, memo=shared)
    return reference.requires_grad_(False).eval()


def without_dropout(model: nn.Module) -> nn.Module:
    """Sets every dropout of the model to 0, those that attention reads off an attribute included."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model


def reshard(model: nn.Module) -> None:
    """Lets go of what FSDP2 keeps gathered until a backward (the head, the last norm); without FSDP2 it does nothing."""
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class SyncReference(TrainerCallback):
    """Moves the reference towards the policy: ref = alpha * policy + (1 - alpha) * ref, every `steps` steps."""

    def __init__(self, policy: nn.Module, reference: nn.Module, alpha: float, steps: int):
        self.policy, self.reference = policy, reference  # not their parameters: sharded ones may take their place
        self.alpha, self.steps = alpha, steps

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps == 0:
            for reference, policy in zip(self.reference.parameters(), self.policy.parameters(), strict=True):
                if reference is not policy:  # shared parameters are not trained
                    reference.lerp_(policy.to(reference.dtype), self.alpha)

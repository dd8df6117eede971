"""PEFT adapters: from settings, and onto a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig


def with_adapter(model: nn.Module, peft_config: PeftConfig) -> nn.Module:
    """The model with this adapter on it. Raises ImportError without peft, ValueError if it has one, TypeError for no config."""
    try:
        import peft
    except ImportError:
        raise ImportError("peft_config needs peft: pip install 'larpo_kernels[train]'") from None
    if isinstance(model, peft.PeftModel):
        raise ValueError("model has a PEFT adapter already: give either such a model or peft_config, not both")
    if not isinstance(peft_config, peft.PeftConfig):
        raise TypeError(f"peft_config must be a peft.PeftConfig, such as peft.LoraConfig; got {type(peft_config).__name__}")
    return peft.get_peft_model(model, peft_config)


def lora_config(settings: dict[str, Any]) -> LoraConfig:
    """peft.LoraConfig of these settings, for a causal LM. Raises ValueError for one that it does not have."""
    import peft

    try:
        return peft.LoraConfig(**{"task_type": "CAUSAL_LM", **settings})
    except TypeError as error:
        raise ValueError(f"peft: {error}") from None

"""PEFT adapters: from settings, and onto a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..runs.files import write_whole
from . import adapter_start
from .sharding import will_replace_parameters

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig, PeftModel
    from transformers import PreTrainedModel

    from ..config import LarPOConfig
    from .adapter_start import AdapterStart

MERGED_BASE = "merged-base"


def check_adapter(model: nn.Module, peft_config: PeftConfig | None) -> None:
    """Refuses what cannot be trained as an adapter, before anything slow is done.

    Raises ImportError without peft; ValueError for a model whose adapter layers are not in a PeftModel, or that has an
    adapter beside peft_config, and for adapters that cannot be trained here; TypeError where peft_config is none.
    """
    refuse_injected(model)
    if peft_config is None:
        for config in getattr(model, "peft_config", {}).values():
            _refuse_kind(config)
        return
    try:
        import peft
    except ImportError:
        raise ImportError("peft_config needs peft: pip install 'larpo_kernels[train]'") from None
    if isinstance(model, peft.PeftModel):
        raise ValueError(
            "model has a PEFT adapter already: give such a model or peft_config, not both. To train a new adapter on top, give "
            "the adapter's folder as `model`, or model.merge_and_unload()"
        )
    if not isinstance(peft_config, peft.PeftConfig):
        raise TypeError(f"peft_config must be a peft.PeftConfig, such as peft.LoraConfig; got {type(peft_config).__name__}")
    _refuse_kind(peft_config)


def with_adapter(model: nn.Module, peft_config: PeftConfig) -> PeftModel:
    """The model with this adapter on it. Raises as `check_adapter`."""
    check_adapter(model, peft_config)
    import peft

    return peft.get_peft_model(model, peft_config)


def with_new_adapter(
    model: nn.Module, peft_config: PeftConfig, ids: Sequence[int], args: LarPOConfig
) -> tuple[PeftModel, AdapterStart]:
    """The model with this adapter on it, ready to be trained, and what the adapter changed, found on the tokens `ids`."""
    if not (will_replace_parameters(args) or hasattr(model, "hf_device_map")):
        model.to(args.device)  # where transformers.Trainer takes it: it is called before that
    before = adapter_start.handed_over(model, ids)
    adapted = with_adapter(model, peft_config)
    start = adapter_start.compare(adapted, before, ids)
    if args.gradient_checkpointing:
        adapted.enable_input_require_grads()
    return adapted, start


def refuse_injected(model: nn.Module) -> None:
    """Raises ValueError for adapter layers that stand in a model without a PeftModel around it.

    transformers puts them there (`from_pretrained` on an adapter's folder, `add_adapter`), and so do PEFT's mixed models and
    the model inside a PeftModel. Nothing switches them off, and what is saved of them is not what was trained.
    """
    try:
        from peft import PeftModel
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        return
    if not isinstance(model, PeftModel) and any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "model has adapter layers, but is no PeftModel (transformers puts them into a model that is loaded from an "
            "adapter's folder): give the adapter's folder as `model`, or PeftModel.from_pretrained(base, folder, "
            "is_trainable=True)"
        )


def has_adapter(model: nn.Module) -> bool:
    """Whether the model is a PeftModel."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


@contextmanager
def switched_off(model: PeftModel) -> Iterator[None]:
    """As PEFT's `disable_adapter`, without its report on every layer, which warns where some are on and some off: it takes
    longer than the switch, and a step whose reference is the adapter's base would make it each time."""
    if not any(getattr(module, "disable_adapters", True) is False for module in model.modules()):
        yield  # off already, and stays so
        return
    model.base_model.disable_adapter_layers()
    try:
        yield
    finally:
        model.base_model.enable_adapter_layers()


def merged(model: PeftModel, folder: Path, *, write: bool) -> PreTrainedModel:
    """The model inside with its adapter merged into its weights; the policy is what it was.

    It is written to folder/merged-base, since an adapter that is trained on it is of no use without it, and takes that path
    for its name, which adapters on it are saved with.
    """
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise ValueError("model is an adapter's folder, whose weights can't be merged under ZeRO-3: merge it before training")
    whole = model.merge_and_unload()
    path = (folder / MERGED_BASE).resolve()
    if write:
        write_whole(path, whole.save_pretrained)
    whole.name_or_path = whole.config._name_or_path = str(path)
    return whole


def lora_config(settings: dict[str, Any]) -> LoraConfig:
    """peft.LoraConfig of these settings, for a causal LM. Raises ValueError for one that it does not have."""
    import peft

    try:
        return peft.LoraConfig(**{"task_type": "CAUSAL_LM", **settings})
    except TypeError as error:
        raise ValueError(f"peft: {error}") from None


def _refuse_kind(config: PeftConfig) -> None:
    if getattr(config, "alora_invocation_tokens", None):
        raise ValueError(
            "alora_invocation_tokens must be None: an activated LoRA works from these tokens on, and only PeftModel.forward "
            "tells it where they are, so that here it would never be trained"
        )
    if str(getattr(config, "init_lora_weights", "")).startswith("pissa_niter"):
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} takes a random approximation from the base, and another one when "
            "the saved adapter is loaded: what was trained could not be read back. Use 'pissa'"
        )
    if type(config).__name__ == "AdaLoraConfig":
        warnings.warn(
            "AdaLoRA is trained with the ranks it starts with: nothing here calls update_and_allocate, and its "
            "orthogonality loss is not added",
            stacklevel=5,
        )

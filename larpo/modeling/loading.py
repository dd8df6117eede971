"""Causal LMs by name, in a dtype that can be trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_causal_lm(name: str, options: dict[str, Any] | None = None) -> PreTrainedModel:
    """AutoModelForCausalLM.from_pretrained(name, **options), in float32 unless the options say otherwise.

    transformers loads a checkpoint in its own dtype, mostly bf16. Weights there have 8 bits: an update of 1e-6 to one of
    1e-2 is rounded away. Checkpoints that are quantised keep their dtype.
    """
    from transformers import AutoModelForCausalLM

    options = dict(options or {})
    if not {"dtype", "torch_dtype", "quantization_config"} & options.keys() and not _is_quantised(name, options):
        options["dtype"] = "float32"
    return AutoModelForCausalLM.from_pretrained(name, **options)


def _is_quantised(name: str, options: dict[str, Any]) -> bool:
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(name, **options)
    except OSError:  # the folder of an adapter, or what from_pretrained is about to complain of
        return False
    return config.get("quantization_config") is not None

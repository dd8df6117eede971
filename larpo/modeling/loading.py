"""Causal LMs by name, in a dtype that can be trained; the folder of an adapter gives its model with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runs.intact import refuse_damaged_model

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from transformers import PreTrainedTokenizerBase


def load_causal_lm(name: str, options: dict[str, Any] | None = None, *, base: str | None = None) -> nn.Module:
    """AutoModelForCausalLM.from_pretrained(name, **options), in float32 unless the options say otherwise.

    transformers loads a checkpoint in its own dtype, mostly bf16. Weights there have 8 bits: an update of 1e-6 to one of
    1e-2 is rounded away. Checkpoints that are quantised keep their dtype. Raises Damaged, a ValueError, for a folder with a
    file that was not written to its end.

    The folder or name of an adapter gives a PeftModel whose adapter can be trained, on `base` or the model that it was
    trained on. (transformers itself puts adapter layers into the model, where nothing switches them off.)
    """
    from transformers import AutoModelForCausalLM

    if Path(name).is_dir():
        refuse_damaged_model(Path(name))
    options = dict(options or {})
    adapter = adapter_config(name, options)
    if adapter is not None:
        return _with_trained_adapter(name, adapter, options, base or adapter.base_model_name_or_path)
    if not {"dtype", "torch_dtype", "quantization_config"} & options.keys() and not _is_quantised(name, options):
        options["dtype"] = "float32"
    return AutoModelForCausalLM.from_pretrained(name, **options)


def load_tokenizer(name: str, options: dict[str, Any] | None = None) -> PreTrainedTokenizerBase:
    """AutoTokenizer.from_pretrained(name); for an adapter's folder without a tokenizer, that of the adapter's model."""
    from transformers import AutoTokenizer

    kept = {key: value for key, value in (options or {}).items() if key in ("trust_remote_code", "revision", "token")}
    adapter = adapter_config(name, kept)
    if adapter is not None:
        from transformers.utils import cached_file

        here = {key: kept[key] for key in ("revision", "token") if key in kept}
        if cached_file(name, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False, **here) is None:
            name = adapter.base_model_name_or_path
            kept.pop("revision", None)
    return AutoTokenizer.from_pretrained(name, **kept)


def adapter_config(name: str, options: dict[str, Any]) -> PeftConfig | None:
    """What an adapter's folder or repository says of it; None where `name` is none. Raises ImportError without peft."""
    from transformers.utils.peft_utils import find_adapter_config_file

    where = {key: options[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in options}
    if find_adapter_config_file(name, **where) is None:
        return None
    try:
        from peft import PeftConfig
    except ImportError:
        raise ImportError(f"{name} is an adapter, which needs peft: pip install 'larpo_kernels[train]'") from None
    return PeftConfig.from_pretrained(name, **where)


def _with_trained_adapter(name: str, adapter: PeftConfig, options: dict[str, Any], base: str) -> nn.Module:
    from peft import PeftModel

    of_base = {key: value for key, value in options.items() if key != "revision"}
    if adapter.revision is not None:
        of_base["revision"] = adapter.revision
    model = load_causal_lm(base, of_base)
    if isinstance(model, PeftModel):
        raise ValueError(f"{name} is an adapter on {base}, which is an adapter too: merge that one first")
    where = {key: options[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in options}
    adapted = PeftModel.from_pretrained(model, name, is_trainable=True, **where)
    adapted.name_or_path = name
    return adapted


def _is_quantised(name: str, options: dict[str, Any]) -> bool:
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(name, **options)
    except OSError:  # what from_pretrained is about to complain of
        return False
    return config.get("quantization_config") is not None

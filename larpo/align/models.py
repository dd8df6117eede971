"""The models of a run, loaded from where they stand: at most one is held at a time."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..runs.files import whole_path
from .config import AlignConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Models:
    """Loads policies for the stages, and keeps the one that was asked for last.

    Policies are always read back from the run folder, so that a run that goes on after a kill has the same one as a
    run that was never killed.
    """

    config: AlignConfig
    device: torch.device
    sharded: bool = False  # in training: FSDP or DeepSpeed take it from the CPU
    _name: tuple[str, torch.device] | None = None
    _model: Any = None
    _tokenizer: Any = None
    _trained: weakref.ref | None = None
    initial: str = field(init=False)  # name on the hub, or folder by its whole path, of the model that the run starts from

    def __post_init__(self):
        if self.config.model == "smollm2":
            from ..offline import smollm2_folder

            self.initial = str(smollm2_folder())
        else:
            self.initial = whole_path(self.config.model)

    def load(self, name: str | Path) -> PreTrainedModel:
        """The model of this name or folder, in eval mode, on the device; an adapter's folder gives its model with it."""
        return self._held(str(name), self.device)

    def load_for_training(self, name: str | Path) -> PreTrainedModel:
        """As `load`, to be trained: the next `load` of this name reads it again."""
        model = self._held(str(name), self._device_to_train_from())
        self._name = self._model = None
        self._trained = weakref.ref(model)
        return model

    def load_reference(self) -> PreTrainedModel:
        """The initial model as the reference of the one that is trained."""
        return self._held(self.initial, self._device_to_train_from())

    def _device_to_train_from(self) -> torch.device:
        return torch.device("cpu") if self.sharded else self.device

    def _held(self, name: str, device: torch.device) -> PreTrainedModel:
        if (name, device) != self._name:
            if self._model is not None:
                self.release()
            self._model = self._load(name).to(device).eval()
            self._name = name, device
        return self._model

    def release(self) -> None:
        """Frees the model that is held."""
        held = None if self._model is None else weakref.ref(self._model)
        self._name = self._model = None
        self._freed(held)

    def release_all(self) -> None:
        """Frees the model that is held, and the one that was trained, with the trainer that is done with it."""
        self.release()
        self._freed(self._trained)
        self._trained = None

    def _freed(self, model: weakref.ref | None) -> None:
        """A trainer and its model refer to each other. Collecting such circles takes longer than loading a small model, so it
        is done only if there is one."""
        if model is not None and model() is not None:
            gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            from ..modeling.loading import load_tokenizer

            self._tokenizer = load_tokenizer(self.initial, self.config.model_init_kwargs)
        return self._tokenizer

    def eos_token_ids(self) -> tuple[int, ...] | None:
        """Of the tokens that end a completion, where the settings name them. Raises ValueError for one that is none."""
        from ..data.endings import token_ids_of

        return None if self.config.eos_token is None else token_ids_of(self.tokenizer, self.config.eos_token)

    def _load(self, name: str) -> PreTrainedModel:
        from ..modeling.loading import adapter_config, load_causal_lm

        initial = adapter_config(self.initial, self.config.model_init_kwargs or {})
        base = self.initial if initial is None else initial.base_model_name_or_path  # an iteration's adapter is on that
        return load_causal_lm(name, self.config.model_init_kwargs, base=base)

    def check(self) -> None:
        """Raises ValueError for an unknown `eos_token`, and for an adapter or `trained_layers` that does not fit the model. It
        needs no weights, and runs before anything is sampled."""
        config = self.config
        self.eos_token_ids()
        if config.peft is None and config.trained_layers is None:
            return
        from ..modeling.adapters import lora_config, with_adapter
        from ..modeling.loading import adapter_config

        if adapter_config(self.initial, config.model_init_kwargs or {}) is not None:
            name = "peft" if config.peft is not None else "trained_layers"
            raise ValueError(
                f"{name} must be left out where model={config.model!r} is an adapter's folder, whose adapter is trained on; or "
                "merge it first: PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(...)"
            )
        adapter = None if config.peft is None else lora_config(config.peft)
        model = self._without_weights()
        if model is None:
            return
        with torch.device("meta"):
            if config.trained_layers is not None:
                train_last_layers(model, config.trained_layers)
            if adapter is not None:
                adapter.init_lora_weights = False  # some ways to begin are computed from weights
                try:
                    with_adapter(model, adapter)
                except ValueError as error:
                    raise ValueError(f"peft: {error}") from None

    def _without_weights(self) -> PreTrainedModel | None:
        """The initial model on the meta device; None where it can't be made there, or by itself (an adapter's folder)."""
        from transformers import AutoConfig, AutoModelForCausalLM

        given = self.config.model_init_kwargs
        options = {name: given[name] for name in ("trust_remote_code", "revision") if name in given}
        try:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.initial, **options), **options)
        except (OSError, RuntimeError):
            return None


def train_last_layers(model: nn.Module, n: int) -> nn.Module:
    """Only the last n decoder layers require grad: what lies below needs no backward, and the reference shares it.

    Raises ValueError where the model has fewer layers, or its layers are not one list.
    """
    depth = model.config.get_text_config().num_hidden_layers
    layers = next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth), None)
    if layers is None:
        raise ValueError(f"trained_layers={n}: {type(model).__name__} has no list of its {depth} layers")
    if n > depth:
        raise ValueError(f"trained_layers={n}, but {type(model).__name__} has {depth} layers")
    model.requires_grad_(False)
    for layer in layers[depth - n :]:
        layer.requires_grad_(True)
    return model

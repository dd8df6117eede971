"""From a causal LM's last hidden states to its logits: which weight, which bias, and what is done to the logits after.

Models differ in that last step (a soft cap, a factor, a bias, LoRA on the head). A table knows the families; a numeric
check against the model's own logits catches those that it does not know, and those that change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .eval_mode import in_eval_mode

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

T = TypeVar("T")


class Unsupported(Exception):
    """Why a model's logits cannot be had as post(hidden @ weight^T + bias)."""


class HeadInputs(NamedTuple):
    """Arguments of `larpo_kernels.linear_sequence_logps`: logits = hidden @ weight^T + bias."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]


@dataclass(frozen=True)
class PostProcessing:
    """What a model does to its logits after the head: z = softcap * tanh(logit_scale * x / softcap)."""

    logit_scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        z = logits * self.logit_scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


# (attribute of the config, start of model_type, whether the factor divides); the first row that matches is taken
FACTORS = (
    ("logit_scale", "cohere", False),
    ("logits_scaling", "hyperclovax", False),
    ("logits_scaling", "granite", True),
    ("logits_scaling", "minicpm", True),
    ("lm_head_multiplier", "falcon_h1", False),
    ("output_multiplier", "muse_", False),
)


def post_processing(config: PretrainedConfig) -> PostProcessing:
    """What a model of this config does to its logits, as far as the table knows; `check` has the last word."""
    config = config.get_text_config()
    scale = 1.0
    for attribute, family, divides in FACTORS:
        value = getattr(config, attribute, None)
        if value is not None and config.model_type.startswith(family):
            scale = 1.0 / value if divides else float(value)
            break
    softcap = getattr(config, "final_logit_softcapping", None)
    return PostProcessing(scale, None if softcap is None else float(softcap))


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


AdapterState = tuple[bool, bool, tuple[str, ...]]


def adapter_state(lm: PreTrainedModel) -> AdapterState:
    """What PEFT does to the head at this moment: whether adapters are off, whether they are merged, and which are active."""
    head = lm.get_output_embeddings()
    active = getattr(head, "active_adapters", ())
    return bool(getattr(head, "disable_adapters", False)), bool(getattr(head, "merged", False)), tuple(active)


def head_inputs(lm: PreTrainedModel, hidden: Tensor) -> HeadInputs:
    """What the head multiplies, adapters included.

    LoRA on the head, W + s B A, becomes a wider product: [h, s A h] @ [W, B]^T. That is exact (adding s B A to a bf16
    W would round it away) and differentiable in A and B. Raises Unsupported for any other kind of head.
    """
    head = lm.get_output_embeddings()
    if head is None:
        raise Unsupported(f"{type(lm).__name__} has no output embeddings")
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        active = not head.disable_adapters and head.active_adapters
        head = head.modules_to_save[active[0]] if active else head.original_module
    adapted = hasattr(head, "lora_A")
    base = head.get_base_layer() if adapted else head
    weight, bias = getattr(base, "weight", None), getattr(base, "bias", None)
    if not isinstance(base, nn.Linear) or not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise Unsupported(f"its head is a {type(head).__name__}, not a torch.nn.Linear with floating-point weights")
    width = hidden.shape[1]
    if adapted and not head.disable_adapters and not head.merged:
        for name in (a for a in head.active_adapters if a in head.lora_A):
            if name in head.lora_variant:
                raise Unsupported(
                    f"adapter {name!r} on its head is a variant of LoRA ({type(head.lora_variant[name]).__name__})"
                )
            down, up = head.lora_A[name], head.lora_B[name]
            if up.bias is not None:
                raise Unsupported(f"adapter {name!r} on its head has a bias")
            x = head.lora_dropout[name](hidden[:, :width].to(down.weight.dtype))
            hidden = torch.cat([hidden, (down(x) * head.scaling[name]).to(hidden.dtype)], dim=1)
            weight = torch.cat([weight, up.weight.to(weight.dtype)], dim=1)
    return HeadInputs(hidden, weight, bias)


def within_head(lm: PreTrainedModel, function: Callable[[Tensor], T], hidden: Tensor) -> T:
    """function(hidden), run as the forward of the model's head.

    FSDP and DeepSpeed gather a module's sharded weights around its forward: only there they are whole.
    """
    head = lm.get_output_embeddings()
    if head is None:
        return function(hidden)
    own = vars(head).get("forward")
    head.forward = function
    try:
        return head(hidden)
    finally:
        del head.forward
        if own is not None:
            head.forward = own


@torch.no_grad()
def check(
    lm: PreTrainedModel, inputs: Mapping[str, Any], forward: Callable | None = None, at: Tensor | None = None
) -> str | None:
    """Compares post(head(hidden)) with the model's own logits: None where they agree to the rounding of the dtype, else the
    reason why they must not be exchanged.

    inputs: keywords of the model and of its backbone. forward: the model's own; by default lm.forward.
    at: places in hidden.flatten(0, 1) to compare, all by default.
    """
    places = slice(None) if at is None else at

    def from_hidden(hidden: Tensor) -> tuple[Tensor, float]:
        hidden, weight, bias = head_inputs(lm, hidden)
        if weight.shape[1] != hidden.shape[1] or weight.shape[0] != logits.shape[1]:
            sizes = f"hidden states {list(hidden.shape)} and head {list(weight.shape)}"
            raise Unsupported(f"{sizes} don't make logits {list(logits.shape)}")
        narrow = torch.promote_types(hidden.dtype, weight.dtype)
        ours = nn.functional.linear(hidden.to(narrow), weight.to(narrow), None if bias is None else bias.to(narrow))
        return post_processing(lm.config)(ours.float()), max(torch.finfo(x.dtype).eps for x in (hidden, weight))

    try:
        with in_eval_mode(lm):
            logits = (forward or lm.forward)(**inputs, use_cache=False).logits.flatten(0, 1)[places]
            hidden = lm.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[places]
            ours, coarsest = within_head(lm, from_hidden, hidden)
    except (Unsupported, AttributeError, TypeError) as error:
        return str(error)
    if not len(logits):
        return None
    logits = logits.float()
    difference, size = (x.square().mean().sqrt().item() for x in (ours - logits, logits))
    coarsest = max(coarsest, torch.finfo(lm.get_input_embeddings().weight.dtype).eps)
    allowed = 4 * coarsest * size  # a few roundings of the widest kind between the two
    if not difference <= max(allowed, 1e-5 * size):
        return f"head(hidden states) is off its logits by {difference:.3g} rms of {size:.3g}; {allowed:.1g} would be rounding"
    return None

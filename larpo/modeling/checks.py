"""Checks and warnings before training."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig


HALF = (torch.bfloat16, torch.float16)


def refuse_frozen(model: nn.Module) -> None:
    """Raises ValueError where there is nothing to train."""
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "no parameter of the model requires grad: there is nothing to train. Give peft_config, load an adapter with "
            "PeftModel.from_pretrained(..., is_trainable=True), or call model.requires_grad_()"
        )


def refuse_foreign_optimizer(optimizer: torch.optim.Optimizer | None, model: nn.Module) -> None:
    """Raises ValueError for an optimizer without any trained parameter: made before an adapter was put on the model."""
    if optimizer is None:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in model.parameters() if p.requires_grad):
        raise ValueError(
            "optimizers: the optimizer holds no parameter of the model that is trained. With peft_config give "
            "optimizer_cls_and_kwargs, or make it of the parameters of a model that has its adapter"
        )


def refuse_shared(model: nn.Module, reference: nn.Module) -> None:
    """Raises ValueError for a reference that training the model would change."""
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    shared = sum(id(p) in trained for p in reference.parameters())
    if shared:
        raise ValueError(
            f"ref_model shares {shared} trained parameters with the model, so training would move it too (PEFT puts an adapter "
            "into the model that it is given). Load it anew, or leave ref_model out: the reference is then the model as it is"
        )


def warn_half_precision(model: nn.Module, learning_rate: float) -> None:
    """Warns where updates of weights would be rounded away."""
    half = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad and p.dtype in HALF}
    if half:
        warnings.warn(
            f"weights are trained in {', '.join(sorted(half))}, where most updates at learning_rate={learning_rate:g} are "
            "rounded away: load the model with dtype=float32, and set bf16=True to compute in bf16",
            stacklevel=4,
        )


def check_tokens(dataset: Dataset, config: PretrainedConfig, name: str) -> None:
    """Raises ValueError for tokens that a model of this config does not have; warns of lists longer than its positions.

    dataset: tokenised rows; name: what it is called in messages.
    """
    longest, smallest, largest = _survey(dataset)
    positions, size = getattr(config.get_text_config(), "max_position_embeddings", None), vocabulary(config)
    if size is not None and (smallest < 0 or largest >= size):
        raise ValueError(
            f"the {name} data holds the token {smallest if smallest < 0 else largest}, the model's vocabulary has "
            f"{size}: are tokenizer and tokens those of this model?"
        )
    if isinstance(positions, int) and 0 < positions < longest:
        warnings.warn(
            f"the {name} data has candidates of up to {longest} tokens, the model has positions for {positions}; "
            "set max_length",
            stacklevel=4,
        )


def vocabulary(config: PretrainedConfig) -> int | None:
    """How many tokens a model of this config has; None where it does not say."""
    return getattr(config.get_text_config(), "vocab_size", None)


def _survey(dataset: Dataset) -> tuple[int, int, int]:
    """Most tokens of a prompt and one of its completions; smallest and largest token. Zeros for no tokens."""
    import pyarrow.compute as pc

    lengths, tokens = [0], [0]
    for rows in dataset.with_format("arrow").iter(batch_size=1000):
        prompts, lists = (rows[name].combine_chunks() for name in ("prompt_ids", "completion_ids"))
        completions = lists.flatten()
        of_prompt = pc.list_value_length(prompts).take(pc.list_parent_indices(lists))
        lengths.append(pc.max(pc.add(of_prompt, pc.list_value_length(completions))).as_py())
        for ids in (prompts.flatten(), completions.flatten()):
            tokens += pc.min_max(ids).as_py().values()
    tokens = [x for x in tokens if x is not None]
    return max(x for x in lengths if x is not None), min(tokens), max(tokens)

"""The last layers of a causal LM as a model of its own, over states that the frozen layers below compute once.

Training only the last layers runs all the others again in every step, to the same result. `cut` runs them once for all rows of
an experiment and keeps their output in a table. The tail is a causal LM whose embedding is that table: its `input_ids` are
places in the table, and everything else (rows, masks, `larpo.modeling.policy`, the head) stays what it was.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from larpo.modeling.policy import Policy, attach
from larpo.modeling.row_layouts import backbone_inputs

Rows = dict[str, Any]


@torch.no_grad()
def cut(
    model: PreTrainedModel, batches: Sequence[Rows], layers: int, description: str = ""
) -> tuple[PreTrainedModel, list[Rows]]:
    """The last `layers` layers of `model` as a tail with the forward model(rows=batch), and the batches it reads.

    Args:
        model: a causal LM built as Llama is: model.model has embed_tokens, layers and norm. It is left as it was.
        batches: of `larpo.modeling.row_layouts`.
        layers: between 1 and the model's number of layers.

    The tail's layers and last norm are copies that can be trained; its head is the model's, frozen.
    """
    most = len(model.model.layers)
    if not 1 <= layers <= most:
        raise ValueError(f"layers must lie in 1..{most}, the model's layers; got {layers}")
    below = copy.copy(model.model)
    below._modules = {**below._modules, "layers": model.model.layers[: most - layers], "norm": nn.Identity()}
    states, moved, start = [], [], 0
    for batch in tqdm(batches, desc=description, unit="batch"):
        found = below(**backbone_inputs(batch, model.config, model.dtype), use_cache=False).last_hidden_state
        places = torch.arange(start, start + batch["input_ids"].numel()).view_as(batch["input_ids"])
        states.append(found.flatten(0, 1))
        moved.append({**batch, "input_ids": places})
        start += places.numel()
    return _tail(model, torch.cat(states), layers), moved


def _tail(model: PreTrainedModel, states: Tensor, layers: int) -> PreTrainedModel:
    trained = {*model.model.layers[-layers:].parameters(), *model.model.norm.parameters()}
    frozen = {id(one): nn.Parameter(one.detach(), requires_grad=False) for one in model.parameters() if one not in trained}
    tail = copy.deepcopy(model, frozen).eval()  # of which only what is trained is a copy
    tail.config.num_hidden_layers, tail.config.tie_word_embeddings = layers, False
    inner = tail.model
    inner.embed_tokens = nn.Embedding.from_pretrained(states, freeze=True)
    inner.layers = inner.layers[-layers:].requires_grad_(True)
    inner.norm.requires_grad_(True)
    return attach(tail, Policy(tail))


def weights(tail: PreTrainedModel) -> dict[str, Tensor]:
    """Copies of what is trained, for `load_state_dict(..., strict=False)`: the way back to the start."""
    return {name: parameter.detach().clone() for name, parameter in tail.named_parameters() if parameter.requires_grad}

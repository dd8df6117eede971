"""Which layout of rows (row_layouts.py) a model is trained with."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..data.collator import Layout, ListCollator
from .eval_mode import in_eval_mode
from .lm_heads import causal_lm
from .policy import compute_dtype
from .prefix_sharing import check_prefix_sharing, supports_prefix_sharing


def choose_layout(model: nn.Module, share_prefix: bool, differs: Callable[[], str | None]) -> Layout:
    """differs: runs a list with its prompt shared and without; the reason why the two must not be exchanged, or None."""
    config = causal_lm(model).config
    if share_prefix:
        reason = supports_prefix_sharing(config) or differs()
        if reason is None:
            return "shared"
        warnings.warn(f"share_prefix is off, every candidate runs its own prompt: {reason}", stacklevel=5)
    return "packed" if "flash" in (config._attn_implementation or "") else "padded"


@torch.no_grad()
def differs_when_shared(
    model: nn.Module, example: Mapping[str, Any], pad_token_id: int, prepare: Callable[[dict], dict]
) -> str | None:
    """A tokenised list with its prompt shared, against separate rows; None where they agree.

    model: with a policy attached. prepare: takes a batch to the model's device.
    """
    logps = []
    with in_eval_mode(model):
        for layout in ("shared", "padded"):
            batch = prepare(ListCollator(pad_token_id, layout)([example]))
            logps.append(model(rows=batch["rows"][0]))
    return check_prefix_sharing(*logps, batch["num_tokens"], compute_dtype(causal_lm(model)))

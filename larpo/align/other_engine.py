"""Checks of completions from an engine that is not the trainer's: vLLM's, or a server's.

The engine's log-likelihoods of its tokens should be the trainer's own up to rounding, since both have the same weights. If they
are not, the completions are not quite the policy's either: another precision, a prompt that was read as other tokens, or other
weights.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.collator import ListCollator
from ..modeling.policy import Policy, attached
from ..runs.files import Rows
from ..sampling import Sampled

logger = logging.getLogger(__name__)


def columns(completions: Sequence[Sampled]) -> dict[str, Any]:
    """Columns for the row of a prompt: the engine's log-likelihood of every token of its completions, where it reports them,
    and whether the tokens of completions and prompt are the very ones that the engine had."""
    return {
        "sampler_logps": [one.logps for one in completions],
        "exact": [one.exact for one in completions],
        "prompt_exact": all(one.prompt_exact for one in completions),
    }


def counts_of_tokens(rows: Rows) -> dict[str, Any]:
    """How many completions and prompts have other tokens here, with a warning where any do."""
    exact = [one for row in rows for one in row["exact"]]
    counts = {"not_exact": exact.count(False), "prompts_not_exact": [row["prompt_exact"] for row in rows].count(False)}
    if any(counts.values()):
        logger.warning(
            "%d of %d completions, and %d of %d prompts, have another number of tokens here than in the server, which gives "
            "or takes text: it has a chat template or a tokenizer of its own, or sampled tokens that their text does not give "
            "back; what is trained on is near to what was sampled, and not the same",
            counts["not_exact"],
            len(exact),
            counts["prompts_not_exact"],
            len(rows),
        )
    return counts


def gap(
    load: Callable[[], nn.Module], rows: Rows, pad_token_id: int, *, tolerance: float, temperature: float
) -> dict[str, Any]:
    """How far the engine's log-likelihoods are from those of the trainer's model: the mean and the largest difference of a
    token, in nats, and the number of tokens; nothing if the engine reports none. Warns of a mean above the tolerance, with the
    usual causes."""
    rows = [row for row in rows if any(row["sampler_logps"])]
    if not rows:
        return {}
    apart = _differences(rows, token_logps(load(), rows, pad_token_id))
    found = {"compared_tokens": len(apart), "logps_apart": float(apart.mean()), "logps_apart_most": float(apart.max())}
    if not found["logps_apart"] <= tolerance:  # NaN is no agreement
        at = "" if temperature == 1 else f"; or the sampler reports them at temperature {temperature:g}, and not at 1"
        logger.warning(
            "the sampler's log-likelihoods are %.3g nats per token from the trainer's own on average, and %.3g at most, where "
            "logps_tolerance is %g: completions are not quite the policy's. The usual causes: another precision (dtype), a "
            "prompt that is read as other tokens (chat template, BOS), other weights (a server that has not been told)%s",
            found["logps_apart"],
            found["logps_apart_most"],
            tolerance,
            at,
        )
    return found


@torch.no_grad()
def token_logps(model: nn.Module, rows: Rows, pad_token_id: int) -> Iterator[list[list[float]]]:
    """Of each row, of each completion, the log-likelihood of every token under a model."""
    collate, device = ListCollator(pad_token_id), next(model.parameters()).device
    with attached(model, Policy(model, alone=True)):
        for row in rows:
            tokens = {name: row[name] for name in ("prompt_ids", "completion_ids")}
            (batch,) = collate([tokens | {"scores": [0.0] * len(tokens["completion_ids"])}])["rows"]
            lengths = batch["cu_seqlens"].diff().tolist()
            every_token = {"cu_seqlens": torch.arange(len(batch["labels"]) + 1)}  # as a candidate of its own
            logps = model(rows={name: x.to(device) for name, x in (batch | every_token).items()})
            yield [one.tolist() for one in logps.cpu().split(lengths)]


def _differences(rows: Rows, ours: Iterator[list[list[float]]]) -> np.ndarray:
    return np.concatenate(
        [
            np.abs(np.subtract(reported, own))
            for row, found in zip(rows, ours, strict=True)
            for reported, own in zip(row["sampler_logps"], found, strict=True)
            if reported is not None
        ]
    )

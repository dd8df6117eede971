"""Log-likelihoods of all candidates of a data set under a policy."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from accelerate.utils import send_to_device
from torch import nn
from tqdm.auto import tqdm

from ..data.tokenization import tokens_of_lists
from .eval_mode import in_eval_mode
from .sharding import most_of_all_ranks

if TYPE_CHECKING:
    from datasets import Dataset

    from ..data.collator import ListCollator


@torch.no_grad()
def candidate_logps(
    model: nn.Module,
    tokenised: Dataset,
    collator: ListCollator,
    *,
    batch_size: int,
    device: torch.device,
    autocast: AbstractContextManager | None = None,
    shard: tuple[int, int] = (0, 1),
    collective: bool = False,
    description: str = "Scoring",
    progress: bool = True,
) -> dict[int, list[float]]:
    """Log-likelihoods under a model with a policy attached: {row: one sum of token log-probs per candidate, in nats}.

    Longest lists come first, so that batches hold lists of similar length and memory runs out at once if it does.
    shard (rank, ranks): only every ranks-th batch, from the rank-th on.
    collective: forwards are, since parameters are sharded: all ranks run as many, some of them for nothing. Without it they run
        one at least: at the first they agree on how the model is called.
    """
    order = longest_first(tokenised)
    batches = [order[a : a + batch_size] for a in range(0, len(order), batch_size)]
    idle = -len(batches) % shard[1] if collective else max(shard[1] - len(batches), 0)
    batches = [*batches, *batches[:1] * idle][shard[0] :: shard[1]]
    found: dict[int, list[float]] = {}
    with in_eval_mode(model), autocast or nullcontext():
        for rows in tqdm(batches, desc=description, unit="batch", disable=not progress):
            batch = collator([tokenised[i] for i in rows])
            rows_of_parts = batch["rows"]
            most = most_of_all_ranks(len(rows_of_parts), device) if collective else len(rows_of_parts)
            parts = [model(rows=send_to_device(rows_of_parts[i % len(rows_of_parts)], device)) for i in range(most)]
            each = torch.cat(parts[: len(rows_of_parts)]).cpu().split(batch["list_sizes"].tolist())
            found |= {i: logps.tolist() for i, logps in zip(rows, each, strict=True)}
    return found


def longest_first(tokenised: Dataset) -> list[int]:
    """The rows of a tokenised data set by how many tokens all candidates of each run, with its prompt."""
    lengths = tokens_of_lists(tokenised)
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])

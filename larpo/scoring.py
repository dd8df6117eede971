"""Log-likelihoods of whole data sets under a policy: reference log-probs, `larpo score`, likely negatives."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from tqdm.auto import tqdm

from .data.collator import ListCollator
from .data.scored_tokens import SCORED_WITH, TOKEN_HASHES, counted_tokens, scored_with, token_hashes
from .data.text_tokenizer import text_tokenizer
from .data.tokenization import PROMPT_LENGTH, Truncation, prompt_limit, tokenize_lists
from .modeling.policy import Policy, attached

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


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
    collective: forwards are, since parameters are sharded: all ranks run as many, some of them for nothing.
    """
    lengths = [
        len(p) * len(c) + sum(map(len, c)) for p, c in zip(tokenised["prompt_ids"], tokenised["completion_ids"], strict=True)
    ]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches = [order[a : a + batch_size] for a in range(0, len(order), batch_size)]
    idle = -len(batches) % shard[1] if collective else 0
    batches = [*batches, *batches[:1] * idle][shard[0] :: shard[1]]
    training = model.training
    model.eval()
    found: dict[int, list[float]] = {}
    with nullcontext() if autocast is None else autocast:
        for rows in tqdm(batches, desc=description, unit="batch", disable=not progress):
            batch = collator([tokenised[i] for i in rows])
            rows_of_parts = batch["rows"]
            most = _most_of_all(len(rows_of_parts), device) if collective else len(rows_of_parts)
            parts = [model(rows=send_to_device(rows_of_parts[i % len(rows_of_parts)], device)) for i in range(most)]
            each = torch.cat(parts[: len(rows_of_parts)]).cpu().split(batch["list_sizes"].tolist())
            found |= {i: logps.tolist() for i, logps in zip(rows, each, strict=True)}
    model.train(training)
    return found


def _most_of_all(n: int, device: torch.device) -> int:
    most = torch.tensor(n, device=device)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return int(most)


def score_lists(
    model: nn.Module,
    lists: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    ref_model: nn.Module | None = None,
    beta: float = 0.1,
    batch_size: int = 8,
    candidate_batch_size: int | None = None,
    max_length: int | None = 1024,
    max_prompt_length: int | None = PROMPT_LENGTH,
    truncation_mode: Truncation = "keep_end",
    append_eos: bool = True,
    progress: bool = True,
) -> Dataset:
    """The data with logps, with a reference ref_logps and implicit_rewards, and what these are of (num_tokens, token_hashes,
    scored_with: see `larpo.data.scored_tokens`).

    Args:
        model, ref_model: causal LMs, on the device they shall run on.
        lists: prompt and completions; scores may be missing.
        beta: implicit_rewards = beta * (logps - ref_logps).
        batch_size: lists at a time; candidate_batch_size: candidates at a time within them.
        max_length, max_prompt_length, truncation_mode, append_eos: as in `LarPOConfig`. Where ref_logps are to be trained
            with, these must be as they are there, and so must tokenizer and chat template: training refuses other tokens.

    Returns:
        A Dataset with a list of floats per row in each new column of log-likelihoods: sums over a candidate's tokens, in nats.
        Without a reference, ref_logps that the data has are kept, and must be of the same tokens.
    """
    scored = (
        lists if "scores" in lists.column_names else lists.add_column("scores", [[0.0] * len(c) for c in lists["completions"]])
    )
    beside = ("source", SCORED_WITH) if ref_model is None else ("source", SCORED_WITH, "ref_logps")
    scored = scored.remove_columns([name for name in beside if name in scored.column_names])
    tokenised, _ = tokenize_lists(
        scored, tokenizer, max_length=max_length, max_prompt_length=max_prompt_length, truncation=truncation_mode,
        append_eos=append_eos,
    )  # fmt: skip
    tokenizer = text_tokenizer(tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    collator = ListCollator(0 if pad is None else pad, slice_size=candidate_batch_size)

    def under(model: nn.Module, name: str) -> list[list[float]]:
        device = next(model.parameters()).device
        with attached(model, Policy(model)):
            found = candidate_logps(
                model, tokenised, collator, batch_size=batch_size, device=device, description=name, progress=progress
            )
        return [found[i] for i in range(len(tokenised))]

    columns: dict[str, list[Any]] = {
        "logps": under(model, "Policy"),
        "num_tokens": [counted_tokens(row) for row in tokenised],
        TOKEN_HASHES: [token_hashes(row) for row in tokenised],
    }
    if ref_model is not None:
        columns["ref_logps"] = under(ref_model, "Reference")
        columns["implicit_rewards"] = [
            [beta * (a - b) for a, b in zip(*row, strict=True)]
            for row in zip(columns["logps"], columns["ref_logps"], strict=True)
        ]
    if ref_model is not None or "ref_logps" not in lists.column_names:
        limits = dict(
            max_length=max_length, max_prompt_length=prompt_limit(max_length, max_prompt_length),
            truncation_mode=truncation_mode, append_eos=append_eos,
        )  # fmt: skip
        columns[SCORED_WITH] = [scored_with(tokenizer, limits, model, ref_model)] * len(lists)
    for name, values in columns.items():
        lists = (lists.remove_columns(name) if name in lists.column_names else lists).add_column(name, values)
    return lists

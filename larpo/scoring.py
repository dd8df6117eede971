"""Log-likelihoods of whole data sets under a policy: reference log-probs, `larpo score`, likely negatives."""

from __future__ import annotations

import hashlib
import json
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .data.collator import ListCollator
from .data.limits import PROMPT_LENGTH, TokenLimits, Truncation
from .data.scored_tokens import SCORED_WITH, TOKEN_HASHES, counted_tokens, scored_with, token_hashes
from .data.text_tokenizer import padding_id, text_tokenizer
from .data.tokenization import tokenize_lists
from .modeling.dataset_logps import candidate_logps, longest_first
from .modeling.policy import Policy, attached
from .runs.parts import Parts, parts_of
from .runs.ranks import Ranks

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

LISTS_OF_A_PART = 64  # what a killed run of `larpo score` may lose
COLUMNS = ("logps", "num_tokens", TOKEN_HASHES, "ref_logps", "implicit_rewards", SCORED_WITH)  # that are added, in this order


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
    parts: Path | None = None,
) -> Dataset:
    """Adds the log-likelihood of every candidate to candidate lists.

    New columns: `logps`; with a reference `ref_logps` and `implicit_rewards`; and `num_tokens`, `token_hashes` and
    `scored_with`, which say of which tokens and weights the numbers are (see `larpo.data.scored_tokens`).

    Args:
        model: a causal LM, on the device on which it should run.
        lists: a Dataset with prompt and completions; scores may be missing.
        tokenizer: the model's. If ref_logps are to be trained with, tokenizer, chat template and the four limits below must be
            those of training, which refuses ref_logps of other tokens.
        ref_model: the reference policy, also on its device; None for logps only.
        beta: implicit_rewards = beta * (logps - ref_logps).
        batch_size: lists at a time.
        candidate_batch_size: candidates at a time within these lists; None for all.
        max_length: most tokens of prompt and completion, as in `LarPOConfig`; None for no limit.
        max_prompt_length: most tokens of a prompt; not given, half of max_length, 512 at most.
        truncation_mode: which end of a prompt that is too long stays: keep_end or keep_start.
        append_eos: end completions that are plain strings with the tokenizer's EOS.
        progress: shows a bar.
        parts: a folder in which results are kept as they come. A call that was killed and is repeated finds them there.
            Processes that `accelerate launch` or `torchrun` started share the work, and each returns all of it. Remove the
            folder once the result is written.

    Returns:
        A Dataset whose new columns have a list of floats per row. Log-likelihoods are sums over a candidate's tokens, in nats.
            Without a reference, ref_logps that the data has are kept, and must be of the same tokens.

    Raises:
        ValueError: a size below 1; parts is the folder of another model, other data or other limits, naming what differs.
    """
    for name, size in (("batch_size", batch_size), ("candidate_batch_size", candidate_batch_size)):
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    scored = (
        lists if "scores" in lists.column_names else lists.add_column("scores", [[0.0] * len(c) for c in lists["completions"]])
    )
    beside = ("source", SCORED_WITH) if ref_model is None else ("source", SCORED_WITH, "ref_logps")
    scored = scored.remove_columns([name for name in beside if name in scored.column_names])
    limits = TokenLimits(max_length, max_prompt_length, truncation_mode, append_eos)
    tokenised, _ = tokenize_lists(scored, tokenizer, **limits.arguments())
    tokenizer = text_tokenizer(tokenizer)
    collator = ListCollator(padding_id(tokenizer), slice_size=candidate_batch_size)

    record = scored_with(tokenizer, limits.as_dict(), model, ref_model)
    columns: dict[str, list[Any]] = {
        "num_tokens": [counted_tokens(row) for row in tokenised],
        TOKEN_HASHES: [token_hashes(row) for row in tokenised],
    }

    logps_under = partial(_all_logps, tokenised=tokenised, collator=collator, batch_size=batch_size, progress=progress)
    with nullcontext() if parts is None else _parts(parts, record, columns[TOKEN_HASHES], batch_size) as kept:
        columns["logps"] = logps_under(model, "logps", kept)
        if ref_model is not None:
            columns["ref_logps"] = logps_under(ref_model, "ref_logps", kept)
    if ref_model is not None:
        columns["implicit_rewards"] = [
            [beta * (a - b) for a, b in zip(*row, strict=True)]
            for row in zip(columns["logps"], columns["ref_logps"], strict=True)
        ]
    if ref_model is not None or "ref_logps" not in lists.column_names:
        columns[SCORED_WITH] = [record] * len(lists)
    for name in COLUMNS:
        if name in columns:
            lists = (lists.remove_columns(name) if name in lists.column_names else lists).add_column(name, columns[name])
    return lists


def _all_logps(
    model: nn.Module,
    column: str,
    kept: Parts | None,
    *,
    tokenised: Dataset,
    collator: ListCollator,
    batch_size: int,
    progress: bool,
) -> list[list[float]]:
    """Log-likelihoods of all candidates, a list per row; those that are in the kept parts are not computed again."""
    score = partial(candidate_logps, model, collator=collator, batch_size=batch_size, device=next(model.parameters()).device)

    def of_rows(rows: list[int]) -> dict[int, list[float]]:
        return {rows[i]: logps for i, logps in score(tokenised.select(rows), progress=False).items()}

    with attached(model, Policy(model, alone=True)):
        if kept is None:
            found = score(tokenised, description=column, progress=progress)
        else:
            found = kept.results(column, longest_first(tokenised), of_rows, unit="list", progress=progress)
    return [found[i] for i in range(len(tokenised))]


def _parts(folder: Path, record: str, hashes: list[list[str]], batch_size: int) -> AbstractContextManager[Parts]:
    """Parts of whole batches, so that batches are the same however many processes there are: about LISTS_OF_A_PART, fewer where
    some process would have none."""
    ranks = Ranks.connected()
    batches = min(LISTS_OF_A_PART, len(hashes) // ranks.count) // batch_size
    tokens = hashlib.sha256("\n".join(map(" ".join, hashes)).encode()).hexdigest()[:12]
    what = json.loads(record) | {"lists": f"{len(hashes)}, tokens sha256 {tokens}"}
    return parts_of(folder, what, max(1, batches) * batch_size, ranks)

"""From tokenised lists to one batch: the layout of its rows is decided here, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..modeling import row_layouts

Layout = Literal["padded", "packed", "shared"]

PER_LIST = ("list_sizes", "row_number", "weight")
PER_CANDIDATE = ("relevance", "num_tokens", "ref_logps")


@dataclass
class ListCollator:
    """Collates tokenised rows ({"prompt_ids", "completion_ids", "scores"[, "completion_mask", "ref_logps"]}) of a Dataset.

    Args:
        pad_token_id: fills rows up; it is masked.
        layout: "padded", one row per candidate; "packed", one row of all candidates, for variable-length attention; "shared",
            one row per list in which the prompt stands once.
        slice_size: candidates that are run at a time; None for all.
        pad_to_multiple_of: rounds the length of rows up to a multiple of this.
        max_completion_tokens: with layout "shared", most tokens of completions in one row; a longer list takes several rows.

    A batch is a dict of

        list_sizes  [L] int64      candidates per list
        relevance   [S] float64    rewards, lists one after the other
        num_tokens  [S] int64      tokens of each candidate that count
        ref_logps   [S] float32    if the data has them: sums over tokens, nats
        weight      [L] float32    if the data has them: each list's loss is multiplied by it
        row_number  [L] int64      if the data has it: the list's row, for messages
        num_input_tokens  int      tokens that the backbone runs
        rows        list of dicts  the candidates' tokens (row_layouts.py), slice_size candidates in each
    """

    pad_token_id: int = 0
    layout: Layout = "padded"
    slice_size: int | None = None
    pad_to_multiple_of: int | None = None
    max_completion_tokens: int | None = None

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        candidates = [
            row_layouts.TokenizedCandidate(example["prompt_ids"], completion, i, mask)
            for i, example in enumerate(examples)
            for completion, mask in zip(example["completion_ids"], _masks(example), strict=True)
        ]
        size = self.slice_size or max(len(candidates), 1)
        batch = {
            "list_sizes": torch.tensor([len(example["completion_ids"]) for example in examples]),
            "relevance": torch.tensor([s for example in examples for s in example["scores"]], dtype=torch.float64),
            "num_tokens": torch.tensor([candidate.num_counted for candidate in candidates]),
            "rows": [self._rows(candidates[a : a + size]) for a in range(0, len(candidates), size)],
        }
        batch["num_input_tokens"] = sum(map(row_layouts.num_tokens, batch["rows"]))
        if examples[0].get("ref_logps") is not None:
            batch["ref_logps"] = torch.tensor([x for example in examples for x in example["ref_logps"]], dtype=torch.float32)
        if "weight" in examples[0]:
            batch["weight"] = torch.tensor([example["weight"] for example in examples], dtype=torch.float32)
        if "row_number" in examples[0]:
            batch["row_number"] = torch.tensor([example["row_number"] for example in examples])
        return batch

    def shape(self, prompt: int, completions: Sequence[int]) -> tuple[int, int, int]:
        """(rows, their width, tokens without padding) of a list of such lengths, run at once."""
        return row_layouts.shape_of_list(self.layout, prompt, completions, self.pad_to_multiple_of, self.max_completion_tokens)

    def _rows(self, candidates: Sequence[row_layouts.TokenizedCandidate]) -> dict[str, torch.Tensor]:
        if self.layout == "packed":
            return row_layouts.packed_rows(candidates)
        options = {} if self.pad_to_multiple_of is None else {"multiple": self.pad_to_multiple_of}
        if self.layout == "shared":
            return row_layouts.shared_rows(
                candidates, self.pad_token_id, max_completion_tokens=self.max_completion_tokens, **options
            )
        return row_layouts.padded_rows(candidates, self.pad_token_id, **options)


def first_lists(batch: dict[str, Any], lists: int) -> dict[str, Any]:
    """The batch as one of its first so many lists; all candidates stay in its rows, the others behind those that count."""
    candidates = int(batch["list_sizes"][:lists].sum())
    kept = dict.fromkeys(PER_LIST, lists) | dict.fromkeys(PER_CANDIDATE, candidates)
    return {name: x[: kept[name]] if name in kept else x for name, x in batch.items()}


def _masks(example: dict[str, Any]) -> Sequence[Sequence[bool] | None]:
    """Which tokens of each completion count; None for all of them."""
    masks = example.get("completion_mask")
    return [None] * len(example["completion_ids"]) if masks is None else masks

"""Candidates as rows of tokens for the backbone: padded, packed or prefix-shared, all described in one form.

Log-likelihoods need the backbone's hidden states and, of those, the ones that predict a completion token. So whatever
the layout, everything after the backbone is the same:

    hidden = backbone(**backbone_inputs(rows, model.config, dtype), use_cache=False).last_hidden_state
    predictors = hidden.flatten(0, 1)[rows["predictor_positions"]]
    logps = linear_sequence_logps(predictors, head.weight, rows["labels"], cu_seqlens=rows["cu_seqlens"])

Rows are made on the CPU, by a collator. A dict of tensors:

    input_ids            [R, T] int64
    position_ids         [R, T] int64, from 0 in every candidate; 0 for padding
    predictor_positions  [N] int64, place in hidden.flatten(0, 1) whose hidden state predicts labels[n]; candidates one after
                         the other, as given. Prompts, padding and tokens that do not count never reach the head: no place
                         here predicts them
    labels               [N] int64, the completion tokens that count
    cu_seqlens           [S+1] int64, borders of the S candidates in `predictor_positions` and `labels`
  and, by layout,
    attention_mask       [R, T] int64, padded rows: 1 for a token, 0 for padding (to the right)
    cu_seqlens_q         [S+1] int32, packed rows (R = 1): borders of the sequences along T; max_seqlen_q, an int: the longest
    segments             [R, T] int32, prefix-shared rows: 0 the prompt, i >= 1 the i-th candidate of the row, -1 padding
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, chain, compress, groupby, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MULTIPLE, SHARED_MULTIPLE = 8, 64  # what widths of padded and of shared rows are rounded up to, where nothing else is asked


class TokenizedCandidate(NamedTuple):
    """One completion of a prompt, as tokens. The prompt has at least one token (a BOS will do); the completion may be empty."""

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    list_index: int = 0
    counted: Sequence[bool] | None = None  # which completion tokens count, the others are context; None: all

    @property
    def num_counted(self) -> int:
        return len(self.completion_ids) if self.counted is None else sum(map(bool, self.counted))


def padded_rows(candidates: Sequence[TokenizedCandidate], pad_token_id: int, multiple: int = MULTIPLE) -> dict[str, Tensor]:
    """One row per candidate (R = S), padded to the right to the longest, T rounded up to `multiple`.

    Raises ValueError without candidates, for a prompt without tokens and for multiple < 1.

    >>> rows = padded_rows([TokenizedCandidate([1, 2], [3, 4]), TokenizedCandidate([1, 2], [5])], pad_token_id=0, multiple=1)
    >>> rows["input_ids"].tolist(), rows["predictor_positions"].tolist(), rows["labels"].tolist()
    ([[1, 2, 3, 4], [1, 2, 5, 0]], [1, 2, 5], [3, 4, 5])
    """
    _check(candidates, multiple)
    tokens = [[*c.prompt_ids, *c.completion_ids] for c in candidates]
    input_ids = _rectangle(tokens, pad_token_id, multiple)
    starts = [row * input_ids.shape[1] + len(c.prompt_ids) for row, c in enumerate(candidates)]
    return {
        "input_ids": input_ids,
        "position_ids": _rectangle([range(len(t)) for t in tokens], 0, multiple),
        "attention_mask": _rectangle([[1] * len(t) for t in tokens], 0, multiple),
        **_counted(candidates, [start - 1 for start in starts], starts),
    }


def packed_rows(candidates: Sequence[TokenizedCandidate]) -> dict[str, Tensor]:
    """All candidates behind one another in one row (R = 1), nothing padded.

    For attention that keeps sequences apart by their borders (flash-attention's varlen kernels). Without it transformers
    makes the block-diagonal mask from the position ids, which costs T^2.

    Raises ValueError without candidates and for a prompt without tokens.

    >>> rows = packed_rows([TokenizedCandidate([1, 2], [3, 4]), TokenizedCandidate([1, 2], [5])])
    >>> rows["input_ids"].tolist(), rows["position_ids"].tolist(), rows["cu_seqlens_q"].tolist()
    ([[1, 2, 3, 4, 1, 2, 5]], [[0, 1, 2, 3, 0, 1, 2]], [0, 4, 7])
    """
    _check(candidates)
    tokens = [[*c.prompt_ids, *c.completion_ids] for c in candidates]
    borders = [0, *accumulate(map(len, tokens))]
    starts = [border + len(c.prompt_ids) for border, c in zip(borders, candidates, strict=False)]
    return {
        "input_ids": _numbers(chain.from_iterable(tokens))[None],
        "position_ids": _numbers(chain.from_iterable(range(len(row)) for row in tokens))[None],
        "cu_seqlens_q": torch.tensor(borders, dtype=torch.int32),
        "max_seqlen_q": max(map(len, tokens)),
        **_counted(candidates, [start - 1 for start in starts], starts),
    }


def shared_rows(
    candidates: Sequence[TokenizedCandidate],
    pad_token_id: int,
    multiple: int = SHARED_MULTIPLE,
    max_completion_tokens: int | None = None,
) -> dict[str, Tensor]:
    """One row per list: "prompt + candidate 1 + ... + candidate m", so that the prompt runs once.

    Neighbours with the same list_index share a row. Positions of each candidate start again behind the prompt, and the
    prompt's last hidden state predicts the first token of every candidate: its place is in `predictor_positions` once for
    each. Needs attention by the masks of `larpo.modeling.prefix_sharing`. T is rounded up to `multiple`, so that compiled
    attention sees few lengths.

    Attention that computes what it masks (SDPA, not FlexAttention) pays for every candidate seeing every other. With
    max_completion_tokens a list of more than that is spread evenly over as few rows as hold it, each with the prompt; a
    candidate that is longer alone gets a row to itself.

    Raises ValueError if candidates of a list have different prompts, and as `padded_rows`.

    >>> rows = shared_rows([TokenizedCandidate([1, 2], [3, 4]), TokenizedCandidate([1, 2], [5])], pad_token_id=0, multiple=1)
    >>> rows["input_ids"].tolist(), rows["position_ids"].tolist(), rows["segments"].tolist()
    ([[1, 2, 3, 4, 5]], [[0, 1, 2, 3, 2]], [[0, 0, 1, 1, 2]])
    >>> rows["predictor_positions"].tolist(), rows["labels"].tolist(), rows["cu_seqlens"].tolist()
    ([1, 2, 1], [3, 4, 5], [0, 2, 3])
    """
    _check(candidates, multiple)
    tokens, positions, segments, places = [], [], [], []
    for same in _row_lists(candidates, max_completion_tokens):
        prompt = list(same[0].prompt_ids)
        row, row_positions, row_segments = list(prompt), list(range(len(prompt))), [0] * len(prompt)
        for i, c in enumerate(same, 1):
            places.append((len(tokens), len(prompt) - 1, len(row)))
            row += c.completion_ids
            row_positions += range(len(prompt), len(prompt) + len(c.completion_ids))
            row_segments += [i] * len(c.completion_ids)
        tokens.append(row)
        positions.append(row_positions)
        segments.append(row_segments)
    input_ids = _rectangle(tokens, pad_token_id, multiple)
    length = input_ids.shape[1]
    return {
        "input_ids": input_ids,
        "position_ids": _rectangle(positions, 0, multiple),
        "segments": _rectangle(segments, -1, multiple).int(),
        **_counted(
            candidates, [row * length + last for row, last, _ in places], [row * length + start for row, _, start in places]
        ),
    }


def num_tokens(rows: dict[str, Tensor]) -> int:
    """Tokens that the backbone runs for these rows, padding left out. Of rows on a GPU it waits for the device.

    >>> candidates = [TokenizedCandidate([1, 2], [3, 4]), TokenizedCandidate([1, 2], [5])]
    >>> num_tokens(padded_rows(candidates, 0)), num_tokens(packed_rows(candidates)), num_tokens(shared_rows(candidates, 0))
    (7, 7, 5)
    """
    if "attention_mask" in rows:
        return int(rows["attention_mask"].sum())
    if "segments" in rows:
        return int((rows["segments"] >= 0).sum())
    return rows["input_ids"].numel()


def shape_of_list(
    layout: str, prompt: int, completions: Sequence[int], multiple: int | None = None, max_completion_tokens: int | None = None
) -> tuple[int, int, int]:
    """(rows, their width, tokens without padding) of a list whose prompt and completions have so many tokens.

    A packed list is as many rows as it has tokens, of width 1: nothing is filled up.

    >>> shape_of_list("padded", 2, [2, 1]), shape_of_list("packed", 2, [2, 1]), shape_of_list("shared", 2, [2, 1], multiple=1)
    ((2, 8, 7), (7, 1, 7), (1, 5, 5))
    """
    tokens = prompt * len(completions) + sum(completions)
    if layout == "packed":
        return tokens, 1, tokens
    if layout == "padded":
        return len(completions), _rounded(prompt + max(completions), multiple or MULTIPLE), tokens
    rows = _spread([TokenizedCandidate((), range(length)) for length in completions], max_completion_tokens)
    widths = [prompt + sum(len(c.completion_ids) for c in row) for row in rows]
    return len(rows), _rounded(max(widths), multiple or SHARED_MULTIPLE), sum(widths)


def layout_of(rows: Mapping[str, Tensor]) -> str:
    """padded, packed or shared."""
    return "shared" if "segments" in rows else "padded" if "attention_mask" in rows else "packed"


def backbone_inputs(rows: dict[str, Tensor], model_config, dtype: torch.dtype) -> dict:
    """Keyword arguments for a transformers backbone (`AutoModel`, `model.base_model`), on the device of the rows.

    Args:
        rows: one of the layouts of this module.
        model_config: the model's config: its attention implementation, layer types and sliding window are read.
        dtype: what attention computes in, the autocast dtype where there is one; prefix masks come in it.

    Returns:
        input_ids, position_ids, and attention_mask: [R, T] for padded rows, for shared rows by
        `larpo.modeling.prefix_sharing.prefix_masks`.
        Packed rows have none; flash attention gets their borders instead (the longest is read from the device, once a call).
        Pass use_cache=False beside them: with a cache transformers does not look for sequences packed in a row.
    """
    inputs = {"input_ids": rows["input_ids"], "position_ids": rows["position_ids"]}
    if "segments" in rows:
        from .prefix_sharing import prefix_masks

        inputs["attention_mask"] = prefix_masks(rows["segments"], rows["position_ids"], model_config, dtype)
    elif "attention_mask" in rows:
        inputs["attention_mask"] = rows["attention_mask"]
    elif "flash_attention" in (model_config._attn_implementation or ""):
        borders, longest = rows["cu_seqlens_q"], rows["max_seqlen_q"]
        inputs.update(cu_seq_lens_q=borders, cu_seq_lens_k=borders, max_length_q=longest, max_length_k=longest)
    return inputs


def _check(candidates: Sequence[TokenizedCandidate], multiple: int = 1) -> None:
    if not candidates:
        raise ValueError("candidates: got none, expected at least one")
    for i, c in enumerate(candidates):
        if not len(c.prompt_ids):
            raise ValueError(f"candidates[{i}].prompt_ids: got no tokens, expected at least one to predict the first from")
        if c.counted is not None and len(c.counted) != len(c.completion_ids):
            raise ValueError(
                f"candidates[{i}].counted: got {len(c.counted)} values, expected {len(c.completion_ids)}, one for each token"
            )
    if multiple < 1:
        raise ValueError(f"multiple: got {multiple}, expected at least 1")


def _row_lists(candidates: Sequence[TokenizedCandidate], max_completion_tokens: int | None) -> list[list[TokenizedCandidate]]:
    """The candidates of each shared row: neighbours of one list, which must have one prompt."""
    found = []
    for index, same in groupby(candidates, key=lambda c: c.list_index):
        same = list(same)
        prompt = list(same[0].prompt_ids)
        for i, c in enumerate(same):
            if list(c.prompt_ids) != prompt:
                raise ValueError(
                    f"candidates: candidate {i} of list {index} has another prompt than candidate 0, "
                    "expected equal prompt_ids in a list"
                )
        found += _spread(same, max_completion_tokens)
    return found


def _spread(same: list[TokenizedCandidate], most: int | None) -> list[list[TokenizedCandidate]]:
    """One list in as few rows as hold at most so many completion tokens each, candidates spread evenly over them."""
    for count in range(1, len(same) + 1):
        borders = [i * len(same) // count for i in range(count + 1)]
        rows = [same[a:b] for a, b in pairwise(borders)]
        if most is None or all(sum(len(c.completion_ids) for c in row) <= most for row in rows):
            break
    return rows


def _numbers(values: Iterable[int]) -> Tensor:
    """[N] int64. numpy reads numbers one after another several times as fast as torch does nested lists."""
    return torch.from_numpy(np.fromiter(values, np.int64))


def _rounded(length: int, multiple: int) -> int:
    return length + -length % multiple


def _rectangle(rows: Sequence[Sequence[int]], fill: int, multiple: int = 1) -> Tensor:
    """[R, T] int64, rows filled up to the right."""
    lengths = np.fromiter(map(len, rows), np.int64)
    out = np.full((len(rows), _rounded(lengths.max(), multiple)), fill, np.int64)
    out[np.arange(out.shape[1]) < lengths[:, None]] = np.fromiter(chain.from_iterable(rows), np.int64)
    return torch.from_numpy(out)


def _counted(candidates: Sequence[TokenizedCandidate], before: list[int], starts: list[int]) -> dict[str, Tensor]:
    """predictor_positions, labels and cu_seqlens. before, starts: flat places of each prompt's last token and of each
    completion's first."""
    predictors, labels = [], []
    for c, last, start in zip(candidates, before, starts, strict=True):
        length = len(c.completion_ids)
        places = [last, *range(start, start + length - 1)][:length]
        predictors += places if c.counted is None else compress(places, c.counted)
        labels += c.completion_ids if c.counted is None else compress(c.completion_ids, c.counted)
    lengths = [c.num_counted for c in candidates]
    return {
        "predictor_positions": _numbers(predictors),
        "labels": _numbers(labels),
        "cu_seqlens": _numbers([0, *accumulate(lengths)]),
    }

"""Scores and log-likelihoods of all evaluated candidates, for `predict` and `compute_metrics`: arrays with a row per list."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor


class ListPredictions(NamedTuple):
    """Arrays [L, M] of L lists in the order of the data, M candidates in the largest; NaN behind the last of a smaller one.

    scores: what the loss ranks by, implicit rewards beta * (log pi - log pi_ref); logps: log pi, summed over a candidate's
    tokens (its mean with length_normalized), in nats.
    """

    scores: np.ndarray
    logps: np.ndarray


class PredictionLog:
    """Collects the predictions of an evaluation, batch by batch; they stay on the device until all are there."""

    def __init__(self) -> None:
        self._batches: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def add(self, scores: Tensor, logps: Tensor, relevance: Tensor, list_sizes: Tensor) -> None:
        """A batch of lists: scores, logps and relevance [S], list_sizes [L]; a batch of no list counts as a batch too."""
        self._batches.append((scores.detach(), logps.detach(), relevance, list_sizes))

    def pop(self, ranks: int = 1) -> tuple[ListPredictions, np.ndarray] | tuple[None, None]:
        """(predictions, relevance [L, M]) of all ranks, which take batches in turn; every rank must call it. (None, None)
        where nothing was added."""
        batches = [_lists(*batch) for batch in self._batches]
        self._batches = []
        by_rank = gather_object([batches]) if ranks > 1 else [batches]
        lists = [one for turn in zip_longest(*by_rank, fillvalue=()) for one in chain.from_iterable(turn)]
        if not lists:
            return None, None
        scores, logps, relevance = (_padded(column) for column in zip(*lists, strict=True))
        return ListPredictions(scores, logps), relevance


def _lists(*batch: Tensor) -> list[tuple[np.ndarray, ...]]:
    """(scores, logps, relevance) of each list."""
    *columns, sizes = batch
    columns = [column.to("cpu", torch.promote_types(column.dtype, torch.float32)) for column in columns]  # numpy has no bf16
    parts = [column.split(sizes.tolist()) for column in columns]
    return [tuple(part.numpy() for part in one) for one in zip(*parts, strict=True)]


def _padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    out = np.full((len(rows), max(map(len, rows))), np.nan, dtype=rows[0].dtype)
    for at, row in zip(out, rows, strict=True):
        at[: len(row)] = row
    return out

"""A stream of lists for training: tokenised as they are read, repeated without end, each rank its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from ..data.loading import as_lists
from ..data.reader import IMPLICIT
from ..data.stored_logps import read_logps
from ..data.tokenization import tokenize_row
from .preprocessing import Prepared, no_prompt, prepare, subset

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from ..config import LarPOConfig

FIRST = 100  # lists that are looked at before training, as all are that are loaded whole
NEEDS_ALL = {  # setting: why a stream can't have it
    "precompute_ref_log_probs": "it scores all lists before training; for the setting ref_logps `larpo score` does so",
    "max_tokens_per_batch": "it puts lists of similar length together, and those of all lists must be known for that",
}


class ListStream(IterableDataset):
    """The tokenised lists of a stream, which starts again at its end: its length is not known in advance.

    accelerate's IterableDatasetShard deals batches out to ranks in turn by counting the lists that come. So each rank reads all
    lists but tokenises only its own, and yields None, which is thrown away, for those of others. When training resumes from a
    checkpoint, the first list is yielded for each of those that transformers skips (`skip`).

    prepared: the first lists, tokenised as data that is loaded whole; first: their tokens.
    """

    def __init__(self, lists: datasets.IterableDataset, prepared: Prepared, tokenizer: Any, args: LarPOConfig):
        self.lists, self.prepared, self.tokenizer, self.args = lists, prepared, tokenizer, args
        first = self.first = prepared.lists
        self.vocabulary: int | None = None
        self.stored = None if args.ref_logps is None else read_logps(args.ref_logps)
        self.optional = [name for name in ("ref_logps",) if name in first.column_names]
        self.skip = 0  # lists of all ranks

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        args, place = self.args, 0
        for epoch in itertools.count():
            self.lists.set_epoch(epoch)  # which shuffles anew
            before = place
            for number, row in enumerate(self.lists):
                mine = place // args.per_device_train_batch_size % args.world_size == args.process_index
                if place < self.skip:
                    yield self.first[0]
                else:
                    yield self._tokenised(row, number) if mine else None
                place += 1
            if place == before:
                if get_worker_info() is not None:
                    return  # a worker that has no file to read
                raise ValueError("the train data is a stream that holds no lists")

    def _tokenised(self, row: dict[str, Any], number: int) -> dict[str, Any]:
        where = f"list {number} of the train data"
        args = self.args
        _refuse(row, where, args)
        if args.list_top is not None:
            row = row | subset(row, args.list_top, args.list_bottom)
        tokens = tokenize_row(row, self.tokenizer, where=where, **args.token_limits().arguments())
        if self.stored is not None:
            found = self.stored.of(tokens)
            if np.isnan(found).any():
                raise self.stored.missing(where, found, self.tokenizer, args.token_limits().as_dict())
            tokens["ref_logps"] = found.tolist()
        if self.optional != [name for name in ("ref_logps",) if name in tokens]:
            raise ValueError(f"ref_logps: {where} and the first list differ in whether they have any; give them for every list")
        largest = max(map(max, filter(None, [tokens["prompt_ids"], *tokens["completion_ids"]])))
        if self.vocabulary is not None and largest >= self.vocabulary:
            raise ValueError(f"{where} holds the token {largest}, the model's vocabulary has {self.vocabulary}")
        return tokens | {"row_number": number}


def training_stream(dataset: datasets.IterableDataset, tokenizer: PreTrainedTokenizerBase, args: LarPOConfig) -> ListStream:
    """`training_lists` for a stream. Its first lists are looked at as all lists are that are loaded whole.

    Raises ValueError for settings and columns that need the whole data.
    """
    if args.max_steps <= 0:
        raise ValueError("max_steps must be given where train_dataset is a stream: how many lists it has is not known before")
    for name, why in NEEDS_ALL.items():
        if getattr(args, name, None):
            raise ValueError(f"{name} does not work with a stream: {why}")
    if args.train_sampling_strategy == "group_by_length":
        raise ValueError("train_sampling_strategy='group_by_length' does not work with a stream: not all lengths are known")
    lists = as_lists(dataset)
    rows = list(lists.take(FIRST))
    for i, row in enumerate(rows):
        _refuse(row, f"list {i} of the train data", args)
    first = prepare(rows, tokenizer, args, name=f"train (first {len(rows)} lists)")
    return ListStream(lists, first._replace(summary=first.summary.of_stream()), tokenizer, args)


def _refuse(row: dict[str, Any], where: str, args: LarPOConfig) -> None:
    if row.get("weight") is not None:
        raise ValueError(
            f"weight: {where} has one, and weights are divided by their mean over all lists, which a stream does not know; "
            "drop the column, or load the data without streaming"
        )
    if args.length_normalized and row.get(IMPLICIT):
        raise no_prompt(where)

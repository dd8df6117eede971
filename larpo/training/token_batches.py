"""Batches of whole lists with at most so many tokens, padding counted.

A batch costs what the model runs: rows of tokens as wide as the longest of them. Lists of similar width are put together, so
that little of a batch is padding. Shapes alone decide how many lists of which shape a batch has; from epoch to epoch lists of
one shape change places, and batches their order. So every epoch has equally many batches, and the number of updates is known.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import DataLoader, Sampler
from transformers.trainer_utils import seed_worker

if TYPE_CHECKING:
    from datasets import Dataset

    from ..config import LarPOConfig
    from ..data.collator import ListCollator

logger = logging.getLogger(__name__)


@dataclass
class Shapes:
    """How much of a batch each list takes: its rows, their width, and its tokens in them. Arrays [L]."""

    rows: np.ndarray
    widths: np.ndarray
    tokens: np.ndarray

    def padded(self, lists: Sequence[int]) -> int:
        """Tokens of these lists in one batch, padding included."""
        return int(self.rows[lists].sum() * self.widths[lists].max())

    def padding(self, batches: Iterable[Sequence[int]]) -> float:
        """The share of padding among the tokens of these batches."""
        padded, own = np.sum([(self.padded(batch), self.tokens[batch].sum()) for batch in batches], axis=0)
        return float(1 - own / padded)


def shapes_of(dataset: Dataset, collator: ListCollator) -> Shapes:
    """The shapes of tokenised lists in the layout of the collator."""
    import pyarrow.compute as pc

    found = []
    for part in dataset.with_format("arrow").iter(batch_size=1000):
        prompts, lists = (part[name].combine_chunks() for name in ("prompt_ids", "completion_ids"))
        borders = np.cumsum(pc.list_value_length(lists).to_numpy())[:-1]
        completions = np.split(pc.list_value_length(lists.flatten()).to_numpy(), borders)
        of_prompt = pc.list_value_length(prompts).to_numpy()
        found += [collator.shape(int(p), c.tolist()) for p, c in zip(of_prompt, completions, strict=True)]
    return Shapes(*np.array(found, dtype=np.int64).reshape(-1, 3).T)


def token_batches_loader(dataset: Dataset, collator: ListCollator, args: LarPOConfig, epoch: Callable[[], int]) -> DataLoader:
    """The training data in batches of `max_tokens_per_batch`, loaded as the other settings of a data loader say."""
    batches = TokenBatchSampler(
        shapes_of(dataset, collator),
        args.max_tokens_per_batch,
        seed=args.seed if args.data_seed is None else args.data_seed,
        epoch=epoch,
        ranks=args.world_size,
        in_order=args.train_sampling_strategy == "sequential",
        drop_last=args.dataloader_drop_last,
    )
    if args.should_log:
        batches.log_padding(args.per_device_train_batch_size)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        in_order=args.dataloader_in_order,
        worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
    )


class TokenBatchSampler(Sampler[list[int]]):
    """Yields batches of places of lists, each of at most `most` tokens, or of one list that is larger alone.

    in_order: keep the order of the data, and fill batches as lists come. ranks: batches that ranks run at the same time are
    neighbours in width. epoch: which one begins, asked when it does.
    """

    def __init__(
        self,
        shapes: Shapes,
        most: int,
        *,
        seed: int = 0,
        epoch: Callable[[], int] = int,
        ranks: int = 1,
        in_order: bool = False,
        drop_last: bool = False,
    ):
        self.shapes, self.most, self.seed, self.epoch = shapes, most, seed, epoch
        self.ranks, self.in_order, self.drop_last = ranks, in_order, drop_last
        self.borders = self._borders(self._order(0))

    def __len__(self) -> int:
        return len(self.borders) - 1

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.epoch()
        order = self._order(epoch)
        batches = [order[a:b].tolist() for a, b in pairwise(self.borders)]
        groups = [batches[i : i + self.ranks] for i in range(0, len(batches), self.ranks)]
        if not self.in_order:
            whole = len(batches) // self.ranks  # what is left stays last: some ranks have no batch of it
            shuffled = np.random.default_rng([self.seed, epoch, 1]).permutation(whole)
            groups = [groups[i] for i in shuffled] + groups[whole:]
        for group in groups:
            yield from group

    def _order(self, epoch: int) -> np.ndarray:
        """Places of all lists, the widest first."""
        count = len(self.shapes.rows)
        if self.in_order:
            return np.arange(count)
        mixed = np.random.default_rng([self.seed, epoch, 0]).permutation(count)
        return mixed[np.lexsort((self.shapes.rows[mixed], -self.shapes.widths[mixed]))]

    def _borders(self, order: np.ndarray) -> list[int]:
        borders, rows, width = [0], 0, 0
        for i, (more, its) in enumerate(zip(self.shapes.rows[order].tolist(), self.shapes.widths[order].tolist(), strict=True)):
            rows, width = rows + more, max(width, its)
            if i > borders[-1] and rows * width > self.most:
                borders.append(i)
                rows, width = more, its
        return [*borders, len(order)]

    def log_padding(self, plain: int) -> None:
        """Logs how much of these batches is padding, against batches of `plain` lists in the order of the data; warns of lists
        that are larger than a batch may be."""
        order = self._order(0)
        batches = [order[a:b] for a, b in pairwise(self.borders)]
        before = np.split(np.arange(len(order)), range(plain, len(order), plain))
        sizes = [len(batch) for batch in batches]
        logger.info(
            "%d batches of %d to %d lists with at most %s tokens: %.1f %% of them are padding, and %.1f %% in batches of %d "
            "lists in the order of the data",
            len(batches),
            min(sizes),
            max(sizes),
            f"{self.most:,}",
            100 * self.shapes.padding(batches),
            100 * self.shapes.padding(before),
            plain,
        )
        alone = self.shapes.rows * self.shapes.widths
        if large := int((alone > self.most).sum()):
            warnings.warn(
                f"max_tokens_per_batch={self.most}: {large} of {len(alone)} lists are larger alone, up to {alone.max():,} "
                "tokens, and are each a batch of their own; candidate_micro_batch_size bounds what runs at a time",
                stacklevel=3,
            )

"""What is logged beside the loss of training: means over lists, throughput, padding, memory, and how the head was cut."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import larpo_kernels as lk

from .list_log import ListLog

if TYPE_CHECKING:
    import psutil


class TrainingLog:
    """Collects batches between two log entries.

    lists: the means over lists; tail_threshold: the setting, whose effect is logged where it is not None.
    """

    def __init__(self, ndcg_k: int | None, tail_threshold: float | None):
        self.lists = ListLog(ndcg_k)
        self._tail_threshold = tail_threshold
        self.tail = lk.TailShares()  # around a step: counts the vocabulary rows that the head merged
        self.start()

    def start(self) -> None:
        """Throughput counts from now on."""
        self._tokens, self._padded, self._since = 0, 0, time.monotonic()

    def add(self, batch: Mapping[str, Any], loss: Tensor, logps: Tensor, scores: Tensor) -> None:
        self.lists.add(loss, scores, batch["relevance"], batch["list_sizes"], logps)
        self._tokens += batch["num_input_tokens"]
        self._padded += sum(rows["input_ids"].numel() for rows in batch["rows"])

    def pop(self, ranks: int, device: torch.device) -> dict[str, float]:
        """What there is to log since the last call; every rank must call it."""
        now = time.monotonic()
        found = self.lists.pop(ranks)
        found["tokens_per_second"] = round(self._tokens / max(now - self._since, 1e-9), 1)
        found["padding"] = round(1 - self._tokens / self._padded, 4) if self._padded else 0.0
        found |= _memory(device)
        if self._tail_threshold is not None:
            found |= {"tail/rows": self.tail.rows, "tail/merged": self.tail.merged}
            self.tail = lk.TailShares()
        self.start()
        self._since = now  # not of now: the time that metrics took belongs to the next entry
        return found


def _memory(device: torch.device) -> dict[str, float]:
    """MiB: on a GPU the peak of what torch allocated since the start, on a CPU what the process holds now."""
    if device.type == "cuda":
        return {"memory/peak_mib": round(torch.cuda.max_memory_allocated(device) / 2**20, 1)}
    return {"memory/rss_mib": round(_process(os.getpid()).memory_info().rss / 2**20, 1)}


@functools.cache
def _process(pid: int) -> psutil.Process:
    """Made once: psutil looks up when the process was started, which takes longer than reading its memory."""
    import psutil

    return psutil.Process(pid)

"""Means over the lists that were trained or evaluated on since the last log entry."""

from __future__ import annotations

import torch
from accelerate.utils import gather_object
from torch import Tensor

from .metrics import MetricMeans, list_metric_sums

BATCHES = 1000  # kept on the device; then they become sums, all in one pass


class ListLog:
    """Means over lists: the loss, and the metrics of `larpo.training.metrics`. No step waits for the device."""

    def __init__(self, ndcg_k: int | None = None):
        self.ndcg_k = ndcg_k
        self.clear()

    def clear(self) -> None:
        self._batches: list[tuple[Tensor, ...]] = []
        self._means = MetricMeans()

    def add(self, loss: Tensor, scores: Tensor, relevance: Tensor, list_sizes: Tensor, logps: Tensor) -> None:
        """A batch: its mean loss []; scores, relevance and logps [S]; list_sizes [L], with L = 0 for a batch of no list."""
        if len(list_sizes) == 0:
            return
        self._batches.append((loss.detach(), scores.detach(), relevance, list_sizes, logps.detach()))
        if len(self._batches) >= BATCHES:
            self._sum_up()

    def pop(self, ranks: int = 1) -> dict[str, float]:
        """The means over the lists of all ranks since the last call; every rank must call it."""
        self._sum_up()
        means = self._means
        if ranks > 1:
            means = MetricMeans()
            for sums in gather_object([self._means.sums]):
                means.add_sums(sums)
        self.clear()
        return means.pop()

    def _sum_up(self) -> None:
        if not self._batches:
            return
        losses, scores, relevance, sizes, logps = zip(*self._batches, strict=True)
        for loss, one in zip(torch.stack(losses).tolist(), sizes, strict=True):
            self._means.add({"loss": loss}, lists=len(one))
        columns = map(torch.cat, (scores, relevance, sizes, logps))
        self._means.add_sums(list_metric_sums(*columns, self.ndcg_k))
        self._batches.clear()

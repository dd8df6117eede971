"""Log-likelihoods of a batch, whose candidates may run a few at a time (`candidate_micro_batch_size`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..modeling.sharding import most_of_all_ranks, on_deepspeed

Batch = Mapping[str, Any]


class CandidateSlices:
    """Runs the slices of a batch that `ListCollator` made, `size` candidates in each; None: the batch is one slice."""

    def __init__(self, accelerator: Accelerator, size: int | None):
        self.accelerator, self.size = accelerator, size

    def count(self, batch: dict[str, Any]) -> int:
        """Slices that every rank runs: forwards are collective, so a rank with fewer slices runs one again for nothing."""
        own = len(batch["rows"])
        if self.size is None or self.accelerator.num_processes == 1:
            return own
        if "num_slices" not in batch:
            batch["num_slices"] = most_of_all_ranks(own, self.accelerator.device)
        return batch["num_slices"]

    def logps(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Log-likelihood of each candidate, [S]: sums over tokens."""
        parts = [self._run(model, batch, i) for i in range(self.count(batch))]
        logps = torch.cat(parts) if len(parts) > 1 else parts[0]
        return logps[: len(batch["relevance"])]

    def logps_of(self, model: nn.Module, batch: Batch, candidates: slice) -> Tensor:
        """Those of one slice. Its start may lie behind the last candidate, where another rank has more slices."""
        return self._run(model, batch, -(-candidates.start // self.size))[: candidates.stop - candidates.start]

    @staticmethod
    def _run(model: nn.Module, batch: Batch, i: int) -> Tensor:
        """The i-th slice; behind the last one no log-likelihoods, by a forward all the same."""
        slices = batch["rows"]
        return model(rows=slices[i]) if i < len(slices) else model(rows=slices[0])[:0]

    def backward(self, loss: Tensor) -> None:
        """The backward of a loss that is divided by the batches of an update already: DeepSpeed would divide it once more."""
        options = {"scale_wrt_gas": False} if on_deepspeed(self.accelerator) else {}
        self.accelerator.backward(loss, **options)

    @contextlib.contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        """Around all but the last backward of a batch: ranks exchange no gradients, and DeepSpeed makes no step."""
        if not on_deepspeed(self.accelerator):
            with getattr(model, "no_sync", contextlib.nullcontext)():
                yield
            return
        state = self.accelerator.gradient_state
        syncs = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            yield
        finally:
            state._set_sync_gradients(syncs)

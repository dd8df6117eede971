"""What every stage of a run works with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..rewards import Memory, Reward
from ..runs.files import Rows, in_chunks, read_json, read_rows, remove, rows_once
from ..runs.ranks import ALONE, Ranks
from .config import AlignConfig
from .models import Models
from .prompts import Prompt, of_iteration
from .run_folder import RunFolder
from .samplers import Samplers


@dataclass
class Run:
    """What every stage works with."""

    config: AlignConfig
    folder: RunFolder
    models: Models
    rewards: Sequence[Reward]
    prompts: list[Prompt]
    held_out: list[Prompt]
    progress: bool = True  # of the first process only
    ranks: Ranks = ALONE
    memory: Memory | None = None  # answers of judges from before
    samplers: Samplers = field(init=False)

    def __post_init__(self):
        self.samplers = Samplers(self.config, self.models, self.folder)

    def seed(self, *purpose: int) -> int:
        """A seed that depends on the run's seed and on nothing but the purpose."""
        return int(np.random.SeedSequence([self.config.seed, *purpose]).generate_state(1)[0])

    def policy(self, iteration: int) -> str:
        """Name or folder of the policy after an iteration; after iteration 0 it is the initial model."""
        return self.samplers.policy(iteration)

    def of_iteration(self, iteration: int) -> tuple[list[Prompt], list[Prompt]]:
        """The prompts of an iteration, and those that come next: see `larpo.align.prompts`."""
        refilled = sum(self.counts(i, "refill")["prompts"] for i in range(1, iteration)) if self.config.refill else 0
        return of_iteration(self.prompts, self.config.prompts_per_iteration, iteration, refilled)

    def rows(self, path: Path) -> Rows:
        return self.ranks.first(lambda: read_rows(path))

    def rows_once(self, path: Path, build: Callable[[], Rows]) -> Rows:
        return rows_once(path, build, self.ranks)

    def in_chunks(
        self, folder: Path, items: Sequence, k: int, work: Callable[[int, Sequence], Rows], title: str, in_one_go: bool = False
    ) -> Rows:
        """`larpo.runs.files.in_chunks` of prompts with k completions each; `title` stands beside the bar.

        in_one_go: one process does them all, and shows how far it is.
        """
        size = len(items) if in_one_go else self.config.prompts_of_a_chunk(k)
        return in_chunks(folder, items, size, work, self.ranks, description=title, bar=self.progress and not in_one_go)

    def counts(self, iteration: int, stage: str) -> dict[str, Any] | None:
        """What a stage wrote when it was done; None before."""
        file = self.folder.iteration(iteration) / f"{stage}.json"
        return read_json(file) if file.exists() else None

    def remove(self, path: Path) -> None:
        self.ranks.first(lambda: remove(path))

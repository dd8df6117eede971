"""The folder of a run, and how things get into it: whole, by one rename.

    config.yaml, prompts.json              what the run is
    start/                                 the initial policy on the held-out prompts: evaluation.parquet, evaluate.json
    iteration-01/                          a file for each stage's data, and a .json that says it is done, with counts
        sampled.parquet      sample.json       k completions per prompt
        candidates.parquet   score.json        the same with scores
        lists.parquet        lists.json        what is trained on
        model/               train.json        the policy after this iteration, a folder of transformers
        diverged.json                          instead of these two: why training ended without a policy
        evaluation.parquet   evaluate.json     its completions of the held-out prompts, and what they say
    metrics.json, summary.md, plots/       all of it for a reader

A stage is done when its .json is there, which is written last. Before that, a data file that is there is whole: it appeared
by one rename. A process killed at any moment leaves at worst hidden `.name.unfinished` files, which the next one replaces.
"""

from __future__ import annotations

from pathlib import Path


class RunFolder:
    """Paths inside a run's folder."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()

    def iteration(self, iteration: int) -> Path:
        """Of an iteration; 0 is the start."""
        return self.path / ("start" if iteration == 0 else f"iteration-{iteration:02d}")

    def model(self, iteration: int) -> Path:
        """The policy after an iteration, counted from 1."""
        return self.iteration(iteration) / "model"

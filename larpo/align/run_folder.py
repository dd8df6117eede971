"""The folder of a run, and how things get into it: whole, by one rename.

    config.yaml, prompts.json              what the run is
    start/                                 the initial policy on the held-out prompts: evaluation.parquet, evaluate.json
    iteration-01/                          a file for each stage's data, and a .json that says it is done, with counts
        sampled.parquet      sample.json       k completions per prompt
        candidates.parquet   score.json        the same with scores
        refilled.parquet     refill.json       with refill: candidates of further prompts, with scores
        lists.parquet        lists.json        what is trained on
        model/               train.json        the policy after this iteration, a folder of transformers
        diverged.json                          instead of these two: why training ended without a policy
        evaluation.parquet   evaluate.json     its completions of the held-out prompts, and what they say
    judgements/                            what judges have said that are asked call by call (larpo/rewards/memory.py)
    metrics.json, plots/                   all of it for a reader
    summary.md, summary.html               the same page twice; the second has its pictures in it

A stage is done when its .json is there, which is written last. Before that, a data file that is there is whole: it appeared
by one rename. A process killed at any moment leaves at worst hidden `.name.unfinished` files, which the next one replaces.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..runs.files import read_text
from ..runs.intact import Damaged

STAGES = ("sample", "score", "refill", "lists", "train", "evaluate")  # of an iteration, in their order
MADE_BY = {
    "sampled.parquet": "sample",
    "candidates.parquet": "score",
    "refilled.parquet": "refill",
    "lists.parquet": "lists",
    "evaluation.parquet": "evaluate",
}
CHUNKS = {  # where parts of a stage's results are kept until it is done
    "sample": "sample-chunks",
    "score": "score-chunks",
    "refill": "refill-chunks",
    "lists": "negatives-chunks",
    "evaluate": "evaluation-chunks",
}
OF_THE_RUN = {
    "config.yaml": "It says which run this is: delete it if you are sure that the settings of now are that run's",
    "prompts.json": "Delete it to read the prompts again, if their source is as it was",
}


def stages_of(iteration: int, *, refill: bool) -> tuple[str, ...]:
    """The stages of an iteration; at the start, iteration 0, the initial policy is evaluated."""
    return ("evaluate",) if iteration == 0 else tuple(stage for stage in STAGES if refill or stage != "refill")


class RunFolder:
    """Paths inside a run's folder."""

    def __init__(self, path: str | Path):
        self.path = Path(os.path.abspath(Path(path).expanduser()))  # a reward may change the working directory

    def iteration(self, iteration: int) -> Path:
        """Of an iteration; 0 is the start."""
        return self.path / ("start" if iteration == 0 else f"iteration-{iteration:02d}")

    def model(self, iteration: int) -> Path:
        """The policy after an iteration, counted from 1."""
        return self.iteration(iteration) / "model"

    def checkpoints(self, iteration: int) -> Path:
        """Of an iteration's training, until it is done."""
        return self.iteration(iteration) / "checkpoints"

    def chunks(self, iteration: int, stage: str) -> Path:
        return self.iteration(iteration) / CHUNKS[stage]

    def settings(self) -> dict[str, Any] | None:
        """What config.yaml holds; None if it is not there. Raises Damaged where it is cut."""
        import yaml

        path = self.path / "config.yaml"
        if not path.exists():
            return None
        try:
            settings = yaml.safe_load(read_text(path))
        except yaml.YAMLError as error:
            raise Damaged(path, f"it is cut or damaged ({str(error).splitlines()[0]})") from None
        if not isinstance(settings, dict) or "output_dir" not in settings:
            raise Damaged(path, "it is cut: it has no settings" if settings else "it is empty")
        return settings

    def how_to_redo(self, path: Path) -> str:
        """What to do about a file of the run that can't be read; nothing for one that is not of the run."""
        if not path.is_relative_to(self.path):
            return ""
        parts = path.relative_to(self.path).parts
        if parts[0] == "judgements":
            return "Delete it: what it held is asked again"
        if len(parts) == 1:
            return OF_THE_RUN.get(parts[0], "")
        folder, name = self.path / parts[0], parts[1]
        if name == "model":
            return self._how_to_train_again(folder)
        if name.endswith("-chunks"):
            return "Delete it: the stage writes it again"
        if path.suffix == ".json":
            return "Delete it: the counts are taken again from the stage's data"
        stage = MADE_BY.get(name)
        done = f" and {folder / stage}.json" if stage else ""
        return f"Delete it{done} to do the stage {stage!r} again" if stage else ""

    def _how_to_train_again(self, folder: Path) -> str:
        number = int(folder.name.removeprefix("iteration-"))
        if number > 1 and not self.model(number - 1).exists():
            before = f"It was trained from the policy of iteration {number - 1}, which keep_models='last' has removed"
            return f"{before}: copy it from a backup, or start a new run"
        return f"Delete {folder / 'model'} and {folder / 'train.json'} to train it again"

"""Runs the tiny loop in processes that kill themselves.

`main` forks one process after the other from its own, which must have run nothing, until one ends by itself. FOLDER/killed is
the run they share, FOLDER/whole that of a process that is left in peace.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

import larpo.align.loop
import larpo.align.plots
from larpo.sampling import TransformersSampler
from tests.helpers import align_runs, kills

MODES = {
    "renames": dict(
        iterations=1,
        eval_prompts=4,
        prompts_per_iteration=5,
        chunk_size=4,
        refill=True,
        reward="tests.helpers.loop_checks:hopeless_of_cats",
    ),
    "training": dict(iterations=2, memory="all", training=dict(save_strategy="steps", save_steps=2, learning_rate=1e-2)),
}


def count_calls(log: Path) -> None:
    sample = TransformersSampler.__call__

    def call(self, *args, **kwargs):
        completions = sample(self, *args, **kwargs)
        with log.open("a") as file:
            file.write(json.dumps(kwargs) + "\n")
        return completions

    TransformersSampler.__call__ = call


def main(folder: Path, mode: str) -> None:
    torch.set_num_threads(1)
    for name in ("whole", "killed"):
        for _ in range(100):
            pid = os.fork()
            if pid == 0:
                count_calls(folder / f"{name}.calls")
                if mode == "training":
                    larpo.align.plots.draw = lambda *arguments: {}  # which takes as long as an iteration
                if name == "killed":
                    kills.after_the_next_new_file() if mode == "renames" else kills.at_step(
                        4
                    )  # behind a checkpoint at the second
                align_runs.align(folder / name, **MODES[mode], model=str(folder / "model"))
                os._exit(0)
            status = os.waitpid(pid, 0)[1]
            with (folder / f"{name}.lives").open("a") as file:
                file.write(f"{os.waitstatus_to_exitcode(status)}\n")
            if not os.WIFSIGNALED(status):
                break

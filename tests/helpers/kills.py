"""Ends of a process in the middle of a run, each patched into the process that is to end so."""

from __future__ import annotations

import os
import signal

import larpo.trainer


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after_the_next_new_file(name: str = "") -> None:
    """name: how the path of the file or folder ends."""
    rename = os.replace

    def replace(source, target):
        new = not os.path.exists(target)
        rename(source, target)
        if new and str(target).endswith(name):
            killed()

    os.replace = replace


def at_step(number: int, end=killed) -> None:
    """Of training, counted over all iterations."""
    steps, step = [], larpo.trainer.LarPOTrainer.training_step

    def training_step(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == number:
            end()
        return step(self, *args, **kwargs)

    larpo.trainer.LarPOTrainer.training_step = training_step

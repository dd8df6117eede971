"""A run of the loop that takes a second: a tiny model that learns to write the letter o."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from safetensors.torch import load_file

from larpo.align import AlignConfig
from larpo.align.loop import run
from larpo.align.run_folder import RunFolder
from larpo.runs.files import read_json, read_rows
from tests.helpers import tiny

PROMPTS = [
    f"{first} {second}" for first in ("the cat", "a dog", "one film", "the house") for second in ("sat", "ran", "is", "was")
]


def count_o(completions, **columns):
    return [float(text.count("o")) for text in completions]


@functools.cache
def model_folder() -> str:
    folder = tempfile.TemporaryDirectory(prefix="tiny-model-")
    model_folder.keep = folder  # until the process ends
    return tiny.save(folder.name, spread=2.0)


def config(folder: Path, training: dict | None = None, model: str | None = None, **changes) -> AlignConfig:
    settings = dict(
        output_dir=str(folder),
        model=model or model_folder(),
        prompts=PROMPTS,
        reward="tests.helpers.align_runs:count_o",
        eval_prompts=4,
        eval_k=4,
        k=4,
        iterations=2,
        max_new_tokens=6,
        prompts_per_iteration=6,
        chunk_size=4,
        sample_batch_size=16,
        memory="none",
        subset="all",
    )
    own = dict(
        learning_rate=1e-3,
        per_device_train_batch_size=2,
        num_train_epochs=1,
        logging_steps=1,
        use_cpu=True,
        lr_scheduler_type="constant",
        warmup_steps=0,
    )
    return AlignConfig(**{**settings, **changes}, training={**own, **(training or {})})


def align(folder: Path, **changes):
    return run(config(folder, **changes), progress=False)


def rows_of(folder, iteration, name):
    return read_rows(RunFolder(folder).iteration(iteration) / f"{name}.parquet")


def counts_of(folder, iteration, stage):
    return read_json(RunFolder(folder).iteration(iteration) / f"{stage}.json")


def weights(folder):
    return load_file(folder / "model.safetensors")

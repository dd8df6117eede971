"""`larpo train` on a tiny model and a file of lists, as with a file of settings."""

import json
from pathlib import Path

from safetensors.torch import load_file

from larpo import commands
from tests.helpers import tiny
from tests.helpers.jsonl import write_jsonl


def model_and_lists(folder: Path, rows: list[dict] | None = None) -> Path:
    """A folder with what a run reads: by default eight lists."""
    tiny.save(folder / "model")
    write_jsonl(folder / "lists.jsonl", rows or tiny.lists(8, m=None, seed=3))
    return folder


def settings_of(given: Path, out: Path, *, file: Path | None = None, **settings) -> Path:
    """The file of settings of a run of four steps with a checkpoint at each, beside the folder `out` that it writes.
    given: see `model_and_lists`."""
    files = {"model": str(given / "model"), "train_data": str(given / "lists.jsonl"), "output_dir": str(out)}
    steps = {"max_steps": 4, "save_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 2, "learning_rate": "1e-3"}
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
    lines = [f"{name}: {json.dumps(value)}" for name, value in {**files, **steps, **quiet, **settings}.items()]
    file = file or out.with_suffix(".yaml")
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(lines))
    return file


def train(file: Path, *flags: str):
    """The trainer, when it has trained."""
    return commands.train(*commands.train_settings(file, list(flags)))


def trained(given: Path, out: Path, **settings):
    """The weights that such a run saves."""
    train(settings_of(given, out, **settings))
    return load_file(out / "model.safetensors")

"""What the commands `larpo train` and `larpo score` do, as functions of their settings."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .yaml_config import load_yaml, nearest

if TYPE_CHECKING:
    from .config import LarPOConfig
    from .trainer import LarPOTrainer


@dataclass
class TrainJob:
    """The settings of `larpo train` that are not in LarPOConfig."""

    model: str = field(metadata={"help": "Name or folder of a causal LM."})
    train_data: str = field(metadata={"help": "Candidate lists: .jsonl, .json, .parquet, a saved dataset or a hub name."})
    eval_data: str | None = field(default=None, metadata={"help": "Lists to evaluate on."})
    ref_model: str | None = field(default=None, metadata={"help": "The reference; by default the model as it is at the start."})
    peft: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Settings of peft.LoraConfig, a dict (JSON on a command line): trains an adapter."}
    )
    resume: bool = field(default=True, metadata={"help": "Go on from the newest whole checkpoint in output_dir, if any."})


def train_settings(config: str | Path | None, flags: list[str]) -> tuple[TrainJob, LarPOConfig]:
    """Settings from a YAML file and from flags; flags win.

    Raises:
        ValueError, FileNotFoundError: a bad file, with line and field; an unknown flag; a setting of the wrong kind.
    """
    from transformers import HfArgumentParser

    from .config import LarPOConfig

    known = [f.name for kind in (TrainJob, LarPOConfig) for f in fields(kind) if f.init]
    values = {} if config is None else load_yaml(config, known)
    for flag in flags:
        name = flag[2:].split("=")[0].replace("-", "_")
        if flag.startswith("--") and name.removeprefix("no_") not in known and name not in known:
            raise ValueError(f"unknown flag {flag.split('=')[0]}{nearest(name, known)}")
    parser = HfArgumentParser((TrainJob, LarPOConfig), exit_on_error=False, allow_abbrev=False)
    given = {flag[2:].split("=")[0].replace("-", "_") for flag in flags if flag.startswith("--")}
    missing = [name for name in ("model", "train_data") if name not in values.keys() | given]
    if missing:
        raise ValueError(f"{' and '.join(missing)} must be given, in the config file or as --{missing[0]}")
    job, args = _parse(parser, [*_as_flags(values), *flags])
    if isinstance(job.peft, str):
        job.peft = json.loads(job.peft)
    return job, args


def _parse(parser: Any, flags: list[str]) -> tuple[TrainJob, LarPOConfig]:
    import argparse

    try:
        return parser.parse_args_into_dataclasses(args=flags, look_for_args_file=False)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None


def _as_flags(values: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def train(job: TrainJob, args: LarPOConfig) -> LarPOTrainer:
    """Trains, evaluates if there is something to evaluate on, and saves model and tokenizer in args.output_dir."""
    from .adapters import lora_config
    from .checkpoints import last_whole_checkpoint
    from .data import load_lists
    from .trainer import LarPOTrainer

    data = load_lists(job.train_data)
    held_out = None if job.eval_data is None else load_lists(job.eval_data)
    trainer = LarPOTrainer(
        job.model,
        job.ref_model,
        args,
        train_dataset=data,
        eval_dataset=held_out,
        peft_config=None if job.peft is None else lora_config(job.peft),
    )
    checkpoint = last_whole_checkpoint(args.output_dir) if job.resume else None
    trainer.train(resume_from_checkpoint=checkpoint)
    if held_out is not None:
        trainer.save_metrics("eval", trainer.evaluate())
    trainer.save_model()
    trainer.save_state()
    return trainer


def score(
    model: str,
    data: str,
    out: str | Path,
    *,
    ref_model: str | None = None,
    beta: float = 0.1,
    batch_size: int = 8,
    candidate_batch_size: int | None = None,
    max_length: int | None = 1024,
    max_prompt_length: int | None = 512,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Any:
    """Scores the lists in `data` and writes them with the new columns to `out`, .parquet or .jsonl; see `score_lists`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .data import load_lists
    from .scoring import score_lists

    out = Path(out)
    if out.suffix not in (".parquet", ".jsonl"):
        raise ValueError(f"out must end in .parquet or .jsonl, got {str(out)!r}")
    lists = load_lists(data)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    load = lambda name: (  # noqa: E731
        AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code).to(device)
    )
    scored = score_lists(
        load(model),
        lists,
        AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code),
        ref_model=None if ref_model is None else load(ref_model),
        beta=beta,
        batch_size=batch_size,
        candidate_batch_size=candidate_batch_size,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
    )
    unfinished = out.with_name(f".{out.name}.unfinished")  # what stands under `out` is whole, always
    if out.suffix == ".parquet":
        scored.to_parquet(unfinished)
    else:
        scored.to_json(unfinished, force_ascii=False)
    unfinished.replace(out)
    return scored

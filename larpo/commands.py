"""What the commands `larpo train` and `larpo score` do, as functions of their settings."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data.limits import PROMPT_LENGTH, Truncation
from .data.reading import Reading
from .field_docs import documented
from .runs.checkpoints import checkpoint_to_go_on_from, has_finished_checkpoint
from .runs.files import read_json, remove, write_json, write_text, write_whole
from .runs.identity import changed, content, with_defaults
from .runs.intact import Damaged
from .runs.lock import locked
from .runs.ranks import Ranks, processes
from .runs.secrets import without_secrets
from .runs.settings import flag_values, read_settings
from .runs.yaml_config import json_object, json_value

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from .config import LarPOConfig
    from .data.converting import Read
    from .data.summary import DataSummary
    from .trainer import LarPOTrainer


JOB = "larpo-job.json"  # beside the checkpoints: the settings of their run

# What makes a run another one: all settings of LarPOConfig but HOW, and of TrainingArguments, most of which only say how a
# run is computed and logged, WHAT. Not how long it is: a run may be made longer.
HOW = {
    "logging_steps",
    "dataset_num_proc",
    "precompute_ref_log_probs",
    "precompute_ref_batch_size",
    "share_prefix",
    "candidate_micro_batch_size",
    "schedule",
    "memory_budget",
    "kernel_backend",
    "pad_to_multiple_of",
    "ndcg_k",
    "on_nonfinite",
    "remove_unused_columns",
}
WHAT = (
    "seed",
    "data_seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "optim_args",
    "optim_target_modules",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "weight_decay",
    "max_grad_norm",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "warmup_ratio",
    "neftune_noise_alpha",
    "train_sampling_strategy",
    "group_by_length",
    "bf16",
    "fp16",
)
# Settings that need the machine of a run, in place of which data can be looked at on any.
ANYWHERE = {"use_cpu": True, "bf16": False, "fp16": False, "tf32": None, "fsdp": None, "deepspeed": None, "report_to": "none"}


@documented
@dataclass
class TrainJob(Reading):
    """The settings of `larpo train` that are not in LarPOConfig.

    Args:
        model: Name or folder of a causal LM.
        train_data: Candidate lists: .jsonl, .json, .csv (.gz, .zst), .parquet, a saved dataset or a hub name; or a dict with
            path, split, config, revision and how to read it, or a list of such with weight, to be mixed (JSON on a command
            line).
        train_split: Split of train_data, where it has splits.
        eval_data: Lists to evaluate on.
        eval_split: Split of eval_data, where it has splits.
        ref_model: The reference; by default the model as it is at the start.
        streaming: Read train_data as training goes on, with max_steps.
        shuffle_buffer: Lists of a stream from which the next one is drawn; 0: none.
        peft: Settings of peft.LoraConfig, a dict (JSON on a command line): trains an adapter.
        resume: Go on from the newest whole checkpoint in output_dir, if any.
    """

    model: str
    train_data: list[Any] | str | dict[str, Any] | None = None
    train_split: str = "train"
    eval_data: str | None = None
    eval_split: str = "test"
    ref_model: str | None = None
    streaming: bool = False
    shuffle_buffer: int = 1000
    peft: dict[str, Any] | str | None = None
    resume: bool = True

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.peft, str):
            self.peft = json_object("peft", self.peft)
        if isinstance(self.train_data, str) and self.train_data.lstrip().startswith(("{", "[")):
            self.train_data = json_value("train_data", self.train_data)
        if self.shuffle_buffer < 0:
            raise ValueError(f"shuffle_buffer must be at least 0, got {self.shuffle_buffer}")


def train_settings(config: str | Path | None, flags: list[str]) -> tuple[TrainJob, LarPOConfig]:
    """Settings from a YAML file and from flags; flags win. See `larpo.runs.settings`."""
    from .config import LarPOConfig

    kinds = (TrainJob, LarPOConfig)
    job, args = read_settings(kinds, config, flag_values(flags, kinds), needed=("train_data", "output_dir"))
    _refuse_what_scripts_read(job, args)
    return job, args


def _refuse_what_scripts_read(job: TrainJob, args: LarPOConfig) -> None:
    """Settings of TrainingArguments that are there for scripts of one's own: they would be ignored here."""
    if args.resume_from_checkpoint is not None:
        raise ValueError(
            "resume_from_checkpoint must be left out: a run goes on from the newest whole checkpoint in output_dir"
        )
    if args.do_predict:
        raise ValueError("do_predict must be left out: nothing is predicted, eval_data is what is evaluated")
    if args.do_eval and job.eval_data is None:
        raise ValueError("do_eval and eval_strategy need eval_data, which is not given")


def train(job: TrainJob, args: LarPOConfig) -> LarPOTrainer:
    """Trains, evaluates if there is something to evaluate on, and saves model and tokenizer in args.output_dir.

    Raises ValueError where output_dir has checkpoints of another job, naming every difference, or none that can be gone on
    from, saying why, and where another process is at work in it or the same job has diverged. NonFiniteError: it diverges now.
    """
    args.output_dir = os.path.abspath(args.output_dir)  # a callback may change the working directory
    ranks = Ranks.started()
    with ranks.first_within(locked(Path(args.output_dir))):
        return _train(job, args, ranks)


def _train(job: TrainJob, args: LarPOConfig, ranks: Ranks) -> LarPOTrainer:
    from .data.one_source import read_lists
    from .modeling.adapters import lora_config
    from .trainer import LarPOTrainer
    from .training.divergence import remembered

    adapter = None if job.peft is None else lora_config(job.peft)
    data, read = _train_lists(job, args)
    held_out = None
    if job.eval_data is not None:
        read["eval"] = [read_lists(job.eval_data, Reading(**job.reading()), split=job.eval_split)]
        held_out = read["eval"][0].logged()
    folder, identity = Path(args.output_dir), _identity(job, args, data)
    _claim(folder, identity, write=args.should_save)
    checkpoint = checkpoint_to_go_on_from(args.output_dir, args) if job.resume else None
    trainer = LarPOTrainer(
        os.path.expanduser(job.model),
        None if job.ref_model is None else os.path.expanduser(job.ref_model),
        args,
        train_dataset=data,
        eval_dataset=held_out,
        peft_config=adapter,
    )
    trainer.data_summaries = {name: one.of(read[name]) if name in read else one for name, one in trainer.data_summaries.items()}
    with remembered(folder, identity | {"on_nonfinite": args.on_nonfinite}, ranks):
        trainer.train(resume_from_checkpoint=checkpoint)
        if held_out is not None:
            trainer.save_metrics("eval", trainer.evaluate())
        trainer.save_model()
    trainer.save_state()
    return trainer


def _train_lists(job: TrainJob, args: LarPOConfig) -> tuple[Dataset | IterableDataset, dict[str, list[Read]]]:
    """The lists to train on, of a stream in a random order as far as its buffer reaches; and how they were read, if at once."""
    from .data.loading import load_lists, read_sources

    how = {"split": job.train_split, "seed": _data_seed(args)} | job.reading()
    if not job.streaming:
        lists, reads = read_sources(job.train_data, **how)
        return lists, {"train": reads}
    lists = load_lists(job.train_data, streaming=True, **how)
    return lists.shuffle(seed=how["seed"], buffer_size=job.shuffle_buffer) if job.shuffle_buffer else lists, {}


def _data_seed(args: LarPOConfig) -> int:
    return args.seed if args.data_seed is None else args.data_seed


def _identity(job: TrainJob, args: LarPOConfig, data: Dataset | IterableDataset) -> dict[str, Any]:
    """What makes a training run this one and no other: its models, data (of a stream its first lists) and settings."""
    from .config import LarPOConfig
    from .data.loading import as_lists
    from .data.stored_logps import reference_of
    from .training.list_stream import FIRST

    settings = args.to_dict()
    names = [name for name in LarPOConfig.__annotations__ if name not in HOW]
    what = {name: settings[name] for name in (*names, *WHAT) if name in settings}
    own = {"model": _place(job.model), "ref_model": _place(job.ref_model), "peft": job.peft}
    own["train_data"] = f"a stream, at first {content(as_lists(list(data.take(FIRST))))}" if job.streaming else content(data)
    what["ref_logps"] = None if args.ref_logps is None else reference_of(args.ref_logps)  # which may be moved, or written anew
    return _as_read_back(without_secrets(own | what))


def _as_read_back(settings: Any) -> Any:
    return json.loads(json.dumps(settings, default=str))


def _place(model: str | None) -> str | None:
    """A folder by its whole path, wherever the command is started; a name on the hub as it is."""
    folder = Path(model or "").expanduser()
    return str(folder.resolve()) if model and folder.is_dir() else model


def _claim(folder: Path, job: dict[str, Any], *, write: bool) -> None:
    """Writes the settings that identify the run into its folder; refuses a folder with checkpoints of another run."""
    from .config import LarPOConfig

    file = folder / JOB
    if has_finished_checkpoint(folder):
        if not file.is_file():
            raise ValueError(f"output_dir={str(folder)!r} has checkpoints, but no {JOB} that says of what: give another one")
        try:
            before = read_json(file)
        except Damaged as error:
            raise ValueError(f"{error}. It says what the checkpoints beside it are of: give another output_dir") from error
        if different := changed(_as_read_back(with_defaults(before, LarPOConfig)), job):
            raise ValueError(
                f"output_dir={str(folder)!r} has checkpoints of another run: {'; '.join(different)}. Give another one"
            )
    elif write:
        write_json(file, job)


def describe(
    source: str | None, model: str | None, config: str | Path | None, flags: list[str], *, limit: int | None = None
) -> dict[str, DataSummary]:
    """The facts of a run's training data by its split; those in the file where `source` is a run's larpo-data.json.

    source, model: win over the config file's train_data and model; flags: settings of `larpo train`.
    """
    from .data.summary import FILE, read_summaries
    from .modeling.loading import load_tokenizer
    from .training.preprocessing import describe

    if source is not None and Path(source).name == FILE:
        return read_summaries(Path(source))
    if source is None and config is None:
        raise ValueError("say which data: larpo data FILE_OR_NAME --model MODEL, or --config with a file that has train_data")
    own = {"train_data": source, "model": model, "output_dir": "unused"}
    given = [f"--{name}={value}" for name, value in own.items() if value is not None]
    job, args = train_settings(config, [*given, *flags, *(f"--{name}={value}" for name, value in ANYWHERE.items())])
    tokenizer = load_tokenizer(os.path.expanduser(job.model), args.model_init_kwargs)
    how = {"split": job.train_split, "streaming": job.streaming, "seed": _data_seed(args)} | job.reading()
    found = describe(job.train_data, tokenizer, args, limit=limit, **how)
    return {job.train_split: found}


def show_summaries(summaries: dict[str, DataSummary], *, html: str | None = None, json_to: str | None = None) -> None:
    """Prints tables of them, or JSON where json_to is "-"; writes a page (html) and a file of JSON (json_to) where named."""
    from rich.console import Console

    from .data.summary import as_json
    from .data.summary.terminal import show

    if json_to == "-":
        print(json.dumps(as_json(summaries), ensure_ascii=False))
    else:
        for name, summary in summaries.items():
            show(summary, Console(), name)
    if json_to not in (None, "-"):
        write_json(Path(json_to), as_json(summaries))
    if html is not None:
        from .data.summary.page import page

        write_text(Path(html), page(summaries))


@documented
@dataclass
class ScoreJob(Reading):
    """The settings of `larpo score`.

    Args:
        model: Name or folder of a causal LM.
        data: Candidate lists, with scores or without: .jsonl, .json, .parquet, a saved dataset or a hub name.
        out: Where to write them with logps: .parquet or .jsonl.
        split: Split of the data, where it has splits.
        ref_model: Adds ref_logps and implicit_rewards.
        beta: implicit_rewards = beta * (logps - ref_logps).
        batch_size: Lists at a time.
        candidate_batch_size: Candidates at a time.
        max_length: Most tokens of prompt and completion.
        max_prompt_length: Most tokens of a prompt (not given: half of max_length, 512 at most).
        truncation_mode: What stays of a prompt that is too long: keep_end or keep_start.
        append_eos: End completions that are plain strings with EOS.
        dtype: Dtype of the weights (None: float32, as in training).
        trust_remote_code: Let a model from the hub run its own code.
    """

    model: str
    data: str
    out: str
    split: str = "train"
    ref_model: str | None = None
    beta: float = 0.1
    batch_size: int = 8
    candidate_batch_size: int | None = None
    max_length: int | None = 1024
    max_prompt_length: int | None = PROMPT_LENGTH
    truncation_mode: Truncation = "keep_end"
    append_eos: bool = True
    dtype: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.out = os.path.abspath(Path(self.out).expanduser())
        if Path(self.out).suffix not in (".parquet", ".jsonl"):
            raise ValueError(f"out must end in .parquet or .jsonl, got {self.out!r}")


def score(job: ScoreJob) -> Dataset:
    """Scores lists and writes them with the new columns to `job.out`; see `larpo.score_lists`.

    Results are kept in a folder beside that file as they come, whose name ends in .parts, until the file is written: a run that
    was killed goes on there. Processes of `accelerate launch` or `torchrun` share the work; the first one writes.
    """
    from .data.loading import load_lists
    from .modeling.loading import load_causal_lm, load_tokenizer
    from .modeling.sharding import whole_weights
    from .scoring import score_lists

    out = Path(job.out)
    lists = load_lists(job.data, split=job.split, scored=False, **job.reading())
    out.parent.mkdir(parents=True, exist_ok=True)
    ranks, parts = Ranks.connected(), out.with_name(f"{out.name}.parts")
    options = {"trust_remote_code": job.trust_remote_code} | ({} if job.dtype is None else {"dtype": job.dtype})

    def load(name: str) -> Any:
        with whole_weights():
            return load_causal_lm(os.path.expanduser(name), options).to(processes().device)

    scored = score_lists(
        load(job.model),
        lists,
        load_tokenizer(os.path.expanduser(job.model), options),
        ref_model=None if job.ref_model is None else load(job.ref_model),
        beta=job.beta,
        batch_size=job.batch_size,
        candidate_batch_size=job.candidate_batch_size,
        max_length=job.max_length,
        max_prompt_length=job.max_prompt_length,
        truncation_mode=job.truncation_mode,
        append_eos=job.append_eos,
        parts=parts,
    )
    write = scored.to_parquet if out.suffix == ".parquet" else partial(scored.to_json, force_ascii=False)
    ranks.first(lambda: write_whole(out, write))
    ranks.first(lambda: remove(parts))
    return scored

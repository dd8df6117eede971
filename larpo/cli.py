"""The command `larpo`."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Optional

import typer

from .data import reading

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Align language models on ranked lists of candidates (LarPO, arXiv 2502.03699).",
)
FORWARDED = {"allow_extra_args": True, "ignore_unknown_options": True}
Text = Optional[str]  # noqa: UP045
Config = Annotated[Optional[Path], typer.Option(help="A YAML file of settings; flags win over it.")]  # noqa: UP045


@app.command(context_settings=FORWARDED)
def train(context: typer.Context, config: Config = None) -> None:
    """Train on a file of ranked candidate lists.

    Every setting can stand in the file or be a flag: model, train_data, eval_data, ref_model, peft, and all of LarPOConfig
    and transformers.TrainingArguments (`larpo settings` lists them). A run that was killed goes on where it was; a folder
    with checkpoints of another run is refused, and the settings that differ are named.
    """
    from . import commands

    job, args = commands.train_settings(config, context.args)
    with _shown("larpo.data"), _shown("larpo.training"):
        commands.train(job, args)
    if args.process_index == 0:
        typer.echo(f"saved in {args.output_dir}")


@app.command(context_settings=FORWARDED)
def data(
    context: typer.Context,
    source: Annotated[Text, typer.Argument(metavar="FILE_OR_NAME", help="Data, or the larpo-data.json of a run.")] = None,
    model: Annotated[Text, typer.Option(help="Whose tokenizer counts the tokens.")] = None,
    config: Config = None,
    limit: Annotated[Optional[int], typer.Option(help="Tokenise and describe only the first so many lists.")] = None,  # noqa: UP045
    html: Annotated[Text, typer.Option(help="Write a page with plots here.")] = None,
    json: Annotated[Text, typer.Option(help="Write the facts here; - is standard output, in place of the tables.")] = None,
) -> None:
    """Show what a training run would see of its data, before it is trained on.

    Takes every setting of `larpo train` (--max_length 2048, --columns, --form, --train_split ...; `larpo settings` lists them),
    from a run's file too: `larpo data --config train.yaml` is of that run's train_data.
    """
    from . import commands

    given = [source, *context.args] if (source or "").startswith("--") else context.args  # no data but flags
    source = None if given is not context.args else source
    summaries = commands.describe(source, model, config, given, limit=limit)
    commands.show_summaries(summaries, html=html, json_to=json)


@app.command(context_settings=FORWARDED)
def align(
    context: typer.Context,
    config: Config = None,
    status: Annotated[Optional[Path], typer.Option(help="Only say where the run in this folder stands.")] = None,  # noqa: UP045
) -> None:
    """Run the whole loop: sample, score, build lists, train, evaluate, and again.

    Every setting of larpo.align.AlignConfig can stand in the file or be a flag (--iterations 5, --training.beta 0.05). A run
    that was killed goes on where it was.
    """
    if status is not None:
        from .align.status import status as where

        typer.echo(where(status))
        return
    from . import align as package
    from .runs.ranks import processes

    result = package.run(package.load_config(config, flag_values(context.args)))
    if processes().is_main_process:
        typer.echo(f"see {result.summary}")
    processes().destroy_process_group()


@app.command(context_settings=FORWARDED)
def recipe(
    context: typer.Context,
    name: Annotated[Optional[str], typer.Argument(help="Which; without it they are listed.")] = None,  # noqa: UP045
) -> None:
    """Run a neighbouring method over the same kernels; flags go to it (`larpo recipe NAME --help`)."""
    from . import recipes

    if name is None:
        for known, one in recipes.RECIPES.items():
            typer.echo(f"{known:12} {one.description}")
        return
    recipes.load(name).main(context.args)


@contextmanager
def _shown(name: str) -> Iterator[None]:
    """What is logged under this name is written to stderr for a while."""
    logger, handler = logging.getLogger(name), logging.StreamHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def flag_values(flags: list[str]) -> dict[str, object]:
    """`--name value` and `--name=value` as a dict; values are read as YAML, a flag without one is true.

    >>> flag_values(["--iterations", "5", "--training.beta=0.05", "--distinct"])
    {'iterations': 5, 'training.beta': 0.05, 'distinct': True}
    """
    import yaml

    values: dict[str, object] = {}
    rest = list(flags)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise ValueError(f"expected a flag, got {flag!r}")
        name, given, text = flag[2:].partition("=")
        if not given:
            text = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        values[name.replace("-", "_")] = yaml.safe_load(text)
    return values


@app.command()
def settings(everything: Annotated[bool, typer.Option("--all", help="TrainingArguments too.")] = False) -> None:
    """List the settings of `larpo train`, with their defaults."""
    from dataclasses import MISSING, fields

    from rich.console import Console
    from rich.table import Table
    from transformers import TrainingArguments

    from .commands import TrainJob
    from .config import LarPOConfig

    inherited = set() if everything else {f.name for f in fields(TrainingArguments)}
    table = Table("setting", "default", "what it does")
    for one in (*fields(TrainJob), *(f for f in fields(LarPOConfig) if f.name not in inherited)):
        has_none = one.default is MISSING and one.default_factory is MISSING
        default = "needed" if has_none else "" if one.default is MISSING else str(one.default)
        table.add_row(one.name, default, one.metadata.get("help", ""))
    Console().print(table)


@app.command()
def score(
    model: Annotated[str, typer.Option(help="Name or folder of a causal LM.")],
    data: Annotated[str, typer.Option(help="Candidate lists: .jsonl, .json, .parquet, a saved dataset or a hub name.")],
    out: Annotated[Path, typer.Option(help="Where to write them with logps: .parquet or .jsonl.")],
    ref_model: Annotated[Optional[str], typer.Option(help="Adds ref_logps and implicit_rewards.")] = None,  # noqa: UP045
    beta: Annotated[float, typer.Option(help="implicit_rewards = beta * (logps - ref_logps).")] = 0.1,
    batch_size: Annotated[int, typer.Option(help="Lists at a time.")] = 8,
    candidate_batch_size: Annotated[Optional[int], typer.Option(help="Candidates at a time.")] = None,  # noqa: UP045
    max_length: Annotated[int, typer.Option(help="Most tokens of prompt and completion.")] = 1024,
    max_prompt_length: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Most tokens of a prompt; half of max_length, 512 at most, if not given."),
    ] = None,
    truncation_mode: Annotated[str, typer.Option(help="What stays of a long prompt: keep_end or keep_start.")] = "keep_end",
    append_eos: Annotated[bool, typer.Option(help="End completions that are plain strings with EOS.")] = True,
    split: Annotated[str, typer.Option(help="Split of the data, where it has splits.")] = "train",
    dtype: Annotated[Optional[str], typer.Option(help="Dtype of the weights; float32, as in training, if not given.")] = None,  # noqa: UP045
    trust_remote_code: Annotated[bool, typer.Option(help="Let a model from the hub run its own code.")] = False,
    columns: Annotated[Optional[str], typer.Option(help=reading.COLUMNS)] = None,  # noqa: UP045
    form: Annotated[Optional[str], typer.Option(help=reading.FORM)] = None,  # noqa: UP045
    score_of: Annotated[Optional[str], typer.Option("--score", help=reading.SCORE)] = None,  # noqa: UP045
    group_by: Annotated[Optional[str], typer.Option(help=reading.GROUP_BY)] = None,  # noqa: UP045
    as_messages: Annotated[Optional[bool], typer.Option(help=reading.AS_MESSAGES)] = None,  # noqa: UP045
    bad_rows: Annotated[str, typer.Option(help=reading.BAD_ROWS)] = "raise",
) -> None:
    """Write the log-likelihood and implicit reward of every candidate in a file of lists.

    For ref_logps to train with, give the lengths, truncation_mode and append_eos of that training. A run that was killed
    goes on where it was; `accelerate launch -m larpo.cli score ...` shares the work of several GPUs.
    """
    from . import commands
    from .data.tokenization import PROMPT_LENGTH
    from .runs.ranks import processes

    how = reading.Reading(
        columns=columns, form=form, score=score_of, group_by=group_by, as_messages=as_messages, bad_rows=bad_rows
    )
    with _shown("larpo.runs"):
        scored = commands.score(
            model, data, out, ref_model=ref_model, beta=beta, batch_size=batch_size, candidate_batch_size=candidate_batch_size,
            max_length=max_length, max_prompt_length=PROMPT_LENGTH if max_prompt_length is None else max_prompt_length,
            truncation_mode=truncation_mode, append_eos=append_eos, split=split, dtype=dtype,
            trust_remote_code=trust_remote_code, reading=how,
        )  # fmt: skip
    if processes().is_main_process:
        typer.echo(f"{len(scored)} lists in {out}: {', '.join(scored.column_names)}")
    processes().destroy_process_group()


def main() -> None:
    """Runs the command; what the user got wrong, a model that is not there and a reward that fails end in what they have to
    say, not in a traceback."""
    from .rewards import RewardError
    from .runs.ranks import OtherProcess, ProcessGone
    from .runs.secrets import masked

    try:
        app()
    except (ValueError, OSError, ImportError, RewardError, FloatingPointError, OtherProcess) as error:
        who = f"process {os.environ.get('RANK', '?')}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        if isinstance(error, ProcessGone) or not isinstance(error, OtherProcess):  # else the other one says it
            typer.echo(f"larpo: {who}{masked(str(error))}", err=True)  # some show settings, or an address with its password
        if isinstance(error, OtherProcess):
            time.sleep(1)  # what started them ends all with the first that ends: that shall be the one which failed
        sys.exit(2)


if __name__ == "__main__":
    main()

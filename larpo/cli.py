"""The command `larpo`."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

from .runs.settings import flag_values, read_settings, settings_of

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Align language models on ranked lists of candidates (LarPO, arXiv 2502.03699).",
)
FORWARDED = {"allow_extra_args": True, "ignore_unknown_options": True}
Text = str | None
Config = Annotated[Path | None, typer.Option(help="A YAML file of settings; flags win over it.")]


def _show_settings(kinds: Sequence[type], without: Sequence[type] = ()) -> None:
    """A table of the settings that these dataclasses have, and the others do not."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    inherited = settings_of(without)
    table = Table("setting", "default", "what it does")
    for name, setting in settings_of(kinds).items():
        if name not in inherited:
            default = setting.field.default
            shown = "needed" if setting.is_needed else "" if default is MISSING else str(default)
            table.add_row(name, shown, escape(setting.field.metadata.get("help", "")))
    Console().print(table)


class WithSettings(TyperCommand):
    """A command whose --help lists its settings as well: they are the fields of a dataclass, and no options of typer."""

    def format_help(self, *where) -> None:
        from .align import AlignConfig
        from .commands import ScoreJob

        super().format_help(*where)
        _show_settings([{"align": AlignConfig, "score": ScoreJob}[self.name]])


@app.command(context_settings=FORWARDED)
def train(context: typer.Context, config: Config = None) -> None:
    """Train on a file of ranked candidate lists.

    Every setting can be in the file or a flag: model, train_data, eval_data, ref_model, peft, and all of LarPOConfig and
    transformers.TrainingArguments (`larpo settings` lists them). A run that was killed continues; a folder with
    checkpoints of another run is refused, naming the settings that differ.
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
    model: Annotated[Text, typer.Option(help="The model whose tokenizer counts the tokens.")] = None,
    config: Config = None,
    limit: Annotated[int | None, typer.Option(help="Tokenise and describe only the first so many lists.")] = None,
    html: Annotated[Text, typer.Option(help="Write a page with plots here.")] = None,
    json: Annotated[Text, typer.Option(help="Write the facts here; - for standard output, instead of the tables.")] = None,
) -> None:
    """Show what a training run would see of its data, before it is trained on.

    Takes every setting of `larpo train` (--max_length 2048, --columns, --form, --train_split ...; `larpo settings` lists them),
    also from the file of a run: `larpo data --config train.yaml` describes its train_data.
    """
    from . import commands

    given = [source, *context.args] if (source or "").startswith("--") else context.args  # no data but flags
    source = None if given is not context.args else source
    summaries = commands.describe(source, model, config, given, limit=limit)
    commands.show_summaries(summaries, html=html, json_to=json)


@app.command(cls=WithSettings, context_settings=FORWARDED)
def align(
    context: typer.Context,
    config: Config = None,
    status: Annotated[Path | None, typer.Option(help="Only show where the run in this folder is.")] = None,
) -> None:
    """Run the whole loop: sample, score, build lists, train, evaluate, and again.

    Every setting below can be in the file or a flag (--iterations 5, --training.beta 0.05). A run that was killed continues.
    """
    if status is not None:
        from .align.status import status as where

        typer.echo(where(status))
        return
    from .align import AlignConfig, load_config, run
    from .runs.ranks import processes

    result = run(load_config(config, flag_values(context.args, [AlignConfig])))
    if processes().is_main_process:
        typer.echo(f"see {result.summary}")
    processes().destroy_process_group()


@app.command(context_settings=FORWARDED)
def recipe(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Which recipe; without it they are listed.")] = None,
) -> None:
    """Run a neighbouring method over the same kernels; flags go to it (`larpo recipe NAME --help`)."""
    from . import recipes

    if name is None:
        for known, description in recipes.RECIPES.items():
            typer.echo(f"{known:12} {description}")
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


@app.command()
def settings(everything: Annotated[bool, typer.Option("--all", help="Also those of TrainingArguments.")] = False) -> None:
    """List the settings of `larpo train`, with their defaults."""
    from transformers import TrainingArguments

    from .commands import TrainJob
    from .config import LarPOConfig

    _show_settings((TrainJob, LarPOConfig), without=() if everything else (TrainingArguments,))


@app.command(cls=WithSettings, context_settings=FORWARDED)
def score(context: typer.Context, config: Config = None) -> None:
    """Write the log-likelihood and implicit reward of every candidate in a file of lists.

    Every setting below can be in the file or a flag (--batch-size 4). For ref_logps to train with, give the lengths,
    truncation_mode and append_eos of that training. A run that was killed continues; `accelerate launch -m larpo.cli score ...`
    shares the work over several GPUs.
    """
    from . import commands
    from .runs.ranks import processes

    (job,) = read_settings([commands.ScoreJob], config, flag_values(context.args, [commands.ScoreJob]))
    with _shown("larpo.runs"):
        scored = commands.score(job)
    if processes().is_main_process:
        typer.echo(f"{len(scored)} lists in {job.out}: {', '.join(scored.column_names)}")
    processes().destroy_process_group()


def main() -> None:
    """Runs the command. A mistake of the user, a missing model or a failing reward ends in one sentence, not in a traceback."""
    from .rewards import RewardError
    from .runs.ranks import OtherProcess, ProcessGone
    from .runs.secrets import masked

    try:
        app()
    except (ValueError, OSError, ImportError, RewardError, FloatingPointError, OtherProcess) as error:
        who = f"process {os.environ.get('RANK', '?')}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        if isinstance(error, ProcessGone) or not isinstance(error, OtherProcess):  # else the other process has printed it
            typer.echo(
                f"larpo: {who}{masked(str(error))}", err=True
            )  # a message may hold a setting, or an address with its password
        if isinstance(error, OtherProcess):
            time.sleep(1)  # the launcher ends all processes with the first that ends, which should be the one that failed
        sys.exit(2)


if __name__ == "__main__":
    main()

"""Algorithm 1 of LarPO (arXiv 2502.03699) over a run folder: every stage of every iteration that is not done yet, in order."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..runs.files import read_json, whole_path, write_json, write_text
from ..runs.intact import Damaged
from ..runs.lock import locked
from ..runs.progress_bars import without_bars_of_libraries
from ..runs.ranks import Ranks
from . import stages
from .config import AlignConfig, differences
from .lines import line
from .prompts import Prompt, load_prompts
from .run_folder import RunFolder, stages_of
from .run_state import Run
from .samplers import refuse_beside_others

if TYPE_CHECKING:
    import torch

    from ..config import LarPOConfig


class Result(NamedTuple):
    """What `run` leaves behind."""

    folder: Path
    summary: Path  # summary.md
    metrics: list[dict[str, Any]]  # of the start and of every iteration: the counts of each stage, by its name


def run(config: AlignConfig, *, progress: bool = True) -> Result:
    """Runs the loop, or the rest of it: stages that are done are not repeated, and one that was begun continues.

    Processes that `accelerate launch` or `torchrun` started share every stage. Each returns the result; the first writes it.

    Args:
        config: the settings of the run. A run that its folder holds already must be the same one, but for more iterations.
        progress: shows bars, and a line for each stage.

    Raises:
        ValueError: a bad setting; a folder that holds another run, naming every difference, where another run is at work, or
            that is not shared by all processes; processes with different settings or code, naming what differs.
        Damaged: a file was not written to its end; says which, and what to delete to have it again. A ValueError.
        RewardError: a reward raised (with on_reward_error="raise"); nothing that was sampled is lost. A RuntimeError.
        OtherProcess: another process failed, or is gone. A RuntimeError.
    """
    from .reporting import Reporter
    from .training import arguments

    folder = RunFolder(config.output_dir)
    args = arguments(config, str(folder.path), seed=config.seed)  # refuses bad training settings, and connects processes
    ranks = Ranks.started()
    refuse_beside_others(config, ranks.count)
    ranks.refuse_different(config.to_dict())
    ranks.refuse_separate(folder.path, "output_dir")
    with ranks.first_within(locked(folder.path)), without_bars_of_libraries(), _saying_how_to_redo(folder):
        state = _prepare(config, folder, args, ranks, progress and ranks.is_first)
        with contextlib.closing(Reporter(config.report_to, args)) as reporter:
            for iteration in range(config.iterations + 1):
                for stage in stages_of(iteration, refill=config.refill):
                    reporter.stage(iteration, stage, _stage(state, iteration, stage))
                stages.clean_up(state, iteration)
        metrics = ranks.first(lambda: _summarise(state))
    return Result(folder.path, folder.path / "summary.md", metrics)


def _prepare(config: AlignConfig, folder: RunFolder, args: LarPOConfig, ranks: Ranks, progress: bool) -> Run:
    """The run with its prompts, which are read once: later changes of their file don't reach a run that has begun."""
    import yaml

    from ..modeling.sharding import whole_weights, will_replace_parameters
    from ..rewards import Memory
    from .models import Models

    settings, prompts = folder.path / "config.yaml", folder.path / "prompts.json"

    def before() -> dict[str, Any] | None:
        found = folder.settings()
        if found is not None and (changed := differences(found, config)):
            raise ValueError(f"output_dir={str(folder.path)!r} holds another run: {'; '.join(changed)}")
        return found

    def write(found: tuple[list[Prompt], list[Prompt]] | None) -> dict[str, Any]:
        if found is not None:
            write_json(prompts, {"train": found[0], "held_out": found[1]})
        if begun != config.to_dict():
            write_text(settings, yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True))
        return read_json(prompts)

    begun = ranks.first(before)
    models = Models(config, args.device, will_replace_parameters(args))
    ranks.each(models.check)
    # Prompts without settings beside them are of a process that was killed between the two; they may be of other settings.
    found = ranks.first(lambda: load_prompts(config) if begun is None or not prompts.exists() else None)
    with whole_weights():
        rewards = ranks.each(lambda: _rewards(config, args.device))  # after the prompts: it may change the working directory
    read = ranks.first(lambda: write(found))
    memory = Memory(folder.path / "judgements")
    return Run(config, folder, models, rewards, read["train"], read["held_out"], progress, ranks, memory)


def _rewards(config: AlignConfig, device: torch.device) -> list[Any]:
    from ..rewards import BUILT_IN, Judge, from_name, from_settings, sequence_classifier
    from ..rewards.combining import check_weights, refuse_alike

    def find(name: str) -> Any:
        if name in BUILT_IN or (":" in name and not Path(name).exists()):
            return from_name(name)
        classifier = sequence_classifier(name)
        classifier.model.to(device)
        return classifier

    def judge(one: Any) -> Judge:
        if isinstance(one, Mapping):
            return from_settings(one, find)
        return Judge.of(one if callable(one) else find(one))

    def placed(one: Any) -> Any:
        if isinstance(one, Mapping):
            return {name: placed(value) if name == "reward" else value for name, value in one.items()}
        return one if callable(one) or one in BUILT_IN else whole_path(one)

    given = [placed(one) for one in config.rewards()]  # before one of them may change the working directory
    if not given:
        raise ValueError("reward is empty; expected at least one")
    check_weights(config.reward_weights, len(given), "reward_weights")
    judges = [judge(one) for one in given]
    refuse_alike(judges)  # before anything is sampled
    return judges


def _stage(run: Run, iteration: int, name: str) -> dict[str, Any]:
    """The counts of a stage, which is run if it is not done."""
    from ..modeling.sharding import whole_weights

    folder = run.folder.iteration(iteration)
    counts = run.ranks.first(lambda: run.counts(iteration, name))
    if counts is not None:
        return counts
    started = time.perf_counter()
    with contextlib.nullcontext() if name == "train" else whole_weights():
        counts = getattr(stages, name)(run, iteration)
    counts["seconds"] = round(time.perf_counter() - started, 1)
    run.ranks.first(lambda: write_json(folder / f"{name}.json", counts))
    if run.progress:
        print(line(folder.name, name, counts), flush=True)
    return counts


def _summarise(run: Run) -> list[dict[str, Any]]:
    from . import plots, summary
    from .page import html

    metrics = [
        {"iteration": i} | {name: run.counts(i, name) for name in stages_of(i, refill=run.config.refill)}
        for i in range(run.config.iterations + 1)
    ]
    write_json(run.folder.path / "metrics.json", metrics)
    pictures = plots.draw(metrics, run.config, run.folder.path / "plots")
    page = run.folder.path / "summary.md"
    text = summary.page(run, metrics, pictures)
    write_text(page, text)
    write_text(page.with_suffix(".html"), html(text, run.folder.path, summary.title(run)))
    if run.progress:
        print(f"\n{summary.table(metrics)}\n\n{page}", flush=True)
    return metrics


@contextlib.contextmanager
def _saying_how_to_redo(folder: RunFolder) -> Iterator[None]:
    try:
        yield
    except Damaged as error:
        advice = folder.how_to_redo(error.path)
        raise Damaged(error.path, f"{error.why}. {advice}" if advice else error.why) from error

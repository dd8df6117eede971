"""Which checkpoint of a run can be gone on from, so that it ends as a run that was never stopped."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from .files import read_json
from .intact import damage, first_damage

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

STATE = "trainer_state.json"  # written last

AS_ASKED = ", as save_only_model asks"

# One of each must be there. transformers leaves out what it does not find, says nothing, and ends with other weights. After the
# files of one process and of DDP come those of FSDP, DeepSpeed (which has a scheduler of its own, maybe) and XLA.
MODEL = (
    "model*.safetensors",
    "adapter_model*.safetensors",
    "*/adapter_model*.safetensors",
    "pytorch_model*.bin",
    "adapter_model*.bin",
    "pytorch_model_fsdp*/.metadata",
    "global_step*/*model_states.pt",
)
OPTIMIZER = ("optimizer.pt", "optimizer.bin", "optimizer_*/.metadata", "rank*-of-*-optimizer.pt", "global_step*/*_states.pt")
SCHEDULER = ("scheduler.pt", "global_step*")
SCALER = ("scaler.pt", "global_step*")


def last_whole_checkpoint(folder: str | Path, args: TrainingArguments | None = None) -> str | None:
    """The newest whole checkpoint-N in the folder: one from which a run ends with the weights of a run that was never stopped.
    None if there is none. A newer one that is not whole is skipped, with a warning that says what is wrong with it.

    args: the settings of the run that continues: its number of processes, and whether it scales gradients.
    """
    for checkpoint in _newest_first(folder):
        wrong = what_is_missing(checkpoint, args)
        if wrong is None:
            return str(checkpoint)
        logger.warning("%s is passed over: %s", checkpoint, wrong)
    return None


def checkpoint_to_go_on_from(folder: str | Path, args: TrainingArguments) -> str | None:
    """As `last_whole_checkpoint`, but None only if no checkpoint was ever finished, so that nothing is lost by starting anew.

    Raises ValueError, saying what is wrong with each, if some were finished and none of them is whole now.
    """
    found = last_whole_checkpoint(folder, args)
    if found is None and has_finished_checkpoint(folder):
        wrong = "; ".join(f"{path.name}: {what_is_missing(path, args)}" for path in _newest_first(folder))
        raise ValueError(
            f"output_dir={str(folder)!r} holds no checkpoint from which the run would end with the right weights ({wrong}). "
            "Delete its checkpoints to start from the beginning"
        )
    return found


def refuse_incomplete(checkpoint: str | Path, args: TrainingArguments) -> None:
    """Raises ValueError for a checkpoint from which training can't continue as if it had never stopped. Warns about one without
    the optimizer's state, as save_only_model leaves it, and about one of another number of processes."""
    wrong = what_is_missing(Path(checkpoint), args)
    if wrong is None:
        _warn_of_other_processes(Path(checkpoint), args.world_size)
    elif args.save_only_model and wrong.endswith(AS_ASKED):
        logger.warning("%s: %s; optimizer, schedule and random numbers start anew", checkpoint, wrong)
    else:
        raise ValueError(f"resume_from_checkpoint={str(checkpoint)!r} can't be gone on from: {wrong}")


def has_finished_checkpoint(folder: str | Path) -> bool:
    """Whether a checkpoint was written to its end, whatever has become of it since."""
    return any(map(is_finished, _newest_first(folder)))


def is_finished(checkpoint: Path) -> bool:
    return (checkpoint / STATE).is_file() and damage(checkpoint / STATE) is None


def what_is_missing(checkpoint: Path, args: TrainingArguments | None = None) -> str | None:
    """Why a run that goes on from here would end with other weights, or not start; None if it would not."""
    if not is_finished(checkpoint):
        return f"it was not written to its end (no whole {STATE})"
    if (damaged := first_damage(checkpoint)) is not None:
        file, why = damaged
        return f"{file.relative_to(checkpoint).as_posix()}: {why}"
    if (missing := _missing_part(checkpoint)) is not None:
        return missing
    needed = {"weights of the model": MODEL, "state of the optimizer": OPTIMIZER, "state of the scheduler": SCHEDULER}
    if args is not None and args.fp16:
        needed["state of the gradient scaler"] = SCALER
    for what, patterns in needed.items():
        if not any(True for pattern in patterns for _ in checkpoint.glob(pattern)):
            only = what.startswith("state") and args is not None and args.save_only_model
            return f"it holds no {what} ({patterns[0]})" + (AS_ASKED if only else "")
    return _missing_random_state(checkpoint)


def _newest_first(folder: str | Path) -> list[Path]:
    found = [
        (int(match[1]), path)
        for path in Path(folder).glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) is not None
    ]
    return [path for _, path in sorted(found, reverse=True)]


def _missing_part(checkpoint: Path) -> str | None:
    """A file of weights that an index names, the contents of a distributed checkpoint, or a rank's part of the optimizer."""
    for index in checkpoint.glob("*.index.json"):
        for name in sorted(set(read_json(index).get("weight_map", {}).values())):
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
    for part in checkpoint.glob("*/*.distcp"):
        if not (part.parent / ".metadata").is_file():
            return f"{part.parent.name}/.metadata is missing"
    parts = checkpoint.glob("global_step*/*zero_pp_rank_*_optim_states.pt")
    return _gap((part.name for part in parts), r"zero_pp_rank_(\d+)_")


def _missing_random_state(checkpoint: Path) -> str | None:
    names = [path.name for path in checkpoint.glob("rng_state*.pth")]
    if not names:
        return "it holds no random state (rng_state.pth)"
    return None if "rng_state.pth" in names else _gap(names, r"rng_state_(\d+)\.")


def _gap(names: Iterable[str], pattern: str) -> str | None:
    """The first number that is left out in the names of files that are numbered from 0."""
    numbers = {int(match[1]) for name in names if (match := re.search(pattern, name))}
    missing = sorted(set(range(max(numbers, default=-1) + 1)) - numbers)
    return f"number {missing[0]} of its {pattern.split('(')[0]}* files is missing" if missing else None


def _warn_of_other_processes(checkpoint: Path, processes: int) -> None:
    """Batches and random numbers then differ from those of a run that was not stopped; that may be what is wanted."""
    own = "rng_state.pth" if processes == 1 else f"rng_state_{processes - 1}.pth"
    one_more = f"rng_state_{processes}.pth"
    if not (checkpoint / own).is_file() or (processes > 1 and (checkpoint / one_more).is_file()):
        logger.warning(
            "%s was written by another number of processes than the %d of now: its random states are not used, and batches "
            "hold other lists than they would have held",
            checkpoint,
            processes,
        )

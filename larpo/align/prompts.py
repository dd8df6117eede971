"""The prompts of a run: rows {"prompt": text or messages, and any columns that the reward wants}."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data import json_text
from ..data.chat_template import template_keywords
from ..data.validation import check_no_media, check_text
from .config import AlignConfig

Prompt = dict[str, Any]
# What the loop itself gives to a reward, and arguments of `larpo.rewards.score`.
RESERVED = ("prompts", "completions", "completion_ids", "rewards", "weights", "on_error")


def load_prompts(config: AlignConfig) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on, in a shuffled order, and held-out ones. None comes twice, none is in both: a prompt has one list,
    so of rows with one prompt the first counts, with a warning where the others say something else.

    Raises ValueError where prompts can't be read, columns have a name that is taken or hold what JSON can't, or too few
    prompts are left to train or to evaluate on.
    """
    prompts = _distinct(_read(config.prompts, config.prompts_split, "prompts"), "prompts")
    random.Random(config.seed).shuffle(prompts)
    if isinstance(config.eval_prompts, int):
        n = config.eval_prompts
        if not 0 < n < len(prompts):
            raise ValueError(f"eval_prompts must be at least 1 and below the {len(prompts)} different prompts, got {n}")
        held_out, prompts = prompts[:n], prompts[n:]
    else:
        held_out = _distinct(_read(config.eval_prompts, config.eval_prompts_split, "eval_prompts"), "eval_prompts")
        keys = {key_of(row) for row in held_out}
        prompts = [row for row in prompts if key_of(row) not in keys]
    if not prompts or not held_out:
        raise ValueError(f"{len(prompts)} prompts to train on and {len(held_out)} held out; expected at least one of each")
    return prompts, held_out


def of_iteration(
    prompts: list[Prompt], per_iteration: int | None, iteration: int, further: int = 0
) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts of an iteration (from 1), the next `per_iteration` in order, from the start again after the last one; and all
    others, in the order in which they are next.

    further: how many more prompts the iterations before this one have had.
    """
    if per_iteration is None or per_iteration >= len(prompts):
        return prompts, []
    first = ((iteration - 1) * per_iteration + further) % len(prompts)
    in_order = prompts[first:] + prompts[:first]
    return in_order[:per_iteration], in_order[per_iteration:]


def imdb_openings(words: int = 5) -> list[Prompt]:
    """ "Movie review: " and the first words of each of the 200 film reviews in `larpo.offline.imdb_reviews`."""
    from ..offline import imdb_reviews

    reviews, _ = imdb_reviews()
    return [{"prompt": f"Movie review: {' '.join(review.split()[:words])}"} for review in reviews]


def _read(source: Any, split: str, name: str) -> list[Prompt]:
    if source == "imdb":
        return imdb_openings()
    if not isinstance(source, str | Path):
        rows = list(source)  # AlignConfig has seen to it that this is a list
    elif (path := Path(source).expanduser()).suffix in (".txt", ".json", ".jsonl", ".parquet"):
        rows = _read_file(path)
        if not rows:
            raise ValueError(f"{name}: {path} holds no prompts")
    else:
        import datasets

        rows = list(json_text.write_dataset(datasets.load_dataset(str(source), split=split), name))
    return [_row(row, f"{name}, row {i}") for i, row in enumerate(rows)]


def _read_file(path: Path) -> list:
    from ..data import files
    from ..data.one_source import read_parquet
    from ..runs.files import read_text

    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if path.suffix == ".txt":  # not splitlines, which also parts prompts at form feeds, U+2028 and the like
        lines = [line.removesuffix("\r") for line in read_text(path).split("\n")]
        return [line for line in lines if line.strip()]
    return list(json_text.write_dataset(read_parquet([path]), str(path))) if path.suffix == ".parquet" else files.read(path)[0]


def _row(row: Any, where: str) -> Prompt:
    row = dict(row) if isinstance(row, Mapping) else {"prompt": row}
    if "prompt" not in row:
        raise ValueError(f"{where}: field 'prompt' is missing; found {sorted(row)}")
    check_no_media(row, where)
    check_text("prompt", row["prompt"], where)
    if taken := [name for name in row if name in RESERVED]:
        raise ValueError(f"{where}: columns {taken} have names that the loop itself uses; rename or drop them")
    for name, value in row.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise ValueError(f"{where}: column {name!r} holds what JSON can't ({error}); make it text or numbers") from None
    try:
        template_keywords(row)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return row


def _distinct(rows: list[Prompt], name: str) -> list[Prompt]:
    first: dict[str, Prompt] = {}
    for row in rows:
        first.setdefault(key_of(row), row)
    others = sum(row != first[key_of(row)] for row in rows)
    if others:
        warnings.warn(
            f"{name}: {others} of {len(rows)} rows have the prompt of an earlier row but other columns; they are left out, "
            "since a prompt has one list. Make their prompts differ to keep them",
            stacklevel=3,
        )
    return list(first.values())


def key_of(row: Prompt) -> str:
    """What rows of one prompt share."""
    return json.dumps(row["prompt"], sort_keys=True)

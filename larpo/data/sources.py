"""Several sources of lists, mixed by weight."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runs.yaml_config import nearest
from .converting import Read
from .one_source import read_lists, stream_lists
from .reader import KNOWN, OF_THE_LIST
from .reading import Reading

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

KEPT = {*KNOWN, *OF_THE_LIST}
ROW = "row"


@dataclass(kw_only=True)
class Source(Reading):
    """One source of lists, and how it is read; `weight` says how often a list comes from it, beside the other sources."""

    path: Any  # as `larpo.load_lists` takes it: a file, a folder, a name on the hub
    split: str = "train"
    config: str | None = None
    revision: str | None = None
    weight: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.weight, bool) or not isinstance(self.weight, int | float) or not 0 < self.weight < math.inf:
            raise ValueError(f"weight of {self.path} must be a finite number above 0, got {self.weight!r}")

    def read(self, scored: bool) -> Read:
        return read_lists(self.path, Reading(**self.reading()), scored=scored, **self._where())

    def stream(self, scored: bool) -> IterableDataset:
        return stream_lists(self.path, Reading(**self.reading()), scored=scored, **self._where())

    def _where(self) -> dict[str, str | None]:
        return {"split": self.split, "config": self.config, "revision": self.revision}


def sources_of(source: Any, settings: Mapping[str, Any]) -> list[Source] | None:
    """The sources that are named in a dict with a `path`, or in a list of such and of paths alone; None for anything else.

    settings: those of `Source` that they share; a source's own win.
    """
    several = source if isinstance(source, Sequence) and not isinstance(source, str) else [source]
    alone = isinstance(source, str | Path) or not several
    if alone or not all(isinstance(one, Source | str | Path) or _names_a_path(one) for one in several):
        return None
    known = [one.name for one in fields(Source)]
    for one in several:
        for name in one if isinstance(one, Mapping) else ():
            if name not in known:
                raise ValueError(f"source {one['path']} has no setting {name!r}{nearest(str(name), known)}")
    named = [{"path": one} if isinstance(one, str | Path) else one for one in several]
    return [one if isinstance(one, Source) else Source(**{**settings, **one}) for one in named]


def _names_a_path(one: Any) -> bool:
    """Whether it is a source, and no row that has a column of that name."""
    return isinstance(one, Mapping) and "path" in one and not {"prompt", "completions", "chosen"} & set(one)


def mixed(
    sources: Sequence[Source], parts: Sequence[Dataset] | Sequence[IterableDataset], *, seed: int
) -> Dataset | IterableDataset:
    """The lists of all sources in a random order, each next one from a source with the probability of its weight.

    It ends when every list of every source has come, so that smaller sources are repeated. Only the columns of lists are kept.
    parts: the lists of each source.
    """
    import datasets

    if len(parts) == 1:
        return parts[0]
    streaming = isinstance(parts[0], datasets.IterableDataset)
    first = [_first(part, source) for part, source in zip(parts, sources, strict=True)]
    _refuse_different_kinds(first, sources)
    total = math.fsum(source.weight for source in sources)
    shares = [source.weight / total for source in sources]
    if streaming:
        parts = [part.map(_written, remove_columns=list(row)) for part, row in zip(parts, first, strict=True)]
    else:
        parts = _alike(parts)
    lists = datasets.interleave_datasets(parts, probabilities=shares, seed=seed, stopping_strategy="all_exhausted")
    if streaming:
        lists = lists.map(_read_back, remove_columns=[ROW])
    of = ", ".join(f"{share:.0%} {source.path}" for share, source in zip(shares, sources, strict=True))
    logger.info("mixed%s: %s", "" if streaming else f", {len(lists):,} lists", of)
    return lists


def _first(lists: Dataset | IterableDataset, source: Source) -> dict[str, Any]:
    for row in lists:
        return row
    raise ValueError(f"{source.path}: no row makes a list")


def _refuse_different_kinds(first: Sequence[Mapping[str, Any]], sources: Sequence[Source]) -> None:
    """first: a list of each source."""
    for name in ("prompt", "completions"):
        kinds = [isinstance(one[name] if name == "prompt" else one[name][0], str) for one in first]
        if len(set(kinds)) > 1:
            text, turns = sources[kinds.index(True)].path, sources[kinds.index(False)].path
            raise ValueError(
                f"{name} is text in {text} and messages in {turns}, which can't be mixed: as_messages=True (or False) makes "
                "them the same"
            )


def _alike(parts: Sequence[Dataset]) -> list[Dataset]:
    """The data sets with the columns of lists, in one type each: messages may have keys in one that they lack in another."""
    import datasets
    import pyarrow

    parts = [part.select_columns([name for name in part.column_names if name in KEPT]) for part in parts]
    schemas = [part.features.arrow_schema.remove_metadata() for part in parts]
    joined = datasets.Features.from_arrow_schema(pyarrow.unify_schemas(schemas, promote_options="permissive"))
    return [part.cast(datasets.Features({name: joined[name] for name in part.column_names})) for part in parts]


def _written(row: Mapping[str, Any]) -> dict[str, str]:
    """A row of a stream as text: rows of tables would have the fields of the first ones, and others would be left out."""
    return {ROW: json.dumps({name: value for name, value in row.items() if name in KEPT})}


def _read_back(row: Mapping[str, str]) -> dict[str, Any]:
    return json.loads(row[ROW])

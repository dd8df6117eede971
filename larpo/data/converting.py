"""Turns rows of any form into a Dataset of lists: Python objects all at once, a Dataset in batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from . import json_text
from .forms import Form, recognise
from .reader import IMPLICIT, LeftOut, Reader, Row, key_of
from .reading import Reading

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


class Read(NamedTuple):
    """Lists, and the reader that made them: it knows their form and what was left out."""

    lists: Dataset
    reader: Reader

    @property
    def form(self) -> Form:
        return self.reader.form

    @property
    def left_out(self) -> LeftOut:
        return self.reader.left_out

    def logged(self) -> Dataset:
        """The lists; logs what they were read as (INFO, where that is not what they are), and warns of what was left out."""
        if not self.form.native:
            by = self.reader.scores or "no scores"
            logger.info("read as %s data, scored by %s: %s lists", self.form.name, by, f"{len(self.lists):,}")
        if self.left_out:
            logger.warning("%s", self.left_out)
        return self.lists


def convert_rows(rows: Sequence[Any], place: Callable[[int], str], name: str, reading: Reading, scored: bool) -> Read:
    """Rows of Python objects, each checked before Arrow sees them, so that errors name its place."""
    import datasets
    import pyarrow

    if not rows:
        raise ValueError(f"{name}: holds no rows")
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"{place(i)}: holds {type(row).__name__}; expected an object with named fields")
    reader = reader_for(dict.fromkeys(column for row in rows for column in row), name, reading, scored, rows[0])
    read = [(i, one) for i, row in enumerate(rows) if (one := reader.try_read(row, place(i))) is not None]
    if reader.group_by is not None:
        groups: dict[str, list[tuple[int, Row]]] = {}
        for i, one in read:
            groups.setdefault(key_of(rows[i], reader.group_by), []).append((i, one))
        merged = [(group[0][0], reader.try_merge([one for _, one in group], place(group[0][0]))) for group in groups.values()]
        read = [(i, one) for i, one in merged if one is not None]
    _refuse_none(read, name, reader)
    lists = [json_text.write_row(one) for _, one in read]
    _check_same_kind(lists, [place(i) for i, _ in read])
    table = columns_of(lists)
    for column, values in table.items():
        try:
            pyarrow.array(values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
            raise ValueError(f"{name}: field {column!r} holds values of different types: {error}") from None
    return Read(datasets.Dataset.from_dict(table), reader)


def convert_dataset(dataset: Dataset, name: str, reading: Reading, scored: bool) -> Read:
    """The rows of a Dataset, which may be larger than memory."""
    import datasets
    import pyarrow

    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(f"{name} must be a datasets.Dataset with all its rows, got {type(dataset).__name__}")
    if not len(dataset):
        raise ValueError(f"{name}: holds no rows")
    dataset = json_text.write_dataset(dataset.with_format(None), name)
    reader = reader_for(dataset.column_names, name, reading, scored, dataset[0])
    one_source = getattr(dataset.features.get("source"), "dtype", None) in ("string", "large_string")
    if reader.changes_nothing and not one_source:
        for i, row in enumerate(dataset):
            reader.read(row, f"{name}, row {i}")
        return Read(dataset, reader)
    try:
        lists = _in_batches(dataset, name, reader) if reader.group_by is None else _in_groups(dataset, name, reader)
    except (TypeError, pyarrow.ArrowException, datasets.table.CastError):
        # The first rows have other types than later ones: None for what is text there, or messages with other keys.
        return convert_rows(list(dataset), lambda i: f"{name}, row {i}", name, reading, scored)
    _refuse_none(lists, name, reader)
    return Read(lists, reader)


def _in_batches(dataset: Dataset, name: str, reader: Reader) -> Dataset:
    prompt = reader.form.prompt
    optional = prompt in reader.form.also and prompt in dataset.column_names and None in dataset[prompt][:]
    every = {IMPLICIT: False} if optional else {}  # Arrow wants every row to have every column

    def convert(batch: Mapping[str, list], places: list[int]) -> dict[str, list]:
        rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
        read = (reader.try_read(row, f"{name}, row {i}") for row, i in zip(rows, places, strict=True))
        return columns_of([every | json_text.write_messages(row) for row in read if row is not None])

    return dataset.map(convert, with_indices=True, **_how(dataset, reader))


def _in_groups(dataset: Dataset, name: str, reader: Reader) -> Dataset:
    """The lists of rows that are equal in the column to group by, in the order of their first rows; the rows stay on disk."""
    import datasets

    groups: dict[str, list[int]] = {}
    for i, row in enumerate(dataset.select_columns(reader.group_by)):
        groups.setdefault(key_of(row, reader.group_by) or f"none in row {i}", []).append(i)

    def merge(batch: Mapping[str, list[list[int]]]) -> dict[str, list]:
        lists = []
        for places in batch["rows"]:
            read = [(i, reader.try_read(dataset[i], f"{name}, row {i}")) for i in places]
            read = [(i, row) for i, row in read if row is not None]
            lists += [reader.try_merge([row for _, row in read], f"{name}, row {read[0][0]}")] if read else []
        return columns_of([json_text.write_messages(one) for one in lists if one is not None])

    table = datasets.Dataset.from_dict({"rows": list(groups.values())})
    return table.map(merge, **_how(dataset, reader) | {"remove_columns": ["rows"]})


def _how(dataset: Dataset, reader: Reader) -> dict[str, Any]:
    """Arguments of `Dataset.map`, which runs each time, since it also counts what is left out, and reuses one cached file."""
    import datasets

    what = [dataset._fingerprint, reader.form.name, reader.reading, reader.scores is None]
    return {
        "batched": True,
        "remove_columns": dataset.column_names,
        "load_from_cache_file": False,
        "new_fingerprint": datasets.fingerprint.Hasher.hash(what),
        "desc": "candidate lists",
    }


def reader_for(columns: Iterable[str], name: str, reading: Reading, scored: bool, row: Row) -> Reader:
    columns = list(columns)
    try:
        return Reader(recognise(columns, reading, scored=scored, row=row), columns, reading)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def columns_of(rows: Sequence[Row]) -> dict[str, list]:
    if not rows:
        return {"prompt": []}  # nothing to write; of {} datasets would make a table without columns
    return {column: [row.get(column) for row in rows] for column in dict.fromkeys(name for row in rows for name in row)}


def _refuse_none(lists: Sequence[Any], name: str, reader: Reader) -> None:
    if not len(lists):
        raise ValueError(f"{name}: no row makes a list: {reader.left_out}")


def _check_same_kind(rows: Sequence[Row], places: Sequence[str]) -> None:
    """A column has one type: strings in every row, or messages in every row."""
    for field, of in (("prompt", lambda row: row["prompt"]), ("completions", lambda row: row["completions"][0])):
        first = isinstance(of(rows[0]), str)
        for row, place in zip(rows, places, strict=True):
            if isinstance(of(row), str) != first:
                kinds = ("a string", "messages") if first else ("messages", "a string")
                raise ValueError(f"{place}: field {field!r} holds {kinds[1]}; expected {kinds[0]}, as in {places[0]}")

"""Lists of a stream: read and checked one row at a time, so that memory does not grow with the data."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import files, json_text
from .converting import columns_of, reader_for
from .reader import LeftOut, Reader, Row, key_of
from .reading import Reading

if TYPE_CHECKING:
    from datasets import IterableDataset

logger = logging.getLogger(__name__)

FIRST = 100  # rows whose columns tell the form


def stream_files(paths: Sequence[Path], reading: Reading, scored: bool) -> IterableDataset:
    """The lists in files of text, one file after the other; rows to group must follow each other in a file."""
    import datasets

    rows = (row for path in paths for row, _ in files.rows(path, streaming=True))
    reader, _ = _reader(rows, ", ".join(map(str, paths)), reading, scored)
    # A list among gen_kwargs is what workers of a data loader share out.
    return datasets.IterableDataset.from_generator(_lists_of_files, gen_kwargs={"paths": list(paths), "reader": reader})


def stream_rows(dataset: IterableDataset, name: str, reading: Reading, scored: bool) -> IterableDataset:
    """The lists that the rows of an IterableDataset make.

    Raises ValueError for rows that are to be grouped: batches of them are converted here, and a group may span two.
    """
    dataset = dataset.with_format(None)
    reader, columns = _reader(iter(dataset), name, reading, scored)
    if reader.group_by is not None:
        raise ValueError(
            f"{name}: rows with the same {reader.group_by!r} are one list, which a stream of .jsonl or .csv files can read, "
            "where they follow each other; leave streaming out, or write such a file"
        )
    exact = json_text.columns_with_calls(dataset.features or {})

    def convert(batch: Mapping[str, list], places: list[int]) -> dict[str, list]:
        rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
        plain = (row | json_text.write_columns(row, exact) for row in rows)
        read = (_try_read(reader, row, f"{name}, row {i} of the stream") for row, i in zip(plain, places, strict=True))
        return columns_of([one for one in read if one is not None])

    return dataset.map(convert, with_indices=True, batched=True, batch_size=FIRST, remove_columns=columns)


def _lists_of_files(paths: Sequence[Path], reader: Reader) -> Iterator[Row]:
    reader.left_out = LeftOut()  # of this pass
    for path in paths:
        rows = files.rows(path, streaming=True)
        if reader.group_by is None:
            read = (_try_read(reader, row, place) for row, place in rows)
        else:
            groups = itertools.groupby(rows, partial(_key, column=reader.group_by))
            read = (_try_merge(reader, list(group)) for _, group in groups)
        yield from (one for one in read if one is not None)
    if reader.left_out:
        logger.warning("%s", reader.left_out)


def _key(row_and_place: tuple[Any, str], column: str) -> str | None:
    row = row_and_place[0]
    return key_of(row, column) if isinstance(row, Mapping) else None


def _try_merge(reader: Reader, group: list[tuple[Row, str]]) -> Row | None:
    read = [one for row, place in group if (one := _try_read(reader, row, place)) is not None]
    return reader.try_merge(read, group[0][1]) if read else None


def _try_read(reader: Reader, row: Any, where: str) -> Row | None:
    """The row as a list, or None. What was left out so far is logged at the first, the tenth, the hundredth such row ..."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: holds {type(row).__name__}; expected an object with named fields")
    before = reader.left_out.rows.total()
    one = reader.try_read(row, where)
    now = reader.left_out.rows.total()
    if now > before and set(str(now)[1:]) <= {"0"} and str(now)[0] == "1":
        logger.warning("of the stream so far %s", reader.left_out)
    return one if one is None else json_text.write_row(one)


def _reader(rows: Iterable[Any], name: str, reading: Reading, scored: bool) -> tuple[Reader, list[str]]:
    """The reader of these rows, chosen by the columns of the first of them, and these columns."""
    first = list(itertools.islice(rows, FIRST))
    if not first:
        raise ValueError(f"{name}: holds no rows")
    columns = list(dict.fromkeys(column for row in first if isinstance(row, Mapping) for column in row))
    return reader_for(columns, name, reading, scored, first[0]), columns

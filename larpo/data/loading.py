"""Candidate lists as a dataset: one row for each prompt, with all its completions and their scores.

    prompt: str, or a list of messages {"role", "content"}
    completions: a list of strings, or of lists of messages        scores: a number for each, higher is better
    optional: source (a string for each), ref_logps (nats, for each), prompt_ids and completion_ids (exact tokens),
        completion_mask (which of them count)

Lists may differ in size. Other columns are kept. Tool calls, `tools` and `chat_template_kwargs` are carried as JSON text (see
`larpo.data.json_text`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import json_text
from .forms import Form, recognise
from .reader import IMPLICIT, LeftOut, Reader, Row, key_of
from .reading import Reading
from .validation import check_row

if TYPE_CHECKING:
    from datasets import Dataset

    from ..offline import CandidateList

__all__ = ["Reading", "as_lists", "check_row", "from_candidate_lists", "load_lists", "read_lists"]

logger = logging.getLogger(__name__)

FILES = (".jsonl", ".json", ".parquet")


class Read(NamedTuple):
    """Lists, and the reader that they went through: what form they had, and what was left out."""

    lists: Dataset
    reader: Reader

    @property
    def form(self) -> Form:
        return self.reader.form

    @property
    def left_out(self) -> LeftOut:
        return self.reader.left_out


def load_lists(source: Any, *, split: str = "train", scored: bool = True, **how: Any) -> Dataset:
    """Reads candidate lists, in any form that `as_lists` knows, and checks every row.

    Args:
        source: a .jsonl, .json (an array of objects, or lines) or .parquet file; a folder written by `save_to_disk`;
            the name of a dataset on the hub; a Dataset, a DatasetDict or a list of dicts.
        split: of a DatasetDict, saved or not, or of a dataset on the hub. A file, a Dataset and a list have no splits.
        scored, how: as in `as_lists`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file, its line (from 1) or row (from 0, as `dataset[0]`), the field, what it holds and what is
            expected; columns of no known form; a split that is not there.
    """
    return _said(read_lists(source, Reading(**how), split=split, scored=scored))


def as_lists(dataset: Dataset | Sequence[Mapping[str, Any]], *, scored: bool = True, **how: Any) -> Dataset:
    """Candidate lists in the form of this module, from a Dataset or a list of dicts; every row is checked.

    The form is told by the columns: docs/data.md has a table of those that are known. Other columns are kept.

    Args:
        scored: False takes {prompt, completions} without scores too, and leaves them so.
        how: settings of `larpo.data.reading.Reading`: `columns` says where prompt, answers and scores are in data of no known
            form; `score` which of several scores is meant, or their weights; `group_by` which rows are one list;
            `as_messages` whether prompts are turns or text; `bad_rows="drop"` leaves out rows that make no list; `form`.

    Rows and answers that are left out are counted by reason, and the counts logged as a warning.

    Raises:
        ValueError: columns of no known form; a bad row, naming it (from 0), the field, what it holds and what is expected.

    >>> rows = as_lists([{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5", "level": "easy"}])
    >>> rows[0]
    {'prompt': '2 + 2 =', 'completions': [' 4', ' 5'], 'scores': [1.0, 0.0], 'level': 'easy'}
    >>> posts = [{"question": "2 + 2", "answers": [{"text": "4", "votes": 7}, {"text": "5", "votes": -1}]}]
    >>> as_lists(posts, columns={"prompt": "question", "completions": "answers[].text", "scores": "answers[].votes"})[0]
    {'prompt': '2 + 2', 'completions': ['4', '5'], 'scores': [7.0, -1.0]}
    """
    return _said(_convert(dataset, Reading(**how), scored))


def read_lists(source: Any, reading: Reading, *, split: str = "train", scored: bool = True) -> Read:
    """What `load_lists` loads, with the form of the data and what was left out."""
    if not isinstance(source, str | Path):
        return _convert(_pick_split(source, split, "source"), reading, scored)
    import datasets

    path = Path(source).expanduser()
    if path.suffix in FILES and not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
        if path.suffix == ".parquet":
            return _convert_dataset(read_parquet(path), str(path), reading, scored)
        return _convert_rows(*read_json(path), str(path), reading, scored)
    if path.is_file():
        raise ValueError(f"{path}: expected a file that ends in {', '.join(FILES)}")
    if not path.is_dir():
        return _convert_dataset(datasets.load_dataset(str(source), split=split), str(source), reading, scored)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _convert_dataset(_pick_split(_load_from_disk(path), split, str(path)), str(path), reading, scored)
    raise ValueError(f"{path}: expected a folder written by Dataset.save_to_disk; it has no state.json or dataset_dict.json")


def _convert(dataset: Any, reading: Reading, scored: bool) -> Read:
    import datasets

    if isinstance(dataset, datasets.Dataset):
        return _convert_dataset(dataset, "dataset", reading, scored)
    if isinstance(dataset, Sequence) and not isinstance(dataset, str):
        return _convert_rows([_plain(row) for row in dataset], lambda i: f"row {i}", "the list of rows", reading, scored)
    raise TypeError(f"dataset must be a datasets.Dataset or a list of dicts, got {type(dataset).__name__}{_advice(dataset)}")


def _said(read: Read) -> Dataset:
    """The lists, with a warning of what was left out."""
    if read.left_out:
        logger.warning("%s", read.left_out)
    return read.lists


def from_candidate_lists(lists: Iterable[CandidateList]) -> Dataset:
    """Rows from `larpo.offline.CandidateList` objects.

    >>> from larpo.offline import CandidateList
    >>> from_candidate_lists([CandidateList("Cows eat", (" grass", " lions"), (1.0, 0.0))])[0]
    {'prompt': 'Cows eat', 'completions': [' grass', ' lions'], 'scores': [1.0, 0.0]}
    """
    return as_lists([{"prompt": one.prompt, "completions": list(one.completions), "scores": list(one.scores)} for one in lists])


# --- reading -----------------------------------------------------------------------------------------------


def read_json(path: Path) -> tuple[list[Any], Callable[[int], str]]:
    """The objects in a file of JSON lines or of one array, and the place of the i-th one."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 text ({error.reason})") from None
    if path.suffix == ".json" and text.lstrip().startswith("["):
        try:
            return json.loads(text), lambda i: f"{path}, row {i}"
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}: invalid JSON: {error.msg} (column {error.colno})") from None
    rows, lines = [], []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: strings may hold U+2028
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: invalid JSON: {error.msg} (column {error.colno})") from None
        lines.append(number)
    return rows, lambda i: f"{path}, line {lines[i]}"


def read_parquet(path: Path) -> Dataset:
    """The rows of a parquet file; ValueError where it is none."""
    import datasets
    import pyarrow.parquet

    try:
        pyarrow.parquet.read_schema(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a parquet file, or cut: {error}") from None
    try:
        return datasets.Dataset.from_parquet(str(path))
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"{path}: damaged: {error.__cause__ or error}") from None


def _advice(dataset: Any) -> str:
    """What to do with a container of rows that is not taken."""
    import datasets

    if isinstance(dataset, datasets.DatasetDict | datasets.IterableDatasetDict):
        return f" with the splits {', '.join(dataset)}: choose one, as in dataset[{next(iter(dataset), 'train')!r}]"
    if isinstance(dataset, Mapping):
        return "; columns become rows with datasets.Dataset.from_dict"
    if hasattr(dataset, "iterrows"):
        return "; a DataFrame becomes a list of rows with to_dict('records')"
    if isinstance(dataset, Iterable) and not isinstance(dataset, str):
        return "; rows that come one after the other become a list with list(...)"
    return ""


def _load_from_disk(path: Path) -> Any:
    import datasets
    import pyarrow

    try:
        return datasets.load_from_disk(path)
    except (pyarrow.ArrowInvalid, ValueError) as error:  # JSONDecodeError is a ValueError
        raise ValueError(f"{path}: cut or damaged: {error}") from None


def _pick_split(source: Any, split: str, name: str) -> Any:
    import datasets

    if not isinstance(source, datasets.DatasetDict):
        return source
    if split not in source:
        raise ValueError(f"{name} has the splits {sorted(source)}, not {split!r}")
    return source[split]


# --- converting --------------------------------------------------------------------------------------------


def _convert_rows(rows: Sequence[Any], place: Callable[[int], str], name: str, reading: Reading, scored: bool) -> Read:
    """Rows of Python objects, each checked at its place, before Arrow sees them."""
    import datasets
    import pyarrow

    if not rows:
        raise ValueError(f"{name}: holds no rows")
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"{place(i)}: holds {type(row).__name__}; expected an object with named fields")
    columns = dict.fromkeys(column for row in rows for column in row)
    reader = _reader(columns, name, reading, scored, rows[0])
    read = [(i, one) for i, row in enumerate(rows) if (one := reader.try_read(row, place(i))) is not None]
    if reader.group_by is not None:
        read = _merged_rows(read, rows, place, reader)
    _refuse_none(read, name, reader)
    lists, places = [json_text.write_row(one) for _, one in read], [place(i) for i, _ in read]
    _check_same_kind(lists, places)
    columns = dict.fromkeys(column for row in lists for column in row)
    table = {column: [row.get(column) for row in lists] for column in columns}
    for column, values in table.items():
        try:
            pyarrow.array(values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
            raise ValueError(f"{name}: field {column!r} holds values of different types: {error}") from None
    return Read(datasets.Dataset.from_dict(table), reader)


def _merged_rows(read: Sequence[tuple[int, Row]], rows: Sequence[Row], place: Callable[[int], str], reader: Reader) -> list:
    """The lists of rows that are equal in the column to group by, in the order of their first rows."""
    groups: dict[str, list[tuple[int, Row]]] = {}
    for i, one in read:
        groups.setdefault(key_of(rows[i], reader.group_by, place(i)), []).append((i, one))
    merging = {group[0][0]: [one for _, one in group] for group in groups.values()}
    found = ((i, reader.try_merge(group, place(i))) for i, group in merging.items())
    return [(i, one) for i, one in found if one is not None]


def _convert_dataset(dataset: Dataset, name: str, reading: Reading, scored: bool) -> Read:
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(f"{name} must be a datasets.Dataset with all its rows, got {type(dataset).__name__}")
    if not len(dataset):
        raise ValueError(f"{name}: holds no rows")
    reader = _reader(dataset.column_names, name, reading, scored, dataset.with_format(None)[0])
    dataset = json_text.write_dataset(dataset.with_format(None), name)
    one_source = getattr(dataset.features.get("source"), "dtype", None) in ("string", "large_string")
    if reader.changes_nothing and not one_source:
        for i, row in enumerate(dataset):
            reader.read(row, f"{name}, row {i}")
        return Read(dataset, reader)
    if reader.group_by is not None:
        return _merged_dataset(dataset, name, reader)
    optional = reader.form.prompt in reader.form.also and reader.form.prompt in dataset.column_names
    every = (
        {IMPLICIT: False} if optional and None in dataset[reader.form.prompt][:] else {}
    )  # Arrow wants each column in each row

    def convert(batch: Mapping[str, list], places: list[int]) -> dict[str, list]:
        rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
        read = (reader.try_read(row, f"{name}, row {i}") for row, i in zip(rows, places, strict=True))
        return _columns([every | row for row in read if row is not None])

    lists = dataset.map(
        convert,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        load_from_cache_file=False,  # the counts are of rows that were read
        new_fingerprint=datasets.fingerprint.generate_random_fingerprint(),
        desc="candidate lists",
    )
    _refuse_none(lists, name, reader)
    return Read(lists, reader)


def _merged_dataset(dataset: Dataset, name: str, reader: Reader) -> Read:
    import datasets

    groups: dict[str, list[int]] = {}
    for i, row in enumerate(dataset.select_columns(reader.group_by)):
        groups.setdefault(key_of(row, reader.group_by, f"{name}, row {i}"), []).append(i)

    def merge(group: Mapping[str, list[list[int]]]) -> dict[str, list]:
        (places,) = group["rows"]
        read = [(i, reader.try_read(dataset[i], f"{name}, row {i}")) for i in places]
        read = [(i, row) for i, row in read if row is not None]
        one = reader.try_merge([row for _, row in read], f"{name}, row {read[0][0]}") if read else None
        return _columns([] if one is None else [one])

    lists = datasets.Dataset.from_dict({"rows": list(groups.values())}).map(
        merge,
        batched=True,
        batch_size=1,
        remove_columns=["rows"],
        load_from_cache_file=False,
        new_fingerprint=datasets.fingerprint.generate_random_fingerprint(),
        desc="candidate lists",
    )
    _refuse_none(lists, name, reader)
    return Read(lists, reader)


def _columns(rows: Sequence[Row]) -> dict[str, list]:
    return {column: [row.get(column) for row in rows] for column in dict.fromkeys(name for row in rows for name in row)}


def _refuse_none(lists: Sequence[Any], name: str, reader: Reader) -> None:
    if not len(lists):
        raise ValueError(f"{name}: no row makes a list: {reader.left_out}")


def _plain(value: Any) -> Any:
    """Without numpy arrays and numbers, tensors and pandas series: with lists and numbers of Python in their place."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _reader(columns: Iterable[str], name: str, reading: Reading, scored: bool, row: Row) -> Reader:
    try:
        columns = list(columns)
        return Reader(recognise(columns, reading, scored=scored, row=row), columns, reading)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _check_same_kind(rows: Sequence[Row], places: Sequence[str]) -> None:
    """A column has one type: strings in every row, or messages in every row."""
    for field, of in (("prompt", lambda row: row["prompt"]), ("completions", lambda row: row["completions"][0])):
        first = isinstance(of(rows[0]), str)
        for row, place in zip(rows, places, strict=True):
            if isinstance(of(row), str) != first:
                kinds = ("a string", "messages") if first else ("messages", "a string")
                raise ValueError(f"{place}: field {field!r} holds {kinds[1]}; expected {kinds[0]}, as in {places[0]}")

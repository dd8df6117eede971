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
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import json_text
from .schemas import IMPLICIT, KNOWN, Schema, recognise
from .validation import check_row

if TYPE_CHECKING:
    from datasets import Dataset

    from ..offline import CandidateList

__all__ = ["as_lists", "check_row", "from_candidate_lists", "load_lists"]

FILES = (".jsonl", ".json", ".parquet")


def load_lists(source: Any, *, split: str = "train", scored: bool = True) -> Dataset:
    """Reads candidate lists, in any form that `as_lists` knows, and checks every row.

    Args:
        source: a .jsonl, .json (an array of objects, or lines) or .parquet file; a folder written by `save_to_disk`;
            the name of a dataset on the hub; a Dataset, a DatasetDict or a list of dicts.
        split: of a DatasetDict, saved or not, or of a dataset on the hub. A file, a Dataset and a list have no splits.
        scored: False takes {prompt, completions} too, and leaves them without scores.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file, its line (from 1) or row (from 0, as `dataset[0]`), the field, what it holds and what is
            expected; columns of no known form; a split that is not there.
    """
    if not isinstance(source, str | Path):
        return as_lists(_pick_split(source, split, "source"), scored=scored)
    import datasets

    path = Path(source).expanduser()
    if path.suffix in FILES and not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
        if path.suffix == ".parquet":
            return _convert_dataset(read_parquet(path), str(path), scored)
        return _convert_rows(*read_json(path), str(path), scored)
    if path.is_file():
        raise ValueError(f"{path}: expected a file that ends in {', '.join(FILES)}")
    if not path.is_dir():
        return _convert_dataset(datasets.load_dataset(str(source), split=split), str(source), scored)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _convert_dataset(_pick_split(_load_from_disk(path), split, str(path)), str(path), scored)
    raise ValueError(f"{path}: expected a folder written by Dataset.save_to_disk; it has no state.json or dataset_dict.json")


def as_lists(dataset: Dataset | Sequence[Mapping[str, Any]], *, scored: bool = True) -> Dataset:
    """Candidate lists in the form of this module, from a Dataset or a list of dicts; every row is checked.

    The form is told by the columns (see `larpo.data.schemas`): {prompt, completions, scores} as they are;
    {prompt, responses, rewards}; {prompt, all_generated_responses, all_rm_scores}; pairs {chosen, rejected} with the
    prompt given or found as what both share at their start, and with scores 1 and 0 where no score columns are.
    Completions of messages that repeat the prompt's messages lose them. Other columns are kept. scored=False takes
    {prompt, completions} without scores too, and leaves them so.

    Raises:
        ValueError: columns of no known form; a bad row, naming it (from 0), the field, what it holds and what is expected.

    >>> rows = as_lists([{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5", "level": "easy"}])
    >>> rows[0]
    {'prompt': '2 + 2 =', 'completions': [' 4', ' 5'], 'scores': [1.0, 0.0], 'level': 'easy'}
    """
    import datasets

    if isinstance(dataset, datasets.Dataset):
        return _convert_dataset(dataset, "dataset", scored)
    if isinstance(dataset, Sequence) and not isinstance(dataset, str):
        return _convert_rows([_plain(row) for row in dataset], lambda i: f"row {i}", "the list of rows", scored)
    raise TypeError(f"dataset must be a datasets.Dataset or a list of dicts, got {type(dataset).__name__}{_advice(dataset)}")


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


def _convert_rows(rows: Sequence[Any], place: Callable[[int], str], name: str, scored: bool = True) -> Dataset:
    """Rows of Python objects, each checked at its place, before Arrow sees them."""
    import datasets
    import pyarrow

    if not rows:
        raise ValueError(f"{name}: holds no rows")
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"{place(i)}: holds {type(row).__name__}; expected an object with named fields")
    columns = dict.fromkeys(column for row in rows for column in row)
    if not scored and _has_no_scores(columns):
        return _convert_rows([_with_zeros(row) for row in rows], place, name).remove_columns("scores")
    schema = _recognise(columns, name)
    lists = [json_text.write_row(_list_of(schema, row, place(i))) for i, row in enumerate(rows)]
    _check_same_kind(lists, place)
    columns = dict.fromkeys(column for row in lists for column in row)
    table = {column: [row.get(column) for row in lists] for column in columns}
    for column, values in table.items():
        try:
            pyarrow.array(values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
            raise ValueError(f"{name}: field {column!r} holds values of different types: {error}") from None
    return datasets.Dataset.from_dict(table)


def _convert_dataset(dataset: Dataset, name: str, scored: bool = True) -> Dataset:
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(f"{name} must be a datasets.Dataset with all its rows, got {type(dataset).__name__}")
    if not len(dataset):
        raise ValueError(f"{name}: holds no rows")
    if not scored and _has_no_scores(dataset.column_names):
        zeros = [_with_zeros(row)["scores"] for row in dataset.select_columns("completions")]
        with_scores = dataset.add_column("scores", zeros)
        return _convert_dataset(with_scores, name).remove_columns("scores")
    schema = _recognise(dataset.column_names, name)
    dataset = json_text.write_dataset(dataset.with_format(None), name)
    one_source = getattr(dataset.features.get("source"), "dtype", None) in ("string", "large_string")
    if schema.native and not one_source:
        for i, row in enumerate(dataset):
            check_row(row, f"{name}, row {i}")
        return dataset
    prompts = dataset["prompt"][:] if schema.candidates is None and "prompt" in dataset.column_names else []
    every = {IMPLICIT: False} if None in prompts else {}  # Arrow wants every row to have every column
    return dataset.map(
        lambda row, i: every | _list_of(schema, row, f"{name}, row {i}"),
        with_indices=True,
        remove_columns=dataset.column_names,
        desc="candidate lists",
    )


def _plain(value: Any) -> Any:
    """Without numpy arrays and numbers, tensors and pandas series: with lists and numbers of Python in their place."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _has_no_scores(columns: Iterable[str]) -> bool:
    """Whether these are lists of the form of this module, but for the scores."""
    return {"prompt", "completions"} <= set(columns) and "scores" not in columns


def _with_zeros(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with scores in place of those that are missing; bad completions have none, and are refused for themselves."""
    if "completions" not in row:
        return row
    completions = row["completions"]
    return {**row, "scores": [0.0] * len(completions) if isinstance(completions, list | tuple) else []}


def _recognise(columns: Iterable[str], name: str) -> Schema:
    try:
        return recognise(columns)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _list_of(schema: Schema, row: Mapping[str, Any], where: str) -> dict[str, Any]:
    converted = schema.convert(row, where)
    check_row(converted, where)
    for field in ("scores", "ref_logps"):
        if converted.get(field) is not None:
            converted[field] = [float(value) for value in converted[field]]
    return {column: converted[column] for column in sorted(converted, key=_column_order)}


def _column_order(column: str) -> int:
    return KNOWN.index(column) if column in KNOWN else len(KNOWN)


def _check_same_kind(rows: Sequence[Mapping[str, Any]], place: Callable[[int], str]) -> None:
    """A column has one type: strings in every row, or messages in every row."""
    for field, of in (("prompt", lambda row: row["prompt"]), ("completions", lambda row: row["completions"][0])):
        first = isinstance(of(rows[0]), str)
        for i, row in enumerate(rows):
            if isinstance(of(row), str) != first:
                kinds = ("a string", "messages") if first else ("messages", "a string")
                raise ValueError(f"{place(i)}: field {field!r} holds {kinds[1]}; expected {kinds[0]}, as in {place(0)}")

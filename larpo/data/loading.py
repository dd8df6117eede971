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

from .converting import Read, convert_dataset, convert_rows
from .reading import Reading
from .validation import check_row

if TYPE_CHECKING:
    from datasets import Dataset

    from ..offline import CandidateList

__all__ = ["Reading", "as_lists", "check_row", "from_candidate_lists", "load_lists", "read_lists"]

FILES = (".jsonl", ".json", ".parquet")


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
    return read_lists(source, Reading(**how), split=split, scored=scored).said()


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
    return _convert(dataset, Reading(**how), scored).said()


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
            return convert_dataset(read_parquet(path), str(path), reading, scored)
        return convert_rows(*read_json(path), str(path), reading, scored)
    if path.is_file():
        raise ValueError(f"{path}: expected a file that ends in {', '.join(FILES)}")
    if not path.is_dir():
        return convert_dataset(datasets.load_dataset(str(source), split=split), str(source), reading, scored)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return convert_dataset(_pick_split(_load_from_disk(path), split, str(path)), str(path), reading, scored)
    raise ValueError(f"{path}: expected a folder written by Dataset.save_to_disk; it has no state.json or dataset_dict.json")


def _convert(dataset: Any, reading: Reading, scored: bool) -> Read:
    import datasets

    if isinstance(dataset, datasets.Dataset):
        return convert_dataset(dataset, "dataset", reading, scored)
    if isinstance(dataset, Sequence) and not isinstance(dataset, str):
        return convert_rows([_plain(row) for row in dataset], lambda i: f"row {i}", "the list of rows", reading, scored)
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


def _plain(value: Any) -> Any:
    """Without numpy arrays and numbers, tensors and pandas series: with lists and numbers of Python in their place."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value

"""Lists of one source: a file, a folder of files, a saved dataset, a name on the hub, or rows that are in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import files
from .converting import Read, convert_dataset, convert_rows
from .reading import Reading
from .streaming import stream_files, stream_rows

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


def read_lists(
    source: Any,
    reading: Reading,
    *,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    scored: bool = True,
) -> Read:
    """What `load_lists` loads, with the form of the data and what was left out."""
    data, name = _opened(source, split, config, revision)
    if not isinstance(source, str | Path):
        return read_rows(data, reading, scored=scored)
    if not isinstance(data, list):
        return convert_dataset(data, name, reading, scored)
    rows, places = map(_joined, zip(*map(files.read, data), strict=True))
    return convert_rows(rows, places.__getitem__, name, reading, scored)


def stream_lists(
    source: Any, reading: Reading, *, split: str, config: str | None, revision: str | None, scored: bool = True
) -> IterableDataset:
    """What `load_lists` streams."""
    data, name = _opened(source, split, config, revision, streaming=True)
    if isinstance(source, str | Path) and isinstance(data, list):
        return stream_files(data, reading, scored)
    return stream_rows(_as_stream(data), name, reading, scored)


def _opened(source: Any, split: str, config: str | None, revision: str | None, streaming: bool = False) -> tuple[Any, str]:
    """What a source is, and its name in messages: a list of files of text, a data set, or what was handed over."""
    import datasets

    if not isinstance(source, str | Path):
        return _pick_split(source, split, "source"), "source"
    path = Path(source).expanduser()
    if paths := _files(path, config, revision):
        return read_parquet(paths, streaming) if files.kind(paths[0]) == ".parquet" else paths, str(path)
    if path.is_dir():
        return _pick_split(_load_from_disk(path), split, str(path)), str(path)
    found = datasets.load_dataset(str(source), config, split=split, revision=revision, streaming=streaming)
    return found, str(source)


def _files(path: Path, config: str | None, revision: str | None) -> list[Path]:
    """The files that a source is, all of one kind; none where it is a saved dataset or a name on the hub."""
    known = files.kind(path) in files.FILES and (path.suffix in files.FILES or files.kind(path) in files.TEXT)
    paths = [path]
    if path.is_dir():
        paths = [] if (path / "dataset_dict.json").exists() or (path / "state.json").exists() else _in_folder(path)
    elif known and not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    elif path.is_file() and not known:
        raise ValueError(f"{path}: expected a file that ends in {', '.join(files.FILES)}, or in .gz or .zst behind that")
    elif not path.is_file():
        return []
    for name, value in (("config", config), ("revision", revision)):
        if value is not None:
            raise ValueError(f"{name}={value!r} is for a dataset on the hub, and {path} is here")
    return paths


def _in_folder(folder: Path) -> list[Path]:
    """The files of data in a folder, in the order of their names."""
    found = sorted(path for path in folder.iterdir() if files.kind(path) in files.FILES and not path.name.startswith("."))
    kinds = {files.kind(path) for path in found}
    if len(kinds) != 1:
        raise ValueError(
            f"{folder}: expected a folder written by Dataset.save_to_disk (it has no state.json or dataset_dict.json), or "
            f"files of one kind; found {', '.join(sorted(kinds)) or 'none'}"
        )
    return found


def _as_stream(dataset: Any) -> IterableDataset:
    import datasets

    if isinstance(dataset, datasets.Dataset):
        return dataset.to_iterable_dataset()
    if isinstance(dataset, datasets.IterableDataset):
        return dataset
    raise TypeError(f"source of a stream must be an IterableDataset, a file or a name, got {type(dataset).__name__}")


def _joined(parts: Iterable[list]) -> list:
    return [item for part in parts for item in part]


def read_rows(dataset: Any, reading: Reading, *, scored: bool = True) -> Read:
    """What `as_lists` converts, with the form of the data and what was left out."""
    import datasets

    if isinstance(dataset, datasets.Dataset):
        return convert_dataset(dataset, "dataset", reading, scored)
    if isinstance(dataset, Sequence) and not isinstance(dataset, str):
        return convert_rows([_plain(row) for row in dataset], lambda i: f"row {i}", "the list of rows", reading, scored)
    raise TypeError(f"dataset must be a datasets.Dataset or a list of dicts, got {type(dataset).__name__}{_advice(dataset)}")


def read_parquet(paths: Sequence[Path], streaming: bool = False) -> Dataset | IterableDataset:
    """The rows of parquet files; ValueError where one is none."""
    import datasets
    import pyarrow.parquet

    for path in paths:
        try:
            pyarrow.parquet.read_schema(path)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path}: not a parquet file, or cut: {error}") from None
    names = list(map(str, paths))
    try:
        return datasets.Dataset.from_parquet(names, streaming=streaming)
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"{', '.join(names)}: damaged: {error.__cause__ or error}") from None


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

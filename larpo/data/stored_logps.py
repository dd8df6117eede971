"""Reference log-likelihoods from files that `larpo score` wrote, found by the tokens of each candidate.

Rows may stand in another order than in the data, and there may be more of them. What decides is `token_hashes`: a candidate of
other tokens, behind another prompt or with others of them counted, is not found.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .scored_tokens import SCORED_WITH, TOKEN_HASHES, changes_since, reference, token_hashes

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".parquet", ".jsonl")
ROWS = 1000  # of a parquet file at a time


@dataclass(frozen=True)
class StoredLogps:
    """The log-likelihoods in a file or in the files of a folder; `read_logps` reads them."""

    path: Path
    record: str  # what the first of them was scored with
    hashes: np.ndarray = field(repr=False)  # [S] uint64, ascending
    logps: np.ndarray = field(repr=False)  # [S] float64, nats

    def of(self, row: Mapping[str, Any]) -> np.ndarray:
        """Those of the candidates of a tokenised row, NaN for one that has none."""
        wanted = _numbers(token_hashes(row))
        at = np.minimum(np.searchsorted(self.hashes, wanted), len(self.hashes) - 1)
        return np.where(self.hashes[at] == wanted, self.logps[at], np.nan)

    def added_to(self, tokenised: Dataset, name: str, tokenizer: PreTrainedTokenizerBase, limits: Mapping[str, Any]) -> Dataset:
        """The tokenised data with ref_logps. Raises ValueError where a candidate has none, naming the first and how many lists
        have such."""
        found = [self.of(row) for row in tokenised]
        lacking = [i for i, logps in enumerate(found) if np.isnan(logps).any()]
        if lacking:
            i = lacking[0]
            also = "" if len(lacking) == 1 else f" ({len(lacking):,} of {len(found):,} lists have such candidates)"
            raise self.missing(f"row {i} of the {name} data", found[i], tokenizer, limits, also)
        if SCORED_WITH in tokenised.column_names:  # of logps that are not trained with
            tokenised = tokenised.remove_columns(SCORED_WITH)
        columns = {"ref_logps": [logps.tolist() for logps in found], SCORED_WITH: [self.record] * len(found)}
        for column, values in columns.items():
            tokenised = tokenised.add_column(column, values)
        return tokenised

    def missing(
        self, where: str, found: np.ndarray, tokenizer: PreTrainedTokenizerBase, limits: Mapping[str, Any], also: str = ""
    ) -> ValueError:
        """The error for a row some of whose log-likelihoods, `found`, are NaN: its tokens are in no file."""
        first, changes = int(np.isnan(found).argmax()), changes_since(self.record, tokenizer, limits)
        return ValueError(
            f"{where}: ref_logps={str(self.path)!r} has no log-likelihood of completions[{first}] with the tokens that it and "
            f"its prompt have now{also}{changes}: score this data with `larpo score`, with the tokenizer, chat template and "
            "limits that it is trained with"
        )


def read_logps(path: str) -> StoredLogps:
    """The log-likelihoods that `larpo score` wrote to a file, or to the files of a folder: ref_logps, or logps of files that
    have no others.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a file that is damaged or not of `larpo score`; files of different references.
    """
    place = Path(path).expanduser()
    files = _files(place)
    return _read(place, tuple((file, file.stat().st_mtime_ns, file.stat().st_size) for file in files))


@functools.lru_cache(maxsize=1)  # train and eval data ask for the same
def _read(place: Path, state: tuple[tuple[Path, int, int], ...]) -> StoredLogps:
    """state: path, time and size of each file, so that a file that has changed is read again."""
    hashes, logps, records = [], [], {}
    for file, *_ in state:
        for row, where in _rows(file):
            found = row.get("ref_logps") or row.get("logps")
            if not (found and row.get(TOKEN_HASHES) and _is_record(row.get(SCORED_WITH))):
                raise ValueError(
                    f"ref_logps: {where} was not written by `larpo score`: it must have token_hashes, scored_with, and "
                    "ref_logps or logps"
                )
            try:
                hashes.append(_numbers(row[TOKEN_HASHES]))
                logps.append(np.asarray(found, dtype=np.float64))
            except (TypeError, ValueError):
                raise ValueError(f"ref_logps: {where} has token_hashes or log-likelihoods of another kind") from None
            if hashes[-1].shape != logps[-1].shape or not np.isfinite(logps[-1]).all():
                raise ValueError(f"ref_logps: {where} must have one finite number for each of its token_hashes, got {found}")
            records.setdefault(row[SCORED_WITH], where)
    if not hashes:
        raise ValueError(f"ref_logps: {str(place)!r} holds no lists")
    _refuse_different(records)
    joined, first = np.unique(np.concatenate(hashes), return_index=True)
    return StoredLogps(place, next(iter(records)), joined, np.concatenate(logps)[first])


def reference_of(path: str) -> str:
    """The model that the log-likelihoods are of, in a few words; a run that trains with others is another run."""
    return _named(read_logps(path).record)


def _is_record(text: Any) -> bool:
    return isinstance(text, str) and _names_model(text)


@functools.cache  # all rows of a file have one
def _names_model(record: str) -> bool:
    try:
        return "model" in json.loads(record)
    except (TypeError, ValueError):
        return False


def _refuse_different(records: Mapping[str, str]) -> None:
    """Raises ValueError for files that were scored under different models."""
    (first, where), *others = records.items()
    for record, other in others:
        if _same(first) != _same(record):
            raise ValueError(
                f"ref_logps must be of one reference: {where} is of {_named(first)}, {other} of {_named(record)}; give files "
                "of one of them"
            )


def _same(record: str) -> tuple[Any, ...]:
    """What two records of one reference agree in: its weights, or its name where these were not to be read; and the dtype."""
    name, weights = reference(record)
    return weights or name, json.loads(record).get("dtype")


def _named(record: str) -> str:
    name, weights = reference(record)
    return f"{name} ({weights}, {json.loads(record).get('dtype')})"


def _files(path: Path) -> list[Path]:
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if unfinished := sorted(path.glob("*.parts")):
            raise ValueError(f"ref_logps: {str(unfinished[0])!r} is unfinished: start its `larpo score` again")
    else:
        raise FileNotFoundError(f"ref_logps: no such file or folder: {path}")
    if not files or files[0].suffix not in SUFFIXES:
        raise ValueError(
            f"ref_logps must be a .parquet or .jsonl file of `larpo score`, or a folder of such, got {str(path)!r}"
        )
    return files


def _rows(file: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The columns that are read, of each row, and its place."""
    if file.suffix == ".jsonl":
        from . import files

        for row, where in files.rows(file, streaming=True):
            yield row if isinstance(row, Mapping) else {}, where
        return
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
        columns = [name for name in ("ref_logps", "logps", TOKEN_HASHES, SCORED_WITH) if name in table.schema_arrow.names]
        number = 0
        for batch in table.iter_batches(ROWS, columns=columns):
            for row in batch.to_pylist():
                yield row, f"{file}, row {number}"
                number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"ref_logps: {file} can't be read, it is cut or damaged: {error}") from None


def _numbers(hashes: Sequence[str]) -> np.ndarray:
    return np.array([int(one, 16) for one in hashes], dtype=np.uint64)

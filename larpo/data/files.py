"""Rows of files of text, one at a time with its place: JSON lines, an array of JSON, CSV; plain, in gzip or in zstandard."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

TEXT = (".jsonl", ".json", ".csv")
COMPRESSED = (".gz", ".zst")
FILES = (*TEXT, ".parquet")
# Columns that are JSON in a cell of a .csv file.
LISTS = ("completions", "scores", "ref_logps", "prompt_ids", "completion_ids", "completion_mask")


def kind(path: Path) -> str:
    """The suffix that says what a file holds; of a.jsonl.gz it is .jsonl.

    >>> kind(Path("a.jsonl.gz")), kind(Path("folder.of/lists"))
    ('.jsonl', '')
    """
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def rows(path: Path, *, streaming: bool = False) -> Iterator[tuple[Any, str]]:
    """The objects in a file of text and where each stands. Raises ValueError with the line where the text is none of its kind.

    streaming: refuse what has to be read whole, an array of JSON.
    """
    with _opened(path) as file:
        if kind(path) == ".csv":
            yield from _csv_rows(file, path)
        elif kind(path) == ".json" and _is_array(file):
            if streaming:
                raise ValueError(f"{path}: an array of JSON can't be streamed; write a line for each object (.jsonl)")
            yield from _array(file, path)
        else:
            yield from _json_lines(file, path)


def read(path: Path) -> tuple[list[Any], list[str]]:
    """All of `rows`: the objects, and the places."""
    found = list(rows(path))
    return [row for row, _ in found], [place for _, place in found]


def _opened(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.open(path))
    if path.suffix != ".zst":
        return path.open("rb")
    try:
        import zstandard
    except ImportError:
        raise ImportError(f"{path}: .zst files need the package zstandard (pip install zstandard)") from None
    return io.BufferedReader(zstandard.open(path, "rb"))


def _is_array(file: BinaryIO) -> bool:
    return file.peek(1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, str]]:
    """The lines, numbered from 1. Only a line feed ends one: strings may hold U+2028."""
    number = 0
    try:
        for number, line in enumerate(file, start=1):
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {number}: not UTF-8 text ({error.reason})") from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path}: behind line {number}: cut or damaged: {error}") from None


def _json_lines(file: BinaryIO, path: Path) -> Iterator[tuple[Any, str]]:
    for number, line in _lines(file, path):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            yield json.loads(line), place
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: invalid JSON: {error.msg} (column {error.colno})") from None


def _array(file: BinaryIO, path: Path) -> Iterator[tuple[Any, str]]:
    try:
        objects = json.loads("".join(line for _, line in _lines(file, path)))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: invalid JSON: {error.msg} (column {error.colno})") from None
    for i, one in enumerate(objects):
        yield one, f"{path}, row {i}"


def _csv_rows(file: BinaryIO, path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Cells are text: "None" and "NA" are answers like others. Lists of the form that larpo itself has are JSON in a cell."""
    csv.field_size_limit(2**31 - 1)  # an answer may be longer than 128 KiB
    reader = csv.DictReader((line for _, line in _lines(file, path)), strict=True)
    try:
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise ValueError(f"{place}: has not one cell for each of the {len(reader.fieldnames)} columns")
            yield {name: _cell(name, text, place) for name, text in row.items()}, place
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: invalid CSV: {error}") from None


def _cell(name: str, text: str, place: str) -> Any:
    if name == "weight":
        try:
            return float(text)
        except ValueError:
            return text
    if name not in LISTS:
        return text
    try:
        return json.loads(text) if text else None
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: {name}: invalid JSON: {error.msg} (character {error.pos + 1})") from None

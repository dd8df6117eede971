"""Files that appear whole, by one rename: JSON, text, and parquet files of rows."""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..data import json_text
from ..data.validation import present
from .intact import Damaged
from .ranks import ALONE, Ranks, shown

logger = logging.getLogger(__name__)

Rows = list[dict[str, Any]]


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write(unfinished_path)` and renames what it wrote (a file or a folder) to `path`, replacing what was there.

    The disk has all of it before it has the name: after a power cut the name may not be there, but never names less.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    remove(unfinished)
    write(unfinished)
    if unfinished.is_dir():
        for inner in sorted(unfinished.rglob("*"), reverse=True):
            _to_disk(inner)
        remove(path)
    _to_disk(unfinished)
    os.replace(unfinished, path)
    _to_disk(path.parent)


def _to_disk(path: Path) -> None:
    """Waits until the disk has a file's bytes, or a folder's names; systems without the latter do what they can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def whole_path(name: str | Path) -> str:
    """A folder as an absolute path, so that it stays right when a reward or a callback changes the working directory; the name
    of a model on a hub unchanged."""
    path = Path(name).expanduser()
    return os.path.abspath(path) if path.is_dir() else os.path.expanduser(name)


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises Damaged for a file that holds something else, or the beginning of it only."""
    text = read_text(path)
    try:
        return json.loads(text)
    except ValueError as error:
        raise Damaged(path, f"it is cut or damaged ({error})" if text.strip() else "it is empty") from None


def read_text(path: Path) -> str:
    """UTF-8, with or without a byte order mark, every newline as it is. Raises Damaged, with the line, for other bytes."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise Damaged(path, f"line {line} is not UTF-8 text ({error.reason})") from None


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A parquet file; a row is a dict of plain values, lists and messages, whose tool calls become text."""
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist([json_text.write_messages(row) for row in rows])
    write_whole(path, lambda unfinished: parquet.write_table(table, unfinished, write_page_checksum=True))


def read_rows(path: Path) -> Rows:
    """Raises Damaged for a file that is no parquet, or was not written to its end."""
    import pyarrow
    from pyarrow import parquet

    try:
        # Not read_table on a path: it takes a folder's name for a partition.
        return parquet.ParquetFile(path, page_checksum_verification=True).read().to_pylist()
    except FileNotFoundError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        why = f"it is cut or damaged ({error})" if path.stat().st_size else "it is empty"
        raise Damaged(path, why) from None


def plain(text: Any) -> str | list[dict[str, Any]]:
    """A text, or messages without the keys that Arrow filled in, their tool calls as objects."""
    return text if isinstance(text, str) else [json_text.read_message(present(message)) for message in text]


def rows_once(path: Path, build: Callable[[], Rows], ranks: Ranks = ALONE) -> Rows:
    """The rows of a parquet file, which is written from `build()` if it is not there: all processes build, the first writes."""
    if not ranks.first(path.exists):
        rows = build()
        ranks.first(lambda: write_rows(path, rows))
    return ranks.first(lambda: read_rows(path))


def in_chunks(
    folder: Path,
    items: Sequence,
    size: int,
    work: Callable[[int, Sequence], Rows],
    ranks: Ranks = ALONE,
    *,
    description: str,
    unit: str = "prompt",
    bar: bool = False,
) -> Rows:
    """The rows of `work(chunk, items of the chunk)` for all chunks. Each chunk is kept in a file, and not computed again.

    Chunks are dealt out to the processes, one to each at a time. Which items a chunk has, and so its result, does not depend on
    the number of processes. The caller removes `folder` once what it makes of the rows is written.

    description, unit: what is done, and with what: for the log, and for a bar.
    """
    from tqdm.auto import tqdm

    chunks = [items[start : start + size] for start in range(0, len(items), size)]
    paths = [folder / f"{chunk:05d}.parquet" for chunk in range(len(chunks))]
    missing = ranks.first(lambda: [chunk for chunk, path in enumerate(paths) if not path.exists()])
    before = len(items) - sum(len(chunks[chunk]) for chunk in missing)

    def one_each(turn: list[int]) -> None:
        for chunk in ranks.mine(turn):
            write_rows(paths[chunk], work(chunk, chunks[chunk]))

    if before and ranks.is_first:
        logger.info("%s: %d of %d %ss were there before, in %s", description, before, len(items), unit, folder)
    hidden = not (bar and missing)
    with tqdm(total=len(items), initial=before, desc=description, unit=unit, leave=False, disable=hidden) as shown_bar:
        for start in range(0, len(missing), ranks.count):
            turn = missing[start : start + ranks.count]
            ranks.each(functools.partial(one_each, turn))
            shown_bar.update(sum(len(chunks[chunk]) for chunk in turn))
    return ranks.first(lambda: [row for path in paths for row in read_rows(shown(path))])

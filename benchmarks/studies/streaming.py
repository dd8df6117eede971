"""Memory and speed of a stream of lists, beside what `datasets` itself needs for the same file.

    python -m benchmarks.studies.streaming --lists 1000000 --folder /tmp

writes made-up lists of 4 answers, and reads them in a process of its own for each way and for a tenth of them: how much memory
a process has held at most, and lists a second. `tokens` is what training reads: checked and tokenised lists.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

WORDS = ["the", "rain", "cat", "sun", "answer", "is", "one", "two", "good", "bad", "because", "where", "who", "they", "it"]
TOKENISED = 20_000  # lists that are tokenised at most: flatness shows long before
WAYS = ("datasets", "stream", "tokens", "whole")


def made_up(n: int, seed: int = 0) -> Iterable[dict]:
    draw = random.Random(seed)
    for _ in range(n):
        prompt, *answers = (" ".join(draw.choices(WORDS, k=draw.randint(5, 40))) for _ in range(5))
        yield {"prompt": prompt, "completions": answers, "scores": [round(draw.random(), 3) for _ in answers]}


def write(path: Path, n: int) -> None:
    if path.suffix == ".jsonl":
        with path.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in made_up(n))
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, writer = iter(made_up(n)), None
    while part := list(itertools.islice(rows, 10_000)):
        table = pa.Table.from_pylist(part)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    writer.close()


def lists_of(path: Path, way: str) -> Iterable:
    import datasets

    import larpo

    if way == "datasets":
        kind = "json" if path.suffix == ".jsonl" else "parquet"
        return datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
    if way == "whole":
        return larpo.load_lists(path)
    stream = larpo.load_lists(path, streaming=True)
    if way == "stream":
        return stream
    from benchmarks.studies.tiny_lm import byte_level_bpe
    from larpo.training.list_stream import training_stream

    tokenizer = byte_level_bpe((row["prompt"] for row in made_up(1000)), 400, pad_token="</s>", eos_token="</s>")
    args = larpo.LarPOConfig(output_dir=tempfile.gettempdir(), report_to="none", use_cpu=True, max_steps=1)
    return training_stream(stream, tokenizer, args)


def measure(path: Path, way: str, n: int) -> dict:
    """Peak of resident memory before the first list and at the end, MiB; lists a second after the first."""
    rows = iter(lists_of(path, way))
    next(rows)
    before, start = _peak(), time.perf_counter()
    seen = 1 + sum(1 for _ in itertools.islice(rows, n - 1))
    seconds = time.perf_counter() - start
    return {"way": way, "lists": seen, "MiB at first": before, "MiB at most": _peak(), "lists/s": round((seen - 1) / seconds)}


def _peak() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lists", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--kind", choices=("jsonl", "parquet"), default="jsonl")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["datasets", "stream", "tokens"])
    parser.add_argument("--one", nargs=2, metavar=("FILE", "WAY"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measure(Path(asked.one[0]), asked.one[1], asked.lists)))
        return
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        for n in (asked.lists // 10, asked.lists):
            path = Path(folder) / f"lists-{n}.{asked.kind}"
            write(path, n)
            print(f"{n:,} lists, {path.stat().st_size / 2**20:.0f} MiB", flush=True)
            for way in asked.ways:
                read = min(n, TOKENISED * n // asked.lists) if way == "tokens" else n
                command = [sys.executable, "-m", "benchmarks.studies.streaming", "--one", path, way, "--lists", read]
                found = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True)
                print("  ", found.stdout.strip().splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()

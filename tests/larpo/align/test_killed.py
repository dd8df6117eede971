"""A run that is killed, at every file it writes and in the middle of training, ends as one that was left in peace."""

import os
from pathlib import Path

import pytest

if not hasattr(os, "fork"):
    pytest.skip("processes are forked", allow_module_level=True)
from larpo.runs.files import read_json, read_rows, rows_once, write_text, write_whole
from tests.helpers import HANGS, align_killed, prepared, tiny

pytestmark = pytest.mark.slow


def lives(folder: Path, mode: str) -> list[int]:
    """Exit codes of the processes of the killed run, one after the other."""
    tiny.save(folder / "model", spread=2.0)
    assert prepared.run(align_killed.main, folder, mode, timeout=HANGS) == 0
    codes = [int(line) for line in (folder / "killed.lives").read_text().split()]
    assert codes[-1] == 0 and (folder / "whole.lives").read_text() == "0\n"
    return codes


def contents(path: Path):
    """What a file holds, without what time and the place leave in it."""
    if path.suffix == ".parquet":
        return read_rows(path)
    if path.name in ("trainer_state.json", "summary.md", "summary.html"):
        return None  # holds seconds; its figures are in train.json, and in metrics.json
    if path.suffix == ".json":
        return without_seconds(read_json(path))
    if path.name == "config.yaml":
        return [line for line in path.read_text().splitlines() if not line.startswith("output_dir")]
    return path.read_bytes()


def without_seconds(value):
    if isinstance(value, dict):
        return {name: without_seconds(item) for name, item in value.items() if name != "seconds"}
    return [without_seconds(item) for item in value] if isinstance(value, list) else value


def assert_same_run(killed: Path, whole: Path):
    files = [{path.relative_to(one): path for path in one.rglob("*") if path.is_file()} for one in (killed, whole)]
    assert files[0].keys() == files[1].keys()
    for name, path in files[0].items():
        assert contents(path) == contents(files[1][name]), name


def test_killed_after_every_file_that_it_writes(tmp_path):
    codes = lives(tmp_path, "renames")
    assert len(codes) > 20 and set(codes[:-1]) == {-9}
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert read_json(tmp_path / "whole" / "iteration-01" / "refill.json")["prompts"] > 0  # that stage was killed as well
    # every chunk was sampled once: nothing that was written was done again
    assert (tmp_path / "killed.calls").read_text() == (tmp_path / "whole.calls").read_text()


def test_killed_in_the_middle_of_training(tmp_path):
    codes = lives(tmp_path, "training")
    assert codes[0] == -9
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    steps = read_json(tmp_path / "killed" / "iteration-02" / "train.json")["log"]
    assert [entry["step"] for entry in steps] == list(range(1, len(steps) + 1)) and len(steps) > 3


def test_what_a_killed_process_left_unfinished_is_replaced(tmp_path):
    left = tmp_path / ".model.unfinished"
    left.mkdir()
    (left / "half").write_text("x")

    def write(folder):
        folder.mkdir()
        (folder / "whole").write_text("y")

    write_whole(tmp_path / "model", write)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["whole"] and not left.exists()
    (tmp_path / ".a.txt.unfinished").write_text("half")
    write_text(tmp_path / "a.txt", "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "model"]


def test_rows_that_are_there_are_not_built_again(tmp_path):
    assert rows_once(tmp_path / "a.parquet", lambda: [{"x": [1, None]}]) == [{"x": [1, None]}]
    assert rows_once(tmp_path / "a.parquet", lambda: 1 / 0) == [{"x": [1, None]}]

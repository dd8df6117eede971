"""Files appear whole, also after a power cut; what can't be read is named."""

import os
import sys

import pytest

from larpo.runs.files import read_json, read_rows, read_text, write_rows, write_text, write_whole
from larpo.runs.intact import Damaged
from larpo.runs.yaml_config import load_yaml


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_disk_has_a_file_before_it_has_its_name(tmp_path, monkeypatch):
    """And a folder's files before that of the folder."""
    done = []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append(os.readlink(f"/proc/self/fd/{handle}")), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda source, target: (done.append("rename"), rename(source, target)))

    def write(folder):
        (folder / "inner").mkdir(parents=True)
        (folder / "inner" / "a").write_text("x")

    write_text(tmp_path / "a.txt", "whole")
    assert done == [str(tmp_path / ".a.txt.unfinished"), "rename", str(tmp_path)]
    done.clear()
    write_whole(tmp_path / "model", write)
    unfinished = str(tmp_path / ".model.unfinished")
    assert done == [f"{unfinished}/inner/a", f"{unfinished}/inner", unfinished, "rename", str(tmp_path)]


@pytest.mark.parametrize("kept", [0, 0.3, -1])
@pytest.mark.parametrize(("name", "read"), [("a.json", read_json), ("a.parquet", read_rows)])
def test_a_file_that_was_not_written_to_its_end_is_named(tmp_path, name, read, kept):
    path = tmp_path / name
    write_rows(path, [{"x": [i]} for i in range(50)]) if read is read_rows else write_text(path, '{"x": [1, 2, 3]}')
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept == 0.3 else kept])
    with pytest.raises(Damaged, match=f"{name} can't be read: it is {'cut' if kept else 'empty'}") as caught:
        read(path)
    assert caught.value.path == path
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read(path)


def test_text_keeps_its_newlines_and_loses_its_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\rc")
    assert read_text(tmp_path / "a.txt") == "a\r\nb\rc"
    (tmp_path / "a.txt").write_bytes(b"a\nb\xff")
    with pytest.raises(Damaged, match=r"a\.txt can't be read: line 2 is not UTF-8 text"):
        read_text(tmp_path / "a.txt")


@pytest.mark.parametrize("content", [b"beta: \xff", b"beta: \x00", b"beta: [1"])
def test_a_config_file_that_is_no_yaml_is_named(tmp_path, content):
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.yaml"):
        load_yaml(tmp_path / "a.yaml", ["beta"])


def test_a_parquet_file_with_other_bytes_in_its_middle_is_damaged(tmp_path):
    path = tmp_path / "a.parquet"
    write_rows(path, [{"score": i / 7} for i in range(500)])
    content = bytearray(path.read_bytes())
    content[300:340] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(Damaged, match=r"a\.parquet can't be read: it is cut or damaged"):
        read_rows(path)

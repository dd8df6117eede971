"""Files appear whole, also after a power cut; what can't be read is named."""

import os
import sys

import pytest

from larpo.runs.files import write_text, write_whole


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

"""One run at a time in a folder, and who only looks whether one is there is none."""

import threading
import time

import pytest
from filelock import FileLock

from larpo.runs.lock import is_locked, locked


def test_a_run_begins_while_someone_looks_whether_one_is_at_work(tmp_path):
    taken = threading.Event()

    def look():
        with FileLock(tmp_path / ".lock"):
            taken.set()
            time.sleep(0.05)

    looking = threading.Thread(target=look)
    looking.start()
    taken.wait()
    with locked(tmp_path):
        looking.join()
        assert is_locked(tmp_path)
        with pytest.raises(ValueError, match="another process is at work in this folder"), locked(tmp_path):
            pass
    assert not is_locked(tmp_path)

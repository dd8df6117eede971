"""Processes of one run; on several of them tests/larpo/align/test_ranks.py has it."""

import pytest
from accelerate import PartialState

from larpo.runs.ranks import ALONE, Ranks


def test_one_process_does_what_it_is_asked():
    assert ALONE.first(lambda: 1) == ALONE.each(lambda: 1) == ALONE.together(lambda: 1) == 1
    assert ALONE.all(lambda: 1) == [1] and ALONE.mine([1, 2]) == [1, 2]
    with pytest.raises(ZeroDivisionError):
        ALONE.first(lambda: 1 / 0)


def test_processes_that_do_not_see_each_other_are_refused(monkeypatch):
    """Each would take itself for the whole run."""
    PartialState()
    assert Ranks.started() == ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes were started, but 1 works here on .*: on a CPU they need use_cpu: true"):
        Ranks.started()

"""The loop on several processes over gloo: what it writes, and how it ends."""

import os

import pytest
import torch.distributed as dist

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch has no gloo", allow_module_level=True)

from larpo.runs.files import read_json
from tests.helpers import HANGS, loop_checks, prepared, ranks, ranks_killed, tiny
from tests.larpo.align.test_killed import assert_same_run

pytestmark = pytest.mark.slow


def write_model(folder):
    tiny.save(folder / "model", spread=2.0)


def one_process(folder):
    write_model(folder)
    loop_checks.align(folder / "alone", 1)
    loop_checks.refilled(folder / "refilled-alone", 1)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return ranks.checks_of("loop_checks", 2, tmp_path_factory, before=one_process)


@pytest.mark.parametrize("name", ranks.check_names("loop_checks"))
def test(found, name):
    ranks.passes(found, name)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Runs of two and three ranks, and one whose ranks were killed; see tests/helpers/ranks_killed.py."""
    if not hasattr(os, "fork"):
        pytest.skip("processes are forked")
    folder = tmp_path_factory.mktemp("killed")
    write_model(folder)
    assert prepared.run(ranks_killed.main, folder, timeout=HANGS) == 0
    return folder


def test_three_ranks_write_what_two_write(killed):
    for name in loop_checks.OF_THE_FIRST_POLICY:
        two, three = ((killed / ranks / f"{name}.parquet").read_bytes() for ranks in ("whole", "three"))
        assert two == three, name


def test_a_rank_that_is_killed_ends_the_others_and_the_run_goes_on(killed):
    """Killed in sampling, in training and behind its result: the first one, the other one, both; without a launcher that ends
    those which are left. One of them fails in training while the other waits for it."""
    lives = read_json(killed / "lives.json")
    codes = [[1, -9], [-9, 1], [1, -9], [1, 1], [-9, -9], [-9, 1], [0, 0]]
    assert [[code for code, _ in life["ranks"]] for life in lives] == codes
    for life in lives[:-1]:
        assert life["seconds_apart"] < 30  # gloo itself would give up after half an hour
        for code, said in life["ranks"]:
            assert code == -9 or said == "MemoryError: no memory left" or "another process of this run is gone" in said, said
    assert_same_run(killed / "killed", killed / "whole")

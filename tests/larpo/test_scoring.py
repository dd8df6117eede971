"""`larpo score` in parts: what is killed goes on where it was, and is never taken for the results of another run."""

import logging
import os
import signal

import pytest
import torch

from larpo import commands, scoring
from larpo.runs import files
from larpo.runs.files import read_rows
from tests.helpers import HANGS, prepared, tiny
from tests.helpers.jsonl import write_jsonl

LISTS = tiny.lists(10, m=None, seed=3)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Models, lists and parts of two lists, of which five hold all."""
    for name, seed in (("model", 0), ("other", 1)):
        tiny.save(tmp_path / name, seed=seed)
    write_jsonl((tmp_path / "lists.jsonl"), LISTS)
    monkeypatch.setattr(scoring, "LISTS_OF_A_PART", 2)
    return tmp_path


def score(folder, *, out="out.parquet", batch_size=2, data="lists.jsonl", **options):
    options = {"ref_model": str(folder / "other"), "batch_size": batch_size} | options
    commands.score(commands.ScoreJob(str(folder / "model"), str(folder / data), folder / out, **options))
    return read_rows(folder / out)


def stopped_after(n, folder, monkeypatch, **options):
    """A run that ends before it writes another part than the first n."""
    written = []

    def write(path, rows):
        if len(written) == n:
            raise KeyboardInterrupt
        written.append(path)
        write_rows(path, rows)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        write_rows = files.write_rows
        patched.setattr(files, "write_rows", write)
        score(folder, **options)


def killed_after_seven_files(folder):
    """Of the parts the last one is the first of the reference."""
    names, rename = [], os.replace

    def replace(source, target):
        rename(source, target)
        names.append(target)
        if len(names) == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.replace, scoring.LISTS_OF_A_PART = replace, 2
    score(folder)


@pytest.mark.slow
def test_a_killed_run_scores_only_what_is_missing_and_writes_what_one_in_peace_does(folder, caplog):
    assert prepared.run(killed_after_seven_files, folder, timeout=HANGS) == -signal.SIGKILL
    kept = folder / "out.parquet.parts"
    assert sorted(path.name for path in kept.glob("*/*")) == ["00000.parquet", *(f"{i:05d}.parquet" for i in range(5))]
    (kept / "ref_logps" / ".00001.parquet.unfinished").write_bytes(b"PAR1")
    with caplog.at_level(logging.INFO, logger="larpo.runs"):
        score(folder)
    assert "logps: 10 of 10 lists were there before" in caplog.text
    assert "ref_logps: 2 of 10 lists were there before" in caplog.text
    score(folder, out="whole.parquet")
    assert (folder / "out.parquet").read_bytes() == (folder / "whole.parquet").read_bytes()
    assert not list(folder.glob("*.parts"))


def test_memory_that_ran_out_is_answered_with_a_smaller_batch(folder, monkeypatch, caplog):
    stopped_after(3, folder, monkeypatch)
    with caplog.at_level(logging.INFO, logger="larpo.runs"):
        found = score(folder, batch_size=1)
    assert "6 of 10 lists were there before" in caplog.text
    for row, other in zip(found, score(folder, out="whole.parquet"), strict=True):
        assert row["logps"] == pytest.approx(other["logps"], rel=1e-5)
        assert row["ref_logps"] == pytest.approx(other["ref_logps"], rel=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("model", "weights was 'xxh3 .*' and is 'xxh3"),
        ("ref_model", "ref_model was '.*other' and is '.*model'; ref_weights was"),
        ("data", "lists was '10, tokens sha256 .*' and is '9, tokens sha256"),
        ("append_eos", "append_eos was True and is False"),
        ("dtype", "weights was .*; dtype was 'float32' and is 'bfloat16'"),
    ],
)
def test_results_of_another_run_are_refused_and_what_differs_is_named(folder, monkeypatch, change, said):
    stopped_after(1, folder, monkeypatch)
    options = {}
    if change == "model":  # the same folder, with the weights of a run that went on
        tiny.causal_lm(seed=1).save_pretrained(folder / "model")
    elif change == "data":
        write_jsonl((folder / "lists.jsonl"), LISTS[:-1])
    else:
        options = {change: {"ref_model": str(folder / "model"), "append_eos": False, "dtype": "bfloat16"}[change]}
    with pytest.raises(ValueError, match=rf"out\.parquet\.parts' holds results of another run: .*{said}.*Remove the folder"):
        score(folder, **options)


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def swapped(path):
    path.write_bytes(path.with_name("00001.parquet").read_bytes())


@pytest.mark.parametrize(("damage", "said"), [(cut, "it is cut or damaged"), (swapped, "it holds other rows")])
def test_a_damaged_part_is_refused_and_can_be_removed(folder, monkeypatch, damage, said):
    stopped_after(3, folder, monkeypatch)
    part = folder / "out.parquet.parts" / "logps" / "00000.parquet"
    damage(part)
    with pytest.raises(ValueError, match=rf"00000\.parquet can't be read: {said}.*Remove it"):
        score(folder)
    part.unlink()
    score(folder)
    assert len(read_rows(folder / "out.parquet")) == 10


def test_sizes_of_batches_below_1_are_refused(folder):
    for size in ({"batch_size": 0}, {"candidate_batch_size": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(size))} must be at least 1, got 0"):
            score(folder, **size)


def test_results_whose_identity_is_gone_are_refused(folder, monkeypatch):
    stopped_after(1, folder, monkeypatch)
    (folder / "out.parquet.parts" / "identity.json").unlink()
    with pytest.raises(ValueError, match=r"holds results, but no identity\.json that says of what"):
        score(folder)

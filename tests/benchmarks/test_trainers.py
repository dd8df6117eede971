"""The trainer suite measures what it says: whole steps of both trainers, in turns, against the loss in float64."""

import re
from dataclasses import replace

import pytest
import torch

for package in ("transformers", "accelerate", "datasets", "typer"):
    pytest.importorskip(package)

from benchmarks.core import kinds
from benchmarks.core.measure import Settings, all_providers, measure
from benchmarks.providers import trainers
from benchmarks.providers.trainers import TrainerStep
from benchmarks.reporting import tables
from larpo import offline
from tests.helpers import tiny

WORDS = trainers.PROMPT_WORDS + trainers.COMPLETION_WORDS


@pytest.fixture
def small(monkeypatch):
    """A tiny model on random words in place of SmolLM2 on film reviews."""
    draw = torch.Generator().manual_seed(0)
    texts = [" ".join(tiny.WORDS[i] for i in torch.randint(len(tiny.WORDS), (WORDS,), generator=draw)) for _ in range(8)]

    def load(dtype, progress):
        return tiny.causal_lm(max_position_embeddings=512), tiny.tokenizer()

    monkeypatch.setattr(offline, "load_smollm2", load)
    monkeypatch.setattr(offline, "imdb_reviews", lambda: (texts, []))
    monkeypatch.setattr(trainers, "REFERENCE_NOISE", 0.2)


def _table(case, change=lambda found: found):
    step = kinds.build(case, "trainer", torch.float32, "cpu")
    return measure(step, change(all_providers("trainer", step.mode)), kinds.truth(step), Settings(rounds=2, memory=False))


def test_a_list_costs_one_loss_whoever_trains_on_it(small):
    found = _table("L1-m3")
    ran = [row for row in found["rows"] if row["status"] != "not run"]
    assert all((row["status"], len(row["seconds"])) == ("ok", 2) for row in ran), [row["message"] for row in ran]
    pairs = [row["loss"] for row in ran if row["computes"] == "DPO pairs"]
    assert len(pairs) >= 2 and max(pairs) - min(pairs) < 1e-5 and abs(pairs[0] - 0.6931) > 1e-2
    names = tables.columns(found)
    assert set(names) <= set(tables.cells(found, found["rows"][0]))


def test_memory_is_measured_when_the_trainers_of_a_table_are_gone(small, monkeypatch):
    """In a process of its own, which finds no room beside trainers that wait for their turn."""
    left = []

    def peaks(entries, *others):
        waiting = [entry.problem.loop.trainer for entry in entries if entry.alive]
        left.append([sum(p.numel() for p in one.model.parameters()) + len(one.optimizer.state) for one in waiting])

    monkeypatch.setattr("benchmarks.core.measure._peaks", peaks)
    step = kinds.build("L1-m3", "trainer", torch.float32, "cpu")
    found = all_providers("trainer", step.mode, ["ours*"])
    rows = measure(step, found, kinds.truth(step), Settings(rounds=2, memory_from=0))["rows"]
    assert left == [[0] * len(found)] and all(len(row["seconds"]) == 2 for row in rows)


def test_another_loss_is_flagged_and_not_timed(small):
    def doubled(providers):
        def forward(step):
            out = providers[0].forward(step)
            return out._replace(value=2 * out.value)

        return [replace(providers[0], name="doubled", forward=forward)]

    (row,) = _table("L2-m2", doubled)["rows"]
    assert row["status"] == "WRONG" and re.match("loss .* > ", row["message"]) and not row["seconds"]


def test_a_trainer_that_fails_is_a_row_that_says_so(small):
    def failing(providers):
        def prepare(step):
            raise RuntimeError("no such model")

        return [replace(providers[0], prepare=prepare)]

    (row,) = _table("L2-m2", failing)["rows"]
    assert (row["status"], row["message"]) == ("error", "RuntimeError: no such model")


def test_a_name_that_fits_nothing_says_what_would():
    with pytest.raises(ValueError, match="case: got 'L4', expected a name as L4-m2"):
        TrainerStep.build("L4", torch.float32, "cpu", 0)

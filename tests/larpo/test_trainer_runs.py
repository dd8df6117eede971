"""A run from its settings to its end: what is learned, logged, saved, resumed, and refused."""

import warnings

import pytest
import torch
from datasets import Dataset

from larpo.runs.checkpoints import last_whole_checkpoint
from larpo.trainer import LarPOTrainer
from tests.helpers import tiny
from tests.helpers.trainers import EVERY_STEP, config, trainer


def test_a_model_learns_to_rank_lists_it_has_not_seen(tmp_path):
    held_out = Dataset.from_list(tiny.lists(24, m=4, seed=100))
    steps = dict(max_steps=40, per_device_train_batch_size=8, learning_rate=5e-3, logging_steps=20)
    data = Dataset.from_list(tiny.lists(64, m=4, seed=1))
    t = trainer(tmp_path, data, eval_dataset=held_out, per_device_eval_batch_size=24, **steps)
    before = t.evaluate()
    t.train()
    after = t.evaluate()
    assert before["eval_kendall_tau"] == 0  # as are all implicit scores: there is no order
    assert after["eval_ndcg"] > before["eval_ndcg"] + 0.05, (before["eval_ndcg"], after["eval_ndcg"])
    assert after["eval_kendall_tau"] > 0.3
    assert after["eval_rewards/accuracies"] > 0.7
    assert after["eval_loss"] < before["eval_loss"]


def test_a_model_can_be_evaluated_without_training(tmp_path, data):
    metrics = trainer(tmp_path, None, eval_dataset=data).evaluate()
    assert metrics["eval_loss"] > 0 and "eval_ndcg" in metrics


def test_what_is_logged(tmp_path, data):
    t = trainer(tmp_path, data, eval_dataset={"one": data, "two": data.select(range(2))}, max_steps=2, ndcg_k=2)
    t.train()
    names = {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
    names |= {"loss", "ndcg", "ndcg@2", "mrr", "kendall_tau", "list/size", "list/frac_tied", "tokens_per_second"}
    names |= {"logps/chosen", "logps/rejected"}
    assert names <= t.state.log_history[1].keys()
    metrics = t.evaluate()
    assert {"eval_one_ndcg", "eval_two_rewards/margins", "eval_one_loss"} <= metrics.keys()


def test_tensorboard_shows_list_metrics(tmp_path, data, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer(
        tmp_path, data, eval_dataset=data, report_to="tensorboard", max_steps=2, eval_strategy="steps", eval_steps=2
    ).train()
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert {"train/rewards/margins", "train/ndcg", "eval/kendall_tau"} <= set(board.Tags()["scalars"])


def test_the_best_model_can_be_chosen_by_a_metric_of_order_before_there_is_one(tmp_path, data):
    best = dict(load_best_model_at_end=True, metric_for_best_model="kendall_tau")
    t = trainer(tmp_path, data, eval_dataset=data, max_steps=4, warmup_steps=2, learning_rate=1e-2, **EVERY_STEP, **best)
    t.train()
    taus = [entry["eval_kendall_tau"] for entry in t.state.log_history if "eval_kendall_tau" in entry]
    assert taus[0] == 0.0 and len(taus) == 4
    assert t.state.best_metric == max(taus) > 0


def test_nothing_is_warned_of_in_an_ordinary_run(tmp_path, data):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        trainer(tmp_path, Dataset.from_list(tiny.lists(4))).train()


def test_a_resumed_run_ends_with_the_same_weights(tmp_path, data):
    options = dict(max_steps=6, save_strategy="steps", save_steps=2, learning_rate=1e-2)
    whole = trainer(tmp_path / "whole", data, **options)
    whole.train()

    class Stop(Exception):
        pass

    from transformers import TrainerCallback

    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise Stop

    with pytest.raises(Stop):
        trainer(tmp_path / "cut", data, callbacks=[Interrupt()], **options).train()
    broken = tmp_path / "cut" / "checkpoint-6"  # as a process killed while it writes leaves it
    broken.mkdir()
    (broken / "trainer_state.json").write_text('{"global_step": 6, "ep')
    assert last_whole_checkpoint(tmp_path / "cut") == str(tmp_path / "cut" / "checkpoint-4")
    resumed = trainer(tmp_path / "cut", data, **options)
    resumed.train(resume_from_checkpoint=True)
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert last_whole_checkpoint(tmp_path / "nothing") is None


def test_a_checkpoint_named_in_the_arguments_is_gone_on_from(tmp_path, data):
    options = dict(max_steps=4, save_strategy="steps", save_steps=2)
    trainer(tmp_path, data, **options).train()
    t = trainer(tmp_path, data, **options, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    seen = []
    step_of, t.training_step = t.training_step, lambda *args, **kwargs: seen.append(1) or step_of(*args, **kwargs)
    t.train()
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(objective="dpo"), "objective must be one of"),
        (dict(objective="lambdarank", objective_options={"kk": 1}), "objective_options of 'lambdarank' may hold"),
        (dict(objective_options="{no json"), "objective_options must be a dict or JSON"),
        (dict(beta=0.0), "beta must be > 0"),
        (dict(max_length=16, max_prompt_length=16), "max_prompt_length=16 must be below max_length=16"),
        (dict(max_length=0), "max_length must be None or an int >= 2"),
        (dict(list_top=1), "list_top and list_bottom go together"),
        (dict(list_top=1, list_bottom=0), "at least 2"),
        (dict(candidate_micro_batch_size=0), "candidate_micro_batch_size must be None or an int >= 1"),
        (dict(truncation_mode="middle"), "truncation_mode must be one of"),
        (dict(schedule="fast"), "schedule must be one of"),
        (dict(remove_unused_columns=True), "remove_unused_columns must be False"),
        (dict(sync_ref_model=True, reference_free=True), "sync_ref_model"),
    ],
)
def test_a_bad_config_is_refused_at_once(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_objective_options_arrive(tmp_path, data):
    t = trainer(tmp_path, data, objective="lambdarank", objective_options='{"weighting": "dcg", "k": 3}')
    assert (t.objective.weighting, t.objective.k) == ("dcg", 3)


def test_bad_arguments_are_refused(tmp_path, data):
    model = tiny.causal_lm()
    with pytest.raises(ValueError, match="ref_model must not be the model"):
        trainer(tmp_path, data, model, ref_model=model)
    with pytest.raises(TypeError, match="args must be a LarPOConfig"):
        LarPOTrainer(model, args={"output_dir": "x"}, train_dataset=data)
    with pytest.raises(ValueError, match="train_dataset is needed"):
        LarPOTrainer(model, args=config(tmp_path))
    with pytest.raises(ValueError, match="ref_model is given"):
        trainer(tmp_path, data, model, ref_model=tiny.causal_lm(), reference_free=True)
    with pytest.raises(ValueError, match="model_init_kwargs"):
        trainer(tmp_path, data, model, model_init_kwargs={"dtype": "float32"})
    with pytest.raises(ValueError, match="columns"):
        trainer(tmp_path, Dataset.from_list([{"text": "a"}]), model)

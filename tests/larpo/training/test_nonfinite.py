"""A loss or weights that are not finite: training stops before an update, and nothing is written."""

import copy
import math

import pytest
import torch
from datasets import Dataset

from larpo.trainer import LarPOTrainer
from larpo.training import nonfinite
from larpo.training.nonfinite import NonFiniteError, nonfinite_parameters
from tests.helpers import tiny
from tests.helpers.trainers import SGD, config, eager_loss, gradients, moved, trainer

BAD = 2  # this row's loss is infinite


@pytest.fixture(scope="module")
def data():
    return Dataset.from_list(tiny.lists(4, m=3, seed=3))


@pytest.fixture(scope="module")
def policy():
    return moved(tiny.causal_lm())


class Infinite(LarPOTrainer):
    def list_loss(self, logps, ref_logps, inputs):
        loss, scores = super().list_loss(logps, ref_logps, inputs)
        return loss * (torch.inf if BAD in inputs["row_number"] else 1), scores


class OwnLoss(LarPOTrainer):
    def compute_loss(self, model, inputs, **kwargs):
        return super().compute_loss(model.eval(), inputs) * torch.nan


class BadGradient(LarPOTrainer):
    def list_loss(self, logps, ref_logps, inputs):
        loss, scores = super().list_loss(logps, ref_logps, inputs)
        return loss + (logps.sum() * 0).sqrt(), scores  # 0, with a slope of infinity


def make(folder, data, policy, kind=Infinite, **options):
    single = dict(per_device_train_batch_size=1, gradient_accumulation_steps=4, train_sampling_strategy="sequential")
    return trainer(folder, data, copy.deepcopy(policy), kind, ref_model=tiny.causal_lm(), **(SGD | single | options))


def same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("options", [dict(), dict(candidate_micro_batch_size=2), dict(gradient_accumulation_steps=1)], ids=str)
def test_training_stops_before_the_update_and_names_the_rows(tmp_path, data, policy, options):
    t = make(tmp_path, data, policy, **options)
    at = 3 if "gradient_accumulation_steps" in options else 1
    with pytest.raises(
        NonFiniteError, match=rf"stops at step {at}: the loss is inf in the batch of rows {BAD}\. The weights are"
    ):
        t.args.max_steps = 4
        t.train()
    assert t.state.global_step == at - 1 and nonfinite_parameters(t.model) == []
    if at == 1:
        assert same_weights(t.model, policy)


def test_what_was_not_finite_is_said_with_its_rows(tmp_path, data, policy):
    class BadReference(LarPOTrainer):
        def list_loss(self, logps, ref_logps, inputs):
            ref_logps[4] = torch.nan  # of the second list
            return super().list_loss(logps, ref_logps, inputs)

    said = r"the loss is nan in the batch of rows 0, 1, 2, 3, 1 of 12 ref_logps are not finite, in rows 1, 1 of 12 scores"
    with pytest.raises(NonFiniteError, match=said):
        make(tmp_path, data, policy, BadReference, per_device_train_batch_size=4, gradient_accumulation_steps=1).train()


def test_a_compute_loss_of_ones_own_is_looked_at_too(tmp_path, data, policy):
    for action in ("raise", "skip"):
        t = make(tmp_path, data, policy, OwnLoss, on_nonfinite=action)
        with pytest.raises(NonFiniteError, match="the loss is nan"):
            t.train()
        assert same_weights(t.model, policy)


@pytest.mark.parametrize("micro", [None, 2])
def test_a_skipped_batch_adds_nothing_and_is_counted(tmp_path, data, policy, micro):
    t = make(tmp_path, data, policy, on_nonfinite="skip", candidate_micro_batch_size=micro)
    with pytest.warns(UserWarning, match=rf"step 1: a batch is left out, the loss is inf in the batch of rows {BAD}"):
        t.train()
    rest = eager_loss(policy, tiny.causal_lm(), data.select([0, 1, 3]))
    of_rest = gradients(policy, rest)
    for (name, p), q in zip(policy.named_parameters(), t.model.parameters(), strict=True):
        expected = of_rest[name] * 3 / 4  # the mean over four lists of which one adds 0
        torch.testing.assert_close(p.detach() - q, expected, rtol=0, atol=1e-6)
    logged = t.state.log_history[0]
    assert logged["loss"] == pytest.approx(rest.item(), rel=1e-4) and logged["skipped_batches"] == 1


@pytest.mark.parametrize("micro", [None, 2])
def test_ref_logps_that_are_not_finite_are_named_or_skipped_in_slices_too(tmp_path, data, policy, micro):
    t = make(tmp_path, data, policy, LarPOTrainer, candidate_micro_batch_size=micro)
    t._ref_logps = lambda model, inputs: torch.full_like(inputs["relevance"], torch.nan).float()
    with pytest.raises(NonFiniteError, match="3 of 3 ref_logps are not finite, in rows 0"):
        t.train()
    t._finite.on_nonfinite = "skip"
    with pytest.warns(UserWarning, match="a batch is left out"):
        t.train()
    assert same_weights(t.model, policy) and t._finite.skipped == 4


def test_an_update_of_skipped_batches_changes_no_weight(tmp_path, data, policy):
    t = make(tmp_path, data.select([BAD]), policy, on_nonfinite="skip", optim="adamw_torch", weight_decay=0.1)
    t.list_loss = lambda logps, ref_logps, inputs: (logps.sum() * torch.nan, logps)
    with pytest.warns(UserWarning, match="a batch is left out"):
        t.train()
    assert same_weights(t.model, policy) and t.state.global_step == 1
    logged = t.state.log_history[0]
    assert math.isnan(logged["loss"]) and logged["skipped_batches"] == 1  # 0 would be the loss of nothing


@pytest.mark.parametrize("action", ["raise", "skip"])
def test_weights_that_are_not_finite_are_named_and_nothing_is_skipped_for_them(tmp_path, data, policy, action):
    t = make(tmp_path, data, policy, LarPOTrainer, on_nonfinite=action)
    t.model.model.norm.weight.data[0] = torch.nan
    said = r"loss is nan.*1 of the model's parameters are not finite \(model.norm.weight\): an earlier update.*lower"
    with pytest.raises(NonFiniteError, match=said):
        t.train()


def test_training_stops_where_nothing_but_skipping_is_left(tmp_path, data, policy, monkeypatch):
    monkeypatch.setattr(nonfinite, "IN_A_ROW", 3)
    t = make(tmp_path, data, policy, on_nonfinite="skip", gradient_accumulation_steps=1, max_steps=12)
    with pytest.warns(UserWarning, match="a batch is left out"):
        t.train()  # one of four is bad: never three in a row
    assert t.state.log_history[-2]["skipped_batches"] == 3
    t.list_loss = lambda logps, ref_logps, inputs: (logps.sum() * torch.nan, logps)
    with pytest.warns(UserWarning, match="left out"), pytest.raises(NonFiniteError, match="training stops at step 4"):
        t.train()


def test_an_evaluation_may_have_any_loss(tmp_path, data, policy):
    t = make(tmp_path, data, policy)
    assert t.evaluate(data)["eval_loss"] == torch.inf


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_weights_that_are_not_finite_are_not_written(tmp_path, data, policy, strategy):
    t = make(tmp_path, data, policy, BadGradient, save_strategy=strategy, save_steps=1)
    with pytest.raises(
        NonFiniteError, match=r"parameters are not finite.*diverged, and nothing is written to .*lower learning"
    ):
        t.train()
        t.save_model(str(tmp_path / "final"))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_skipping_is_refused_where_it_cannot_be_done(tmp_path, data, policy, monkeypatch):
    from accelerate import Accelerator

    with pytest.raises(ValueError, match="on_nonfinite must be one of 'raise', 'skip', got 'ignore'"):
        config(tmp_path, on_nonfinite="ignore")
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    with pytest.raises(ValueError, match="works in one process and under DDP, without fp16; here is fp16"):
        make(tmp_path, data, policy, on_nonfinite="skip")

"""What `predict` returns and `compute_metrics` gets, and the other arguments that users know from transformers and TRL."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from larpo.data.collator import ListCollator
from larpo.trainer import LarPOTrainer
from tests.helpers import tiny
from tests.helpers.trainers import config, eager_logps, lora, moved, trainer


@pytest.fixture(scope="module")
def data():
    return Dataset.from_list(tiny.lists(7, m=None, seed=3))


def padded(rows):
    out = np.full((len(rows), max(map(len, rows))), np.nan)
    for at, row in zip(out, rows, strict=True):
        at[: len(row)] = row
    return out


# --- predictions


WAYS = [dict(), dict(candidate_micro_batch_size=2), dict(train_sampling_strategy="group_by_length")]


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_predictions_are_scores_and_log_likelihoods_of_each_list_in_the_order_of_the_data(tmp_path, data, options):
    model = tiny.causal_lm()
    policy = moved(model)
    with torch.no_grad():
        logps = [eager_logps(policy, row).numpy() for row in data]
        scores = [0.3 * (own - eager_logps(model, row).numpy()) for own, row in zip(logps, data, strict=True)]
    found = trainer(tmp_path, data, policy, ref_model=model, beta=0.3, **options).predict(data)
    np.testing.assert_allclose(found.predictions.logps, padded(logps), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.predictions.scores, padded(scores), rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(found.label_ids, padded(data["scores"][:]))
    first, second = found.predictions  # as transformers' tuple of arrays
    assert first is found.predictions.scores and second is found.predictions.logps


def test_log_likelihoods_are_means_where_these_are_trained_on(tmp_path, data):
    model = tiny.causal_lm()
    with torch.no_grad():
        logps = [eager_logps(model, row).numpy() for row in data]
    lengths = [[len(tiny.tokenizer()(c).input_ids) + 1 for c in row["completions"]] for row in data]
    found = trainer(tmp_path, data, model, length_normalized=True, reference_free=True).predict(data)
    np.testing.assert_allclose(found.predictions.logps, padded(logps) / padded(lengths), rtol=1e-4)
    np.testing.assert_allclose(found.predictions.scores, 0.1 * found.predictions.logps, rtol=1e-6)


def test_an_evaluation_of_the_loss_alone_keeps_no_predictions(tmp_path, data):
    found = trainer(tmp_path, data, prediction_loss_only=True).predict(data)
    assert found.predictions is None and found.label_ids is None and found.metrics["test_loss"] > 0


# --- metrics of one's own


def first_is_best(evaluated):
    scores, logps = evaluated.predictions
    assert scores.shape == logps.shape == evaluated.label_ids.shape == (7, 3)
    best = np.nanargmax(evaluated.label_ids, 1) == np.nanargmax(logps, 1)
    return {"likeliest_is_best": np.float64(best.mean()), "eval_lists": len(best)}


def test_metrics_of_ones_own_are_logged_and_choose_the_best_model(tmp_path, data):
    often = dict(max_steps=2, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)
    best = dict(load_best_model_at_end=True, metric_for_best_model="likeliest_is_best")
    t = trainer(tmp_path, data, eval_dataset=data, compute_metrics=first_is_best, **often, **best)
    t.train()
    with torch.no_grad():
        logps = [eager_logps(t.model, row).numpy() for row in data]
    expected = np.mean([np.argmax(a) == np.argmax(b) for a, b in zip(logps, data["scores"], strict=True)])
    found = t.evaluate()
    assert found["eval_likeliest_is_best"] == t.state.best_metric == expected
    assert found["eval_lists"] == 7 and "eval_eval_lists" not in found and found["eval_ndcg"] > 0
    assert t.predict(data).metrics["test_likeliest_is_best"] == expected


def test_metrics_without_predictions_are_refused(tmp_path, data):
    with pytest.raises(ValueError, match="compute_metrics is given, but prediction_loss_only"):
        trainer(tmp_path, data, compute_metrics=first_is_best, prediction_loss_only=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(include_for_metrics=["loss"]), r"include_for_metrics must be \[\], got \['loss'\]"),
        (dict(batch_eval_metrics=True), "batch_eval_metrics must be False"),
        (dict(eval_do_concat_batches=False), "eval_do_concat_batches must be True"),
        (dict(eval_use_gather_object=True), "eval_use_gather_object must be False"),
    ],
)
def test_settings_of_predictions_that_would_be_ignored_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


# --- optimizer, collator


class Plain(torch.optim.SGD):
    pass


@pytest.mark.parametrize(("keywords", "lr"), [({}, 1e-3), ({"lr": 0.5}, 0.5)])
def test_an_optimizer_by_class_gets_the_learning_rate_of_the_settings(tmp_path, data, keywords, lr):
    given = (Plain, {"momentum": 0.9, **keywords})
    t = trainer(tmp_path, data, optimizer_cls_and_kwargs=given, learning_rate=1e-3)
    t.train()
    groups = t.optimizer.param_groups
    assert isinstance(getattr(t.optimizer, "optimizer", t.optimizer), Plain)
    assert {(group["initial_lr"], group["momentum"]) for group in groups} == {(lr, 0.9)}
    assert given[1] == {"momentum": 0.9, **keywords}


def test_an_optimizer_of_what_is_not_trained_is_refused(tmp_path, data):
    model = tiny.causal_lm()
    optimizers = (torch.optim.SGD(model.parameters(), lr=1e-3), None)
    with pytest.raises(ValueError, match=r"optimizers: the optimizer holds no parameter.*optimizer_cls_and_kwargs"):
        trainer(tmp_path, data, model, optimizers=optimizers, peft_config=lora())
    model = tiny.causal_lm()
    trainer(tmp_path, data, model, optimizers=(torch.optim.SGD(model.parameters(), lr=1e-3), None)).train()
    assert not torch.equal(model.lm_head.weight, tiny.causal_lm().lm_head.weight)


def test_a_collator_of_ones_own_makes_the_batches_with_the_settings_of_the_trainer(tmp_path, data):
    class Counting(ListCollator):
        seen = 0

        def __call__(self, examples):
            type(self).seen += len(examples)
            return super().__call__(examples)

    own = Counting(pad_token_id=77)
    t = trainer(tmp_path, data, data_collator=own, candidate_micro_batch_size=2)
    t.train()
    assert Counting.seen >= 2 and (t.data_collator.pad_token_id, t.data_collator.slice_size) == (0, 2)
    assert (own.pad_token_id, own.slice_size) == (77, None)


# --- what is not taken


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("model_init", r"takes no model_init: the reference is the policy.*LarPOTrainer\(model_init\(\)"),
        ("compute_loss_func", "takes no compute_loss_func: override list_loss"),
        ("preprocess_logits_for_metrics", "takes no preprocess_logits_for_metrics: no logits"),
        ("tokenizer", "takes no tokenizer: it is called processing_class"),
        ("train_data", "unexpected keyword argument 'train_data'"),
        ("data_collator", r"data_collator must be a larpo.data.collator.ListCollator, got function"),
    ],
)
def test_what_other_trainers_take_and_this_one_does_not_is_refused_with_what_to_do(tmp_path, data, argument, message):
    arguments = dict(args=config(tmp_path), train_dataset=data, processing_class=tiny.tokenizer())
    with pytest.raises(TypeError, match=message):
        LarPOTrainer(tiny.causal_lm(), **arguments, **{argument: first_is_best})


# --- the model card


class Other(LarPOTrainer):
    def list_loss(self, logps, ref_logps, inputs):
        return super().list_loss(logps, ref_logps, inputs)


@pytest.mark.parametrize(("kind", "tags"), [(LarPOTrainer, ["chat", "larpo", "listmle"]), (Other, ["chat", "larpo"])])
def test_the_model_card_is_tagged_and_names_the_paper(tmp_path, data, kind, tags):
    from huggingface_hub import ModelCard

    t = trainer(tmp_path, data, kind=kind, objective="listmle")
    t.train()
    for _ in range(2):  # written again, it says the same once
        t.create_model_card(tags="chat", model_name="mine")
        card = ModelCard.load(tmp_path / "README.md")
        assert [tag for tag in card.data.tags if tag in ("chat", "larpo", "listmle")] == tags
        assert card.text.count("https://arxiv.org/abs/2502.03699") == 1 and "## Training procedure" in card.text
        assert ("objective: listmle" in card.text) == (kind is LarPOTrainer)

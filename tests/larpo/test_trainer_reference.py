"""The reference that a trainer measures against: as it was handed over, stored, followed, or the model without its adapter."""

import copy
import math

import pytest
import torch
from datasets import Dataset

from tests.helpers import tiny
from tests.helpers.trainers import (
    as_trained,
    assert_same_gradients,
    eager_logps,
    eager_loss,
    eager_objective,
    gradients,
    lora,
    loss_at_start,
    moved,
    step,
    trainer,
    with_ref_logps,
)


def test_no_reference_means_the_policy_as_it_was_handed_over(tmp_path, data):
    model = moved(tiny.causal_lm())
    before = copy.deepcopy(model.state_dict())
    t = trainer(tmp_path, data, model, max_steps=3, learning_rate=1e-2)
    t.train()
    for name, p in t.ref_model.state_dict().items():
        assert torch.equal(p, before[name]), name
    assert not torch.equal(t.model.lm_head.weight, t.ref_model.lm_head.weight)
    assert t.state.log_history[0]["loss"] == pytest.approx(loss_at_start(t, data), rel=1e-4)


def test_what_is_frozen_is_shared_with_the_reference_not_copied(tmp_path, data):
    model = tiny.causal_lm()
    model.model.embed_tokens.requires_grad_(False)
    t = trainer(tmp_path, data, model)
    assert t.ref_model.model.embed_tokens.weight is model.model.embed_tokens.weight
    assert t.ref_model.lm_head.weight is not model.lm_head.weight


def test_precomputed_reference_gives_the_same_training(tmp_path, data):
    weights = []
    for precompute in (False, True):
        t = trainer(tmp_path, data, eval_dataset=data, max_steps=4, precompute_ref_log_probs=precompute)
        assert (t.ref_model is None) == precompute
        t.train()
        assert "eval_ndcg" in t.evaluate()
        weights.append(t.model.lm_head.weight.detach().clone())
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_reference_log_likelihoods_in_the_data_are_taken(tmp_path, data):
    reference = tiny.causal_lm()
    policy = moved(reference)
    with torch.no_grad():
        given = data.map(lambda row: {"ref_logps": eager_logps(reference, row).tolist()})
    t = trainer(tmp_path, given, copy.deepcopy(policy), beta=0.3)
    assert t.ref_model is None
    loss, _ = step(t, list(t.train_dataset))
    torch.testing.assert_close(loss, eager_loss(policy, reference, data, beta=0.3).detach(), rtol=1e-4, atol=1e-6)


def test_reference_log_likelihoods_must_be_given_for_all_rows(tmp_path):
    rows = tiny.lists(2)
    with pytest.raises(ValueError, match="ref_logps: row 1 has none"):
        trainer(tmp_path, Dataset.from_list([rows[0] | {"ref_logps": [0.0] * 4}, rows[1] | {"ref_logps": None}]))


def test_a_reference_model_beside_reference_log_likelihoods_is_refused_even_if_only_some_data_has_them(tmp_path, data):
    model = tiny.causal_lm()
    for train, held_out in ((with_ref_logps(data, model), data), (data, with_ref_logps(data, model))):
        with pytest.raises(ValueError, match=r"ref_model is given, but the (train|eval) data has ref_logps"):
            trainer(tmp_path, train, model, ref_model=tiny.causal_lm(seed=1), eval_dataset=held_out)


def test_log_likelihoods_are_precomputed_for_the_data_that_has_none(tmp_path, data):
    given = with_ref_logps(data, tiny.causal_lm(seed=1))
    t = trainer(tmp_path, given, eval_dataset=data, precompute_ref_log_probs=True)
    assert t.ref_model is None
    assert t.train_dataset["ref_logps"][:] == given["ref_logps"][:]
    for found, row in zip(t.eval_dataset["ref_logps"][:], with_ref_logps(data, tiny.causal_lm())["ref_logps"][:], strict=True):
        assert found == pytest.approx(row, rel=1e-4)


def test_data_whose_reference_has_gone_cannot_be_evaluated(tmp_path, data):
    t = trainer(tmp_path, data, precompute_ref_log_probs=True)
    t.train()
    with pytest.raises(ValueError, match=r"no ref_logps.*hand it to the trainer as eval_dataset"):
        t.evaluate(data)
    assert t.evaluate(with_ref_logps(data, tiny.causal_lm()))["eval_loss"] > 0


def test_reference_free(tmp_path, data):
    t = trainer(tmp_path, data, reference_free=True, beta=0.05)
    assert t.ref_model is None
    loss, _ = step(t, list(t.train_dataset))
    model = tiny.causal_lm()
    each = [eager_objective("contrastive", 0.05 * eager_logps(model, row), torch.tensor(row["scores"])) for row in data]
    torch.testing.assert_close(loss, (sum(each) / len(each)).detach(), rtol=1e-4, atol=1e-6)


def test_a_reference_that_training_would_move_is_refused(tmp_path, data):
    import peft

    base = tiny.causal_lm()
    with pytest.raises(ValueError, match="ref_model shares 8 trained parameters with the model"):
        trainer(tmp_path, data, peft.get_peft_model(base, lora()), ref_model=base)


def test_a_reference_may_share_what_is_frozen(tmp_path, data):
    model, reference = tiny.causal_lm(), tiny.causal_lm(seed=1)
    model.model.embed_tokens.requires_grad_(False)
    reference.model.embed_tokens.weight = model.model.embed_tokens.weight
    trainer(tmp_path, data, model, ref_model=reference)


def test_the_reference_follows_when_asked_to(tmp_path, data):
    t = trainer(
        tmp_path, data, max_steps=2, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.25, learning_rate=1e-2
    )
    before = t.ref_model.lm_head.weight.clone()
    t.train()
    torch.testing.assert_close(t.ref_model.lm_head.weight, before.lerp(t.model.lm_head.weight, 0.25))


@pytest.mark.parametrize("adapter", [False, True])
def test_a_reference_that_follows_goes_on_from_a_checkpoint(tmp_path, data, adapter):
    options = dict(
        max_steps=6, save_strategy="steps", save_steps=4, sync_ref_model=True, ref_model_sync_steps=2, learning_rate=1e-2
    )

    def model():
        if not adapter:
            return tiny.causal_lm()
        import peft

        torch.manual_seed(0)
        return peft.get_peft_model(tiny.causal_lm(), lora())

    whole = trainer(tmp_path, data, model(), **options)
    whole.train()
    resumed = trainer(tmp_path, data, model(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for a, b in ((whole.model, resumed.model), (whole.ref_model, resumed.ref_model)):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(p, q)


def test_only_a_reference_that_follows_is_in_the_checkpoints(tmp_path, data):
    from larpo.modeling.reference_model import REFERENCE_FILE

    options = dict(save_strategy="steps", save_steps=1)
    trainer(tmp_path, data, **options).train()
    assert (tmp_path / "checkpoint-1" / "model.safetensors").exists()
    assert not (tmp_path / "checkpoint-1" / REFERENCE_FILE).exists()
    with pytest.raises(ValueError, match=f"holds no {REFERENCE_FILE}.*sync_ref_model"):
        trainer(tmp_path, data, sync_ref_model=True, max_steps=2, **options).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_with_lora_the_reference_is_the_model_without_it(tmp_path, data, targets):
    t = trainer(tmp_path, data, peft_config=lora(target_modules=targets), beta=0.3)
    assert t.ref_model is None
    plain = copy.deepcopy(as_trained(t.model))
    plain.forward = type(plain).forward.__get__(plain)
    expected = eager_loss(plain, tiny.causal_lm(), data, beta=0.3)
    expected_gradients = gradients(plain, expected)
    loss, found = step(t, list(t.train_dataset))
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-6)
    assert expected.detach() != pytest.approx(eager_loss(tiny.causal_lm(), tiny.causal_lm(), data, beta=0.3).item(), rel=1e-3)
    assert_same_gradients(found, expected_gradients)


def test_lora_with_gradient_checkpointing_trains_the_adapter_only(tmp_path, data):
    t = trainer(tmp_path, data, peft_config=lora(), gradient_checkpointing=True, max_steps=2, learning_rate=1e-2)
    before = {name: p.detach().clone() for name, p in t.model.named_parameters()}
    t.train()
    changed = {name for name, p in t.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_" in name for name in changed)


def test_a_model_with_an_adapter_keeps_it_in_the_reference(tmp_path, data):
    import peft

    t = trainer(tmp_path, data, as_trained(peft.get_peft_model(tiny.causal_lm(), lora())))
    loss, _ = step(t, list(t.train_dataset))
    assert loss.item() == pytest.approx(sum(math.log(len(row["scores"])) for row in data) / len(data), rel=1e-5)
    base = [m.base_model.model.model.embed_tokens.weight for m in (t.ref_model, t.model)]
    assert base[0] is base[1]

"""Models as users have them: by name, in half precision, with dropout, with adapters; and what is left of them afterwards."""

import contextlib
import math
import pickle

import pytest
import torch
import transformers
from datasets import Dataset

from larpo.modeling.policy import accepts_rows
from larpo.modeling.reference_model import without_dropout
from larpo.scoring import score_lists
from tests.helpers import tiny
from tests.helpers.trainers import lora, loss_at_start, step, trainer


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """A folder with a model in bf16, as most are published."""
    folder = tmp_path_factory.mktemp("named")
    tiny.save(folder, dtype=torch.bfloat16)
    return str(folder)


def test_a_model_given_by_name_is_trained_in_float32(tmp_path, data, named):
    """In bf16 an update of 1e-6 is rounded away."""
    t = trainer(tmp_path, data, named, ref_model=named, learning_rate=1e-6, max_steps=3)
    before = {name: p.detach().clone() for name, p in t.model.named_parameters()}
    assert {p.dtype for p in (*t.model.parameters(), *t.ref_model.parameters())} == {torch.float32}
    t.train()
    changed = sum((p != before[name]).sum().item() for name, p in t.model.named_parameters())
    assert changed > 0.5 * sum(p.numel() for p in before.values())


@pytest.mark.parametrize(("name", "dtype"), [("dtype", "bfloat16"), ("torch_dtype", torch.bfloat16), ("dtype", "auto")])
def test_a_dtype_that_is_asked_for_is_taken(tmp_path, data, named, name, dtype):
    with pytest.warns(UserWarning, match="trained in bfloat16"):
        t = trainer(tmp_path, data, named, model_init_kwargs={name: dtype})
    assert t.model.dtype == torch.bfloat16


def test_weights_in_half_precision_are_warned_of_with_what_to_do(tmp_path, data):
    with pytest.warns(UserWarning, match=r"trained in bfloat16.*learning_rate=0.001.*dtype=float32.*bf16=True"):
        trainer(tmp_path, data, tiny.causal_lm(dtype=torch.bfloat16))


def test_a_frozen_model_in_half_precision_is_not_warned_of(tmp_path, data, unwarned):
    trainer(tmp_path, data, tiny.causal_lm(dtype=torch.bfloat16), peft_config=lora())  # its adapter is in float32


def test_bf16_autocast(tmp_path, data, monkeypatch):
    t = trainer(tmp_path, data, bf16=True, max_steps=2)
    t.train()
    assert all(math.isfinite(entry["loss"]) for entry in t.state.log_history if "loss" in entry)
    assert not torch.is_autocast_enabled("cpu")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    exact = trainer(tmp_path, data, max_steps=2)
    exact.train()
    assert t.state.log_history[0]["loss"] == pytest.approx(exact.state.log_history[0]["loss"], abs=0.02)


def test_a_model_in_bf16(tmp_path, data):
    t = trainer(tmp_path, data, tiny.causal_lm(dtype=torch.bfloat16), max_steps=2)
    t.train()
    assert t.state.log_history[0]["loss"] == pytest.approx(loss_at_start(t, data), abs=0.02)


def test_dropout_is_off_unless_asked_for(tmp_path, data):
    model = tiny.causal_lm("gpt2", resid_pdrop=0.5, attn_pdrop=0.5)
    t = trainer(tmp_path, data, model, beta=0.3)
    examples = list(t.train_dataset)
    assert torch.equal(step(t, examples)[0], step(t, examples)[0])
    t = trainer(tmp_path, data, tiny.causal_lm("gpt2", resid_pdrop=0.5), beta=0.3, disable_dropout=False)
    assert not torch.equal(step(t, examples)[0], step(t, examples)[0])


def test_attention_dropout_that_is_no_module_is_off_too(tmp_path, data):
    t = trainer(tmp_path, data, tiny.causal_lm(attention_dropout=0.5), beta=0.3)
    examples = list(t.train_dataset)
    assert torch.equal(step(t, examples)[0], step(t, examples)[0])


FLOAT_DROPOUT = {
    "opt": dict(dropout=0.5, layerdrop=0.5, word_embed_proj_dim=32, ffn_dim=48),
    "xglm": dict(dropout=0.5, d_model=32, attention_heads=4, num_layers=1, ffn_dim=32),
    "biogpt": dict(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5),
    "bloom": dict(n_layer=1, n_head=4, hidden_dropout=0.5),
}


@pytest.mark.parametrize("model_type", FLOAT_DROPOUT)
def test_dropout_that_is_a_number_of_a_module_is_off(model_type):
    model = tiny.causal_lm(model_type, **FLOAT_DROPOUT[model_type]).train()
    ids = torch.randint(3, tiny.VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    without_dropout(model)
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_model_of_which_nothing_is_trained_is_refused(tmp_path, data):
    model = tiny.causal_lm().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model requires grad"):
        trainer(tmp_path, data, model)
    assert trainer(tmp_path, None, model, eval_dataset=data).evaluate()["eval_loss"] > 0


def test_prompt_learning_is_refused(tmp_path, data):
    import peft

    with pytest.raises(ValueError, match="prompt learning"):
        trainer(tmp_path, data, peft_config=peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


def test_an_adapter_on_an_adapter_is_refused(tmp_path, data):
    import peft

    with pytest.raises(ValueError, match="already"):
        trainer(tmp_path, data, peft.get_peft_model(tiny.causal_lm(), lora()), peft_config=lora())


def test_lists_beyond_the_models_positions_are_warned_of(tmp_path, data, unwarned):
    trainer(tmp_path, data, tiny.causal_lm("gpt2", n_positions=48))
    long = Dataset.from_list([{"prompt": "the cat " * 30, "completions": [" a", " dog ran"], "scores": [1.0, 0.0]}])
    with pytest.warns(UserWarning, match=r"up to \d+ tokens, the model has positions for 48; .*max_length"):
        trainer(tmp_path, long, tiny.causal_lm("gpt2", n_positions=48))


@pytest.mark.parametrize("ids", [([5], [[200], [3]]), ([96], [[4], [3]])])
def test_tokens_beyond_the_vocabulary_are_refused(tmp_path, ids):
    row = {"prompt": "a", "completions": ["b", "c"], "scores": [1.0, 0.0], "prompt_ids": ids[0], "completion_ids": ids[1]}
    with pytest.raises(ValueError, match=r"train data holds the token (200|96), the model's vocabulary has 96"):
        trainer(tmp_path, Dataset.from_list([row]))


def test_the_model_still_generates_and_answers_as_before(tmp_path, data):
    model = tiny.causal_lm()
    ids = torch.tensor([[5, 6, 7]])
    before = model(input_ids=ids).logits
    trainer(tmp_path, data, model)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape[0] == 1


def test_a_second_trainer_on_the_same_model_goes_on(tmp_path, data):
    model = tiny.causal_lm()
    for _ in range(3):
        t = trainer(tmp_path, data, model, bf16=True, max_steps=1)
        t.train()
        assert t.state.log_history[0]["loss"] == pytest.approx(loss_at_start(t, data), abs=0.02)


def test_a_base_model_that_was_scored_can_be_given_an_adapter(tmp_path, data):
    from larpo.modeling.policy import Policy, attach

    model = tiny.causal_lm()
    attach(model, Policy(model))
    t = trainer(tmp_path, data, model, peft_config=lora(), max_steps=2, learning_rate=1e-2)
    t.train()
    assert any("lora_B" in name and p.abs().sum() > 0 for name, p in t.model.named_parameters())


def test_saved_models_load_with_transformers(tmp_path, data):
    from transformers import AutoModelForCausalLM

    t = trainer(tmp_path, data, max_steps=1)
    t.train()
    t.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(loaded.lm_head.weight, t.model.lm_head.weight.detach())


class Stops(transformers.TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        raise RuntimeError("full disk")


@pytest.mark.parametrize("fails", [False, True])
def test_after_training_the_models_are_what_they_were_but_for_their_weights(tmp_path, data, fails):
    model, reference = tiny.causal_lm(), tiny.causal_lm(seed=1)
    before = set(vars(model)), set(vars(reference))
    t = trainer(tmp_path, data, model, ref_model=reference, bf16=True, callbacks=[Stops()] if fails else None)
    with pytest.raises(RuntimeError, match="full disk") if fails else contextlib.nullcontext():
        t.train()
    assert not accepts_rows(model) and not accepts_rows(reference)
    left = {name for name in vars(model) if name not in before[0]}
    assert not {name for name in left if "larpo" in name or "forward" in name or "prepared" in name}
    assert not {name for name in vars(reference) if name not in before[1]}
    assert model(input_ids=torch.tensor([[5, 6]])).logits.dtype == torch.float32
    pickle.dumps(model)


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"candidate_micro_batch_size": 2}])
def test_a_trained_trainer_evaluates_steps_and_trains_again(tmp_path, data, options):
    kept = trainer(tmp_path, data, eval_dataset=data, eval_strategy="steps", eval_steps=1, **options)
    kept.train()
    during = [entry["eval_loss"] for entry in kept.state.log_history if "eval_loss" in entry]
    assert kept.evaluate()["eval_loss"] == during[-1]  # with the same autocast
    assert not accepts_rows(kept.model)
    batch = next(iter(kept.get_eval_dataloader()))
    assert kept.compute_loss(kept.model, batch).isfinite()
    kept.args.max_steps = 2
    kept.train()
    assert kept.state.global_step == 2 and not accepts_rows(kept.model)


def test_a_later_trainer_of_transformers_keeps_its_columns(tmp_path, data):
    t = trainer(tmp_path / "lists", data)
    t.train()
    tokens = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [5, 6, 7], "unused": 1}] * 4)
    arguments = transformers.TrainingArguments(
        str(tmp_path / "tokens"), max_steps=1, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
    )
    batch = next(iter(transformers.Trainer(t.model, arguments, train_dataset=tokens).get_train_dataloader()))
    assert set(batch) == {"input_ids", "labels"}


def test_scoring_leaves_the_model_as_it_was(data):
    model = tiny.causal_lm()
    score_lists(model, data, tiny.tokenizer(), progress=False)
    assert not accepts_rows(model)

"""What users bring along from other trainers: models by name, settings, adapters, data sets of all kinds."""

import contextlib
import copy
import math
import pickle
import warnings

import pytest
import torch

for package in ("transformers", "accelerate", "datasets"):
    pytest.importorskip(package)
import transformers
from datasets import Dataset

from larpo.modeling.policy import accepts_rows
from larpo.modeling.reference_model import without_dropout
from larpo.scoring import score_lists
from larpo.trainer import LarPOTrainer
from tests.helpers import tiny
from tests.larpo.test_trainer import config, eager_logps, eager_loss, lora, moved, own_precision, step, trainer  # noqa: F401


@pytest.fixture(scope="module")
def data():
    return Dataset.from_list(tiny.lists(6, m=None, seed=3))


@pytest.fixture
def unwarned():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        yield


def with_ref_logps(data, model):
    with torch.no_grad():
        return data.map(lambda row: {"ref_logps": eager_logps(model, row).tolist()})


def losses(t):
    return [entry["loss"] for entry in t.state.log_history if "loss" in entry]


# --- models given by name ----------------------------------------------------------------------------------------


@pytest.fixture
def named(tmp_path):
    """A folder with a model in bf16, as most are published."""
    tiny.causal_lm(dtype=torch.bfloat16).save_pretrained(tmp_path / "named")
    tiny.tokenizer().save_pretrained(tmp_path / "named")
    return str(tmp_path / "named")


def test_a_model_given_by_name_is_trained_in_float32(tmp_path, data, named):
    """In bf16 an update of 1e-6 is rounded away."""
    t = trainer(tmp_path, data, named, ref_model=named, learning_rate=1e-6, max_steps=3)
    before = {name: p.detach().clone() for name, p in t.model.named_parameters()}
    assert {p.dtype for p in (*t.model.parameters(), *t.ref_model.parameters())} == {torch.float32}
    t.train()
    changed = sum((p != before[name]).sum().item() for name, p in t.model.named_parameters())
    assert changed > 0.5 * sum(p.numel() for p in before.values())


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "auto"])
def test_a_dtype_that_is_asked_for_is_taken(tmp_path, data, named, name, dtype):
    with pytest.warns(UserWarning, match="trained in bfloat16"):
        t = trainer(tmp_path, data, named, model_init_kwargs={name: dtype})
    assert t.model.dtype == torch.bfloat16


def test_weights_in_half_precision_are_warned_of_with_what_to_do(tmp_path, data):
    with pytest.warns(UserWarning, match=r"trained in bfloat16.*learning_rate=0.001.*dtype=float32.*bf16=True"):
        trainer(tmp_path, data, tiny.causal_lm(dtype=torch.bfloat16))


def test_a_frozen_model_in_half_precision_is_not_warned_of(tmp_path, data, unwarned):
    pytest.importorskip("peft")
    trainer(tmp_path, data, tiny.causal_lm(dtype=torch.bfloat16), peft_config=lora())  # its adapter is in float32


# --- the loss ----------------------------------------------------------------------------------------------------


class Squares(LarPOTrainer):
    def list_loss(self, logps, ref_logps, inputs):
        return ((logps - ref_logps - inputs["relevance"]) ** 2).mean(), logps - ref_logps


@pytest.mark.parametrize("size", [1, 3])
def test_a_loss_of_ones_own_is_minimised_in_micro_batches_too(tmp_path, data, size):
    found = []
    for micro in (None, size):
        model = tiny.causal_lm()
        args = config(tmp_path, candidate_micro_batch_size=micro)
        t = Squares(moved(model), model, args, train_dataset=data, processing_class=tiny.tokenizer())
        found.append(step(t, list(t.train_dataset)))
    (loss, gradients), (loss_in_slices, gradients_in_slices) = found
    assert loss > 1
    torch.testing.assert_close(loss_in_slices, loss.detach(), rtol=1e-5, atol=0)
    largest = max(g.abs().max() for g in gradients.values())
    for name, g in gradients.items():
        torch.testing.assert_close(gradients_in_slices[name], g, rtol=1e-3, atol=1e-5 * largest.item())


def test_a_step_of_ones_own_that_micro_batches_would_not_take_is_refused(tmp_path, data):
    class Mine(LarPOTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    args = config(tmp_path, candidate_micro_batch_size=2)
    with pytest.raises(ValueError, match="does not call compute_loss"):
        Mine(tiny.causal_lm(), None, args, train_dataset=data, processing_class=tiny.tokenizer())


# --- the model ---------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("options", [dict(use_dora=True), dict(lora_bias=True)])
def test_an_adapter_on_the_head_that_needs_logits_trains_beside_its_base(tmp_path, data, options):
    """The first forward is the reference's, with the adapter off: what holds there need not hold with it on."""
    pytest.importorskip("peft")
    with pytest.warns(UserWarning, match="trained from its logits"):
        t = trainer(tmp_path, data, peft_config=lora(target_modules=["q_proj", "lm_head"], **options), beta=0.3)
        generator = torch.Generator().manual_seed(0)
        for p in t.model.parameters():
            if p.requires_grad:
                p.data += torch.randn(p.shape, generator=generator) * 0.1
        plain = copy.deepcopy(t.model)
        plain.forward = type(plain).forward.__get__(plain)
        loss, _ = step(t, list(t.train_dataset))
    torch.testing.assert_close(loss, eager_loss(plain, tiny.causal_lm(), data, beta=0.3).detach(), rtol=1e-4, atol=1e-6)


def test_a_compiled_model_keeps_the_fused_head(tmp_path, data, unwarned, monkeypatch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # where transformers leaves the next one, to be put back
    found = []
    for options in (dict(), dict(torch_compile=True, torch_compile_backend="eager")):
        t = trainer(tmp_path, data, tiny.causal_lm(num_hidden_layers=1), reference_free=True, learning_rate=1e-2, **options)
        t.train()
        found.append((losses(t), t.model.lm_head.weight.detach()))
    assert hasattr(t.model_wrapped, "_orig_mod"), "it is compiled"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "and that came to something"
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=1e-4)


def test_a_model_of_which_nothing_is_trained_is_refused(tmp_path, data):
    model = tiny.causal_lm().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model requires grad"):
        trainer(tmp_path, data, model)
    assert trainer(tmp_path, None, model, eval_dataset=data).evaluate()["eval_loss"] > 0


def test_a_reference_that_training_would_move_is_refused(tmp_path, data):
    peft = pytest.importorskip("peft")
    base = tiny.causal_lm()
    with pytest.raises(ValueError, match="ref_model shares 8 trained parameters with the model"):
        trainer(tmp_path, data, peft.get_peft_model(base, lora()), ref_model=base)


def test_a_reference_may_share_what_is_frozen(tmp_path, data):
    model, reference = tiny.causal_lm(), tiny.causal_lm(seed=1)
    model.model.embed_tokens.requires_grad_(False)
    reference.model.embed_tokens.weight = model.model.embed_tokens.weight
    trainer(tmp_path, data, model, ref_model=reference)


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


# --- data sets ---------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("options", [dict(), dict(precompute_ref_log_probs=True), dict(reference_free=True)], ids=str)
def test_data_as_it_comes_can_be_evaluated_and_predicted(tmp_path, data, options):
    t = trainer(tmp_path, data, moved(tiny.causal_lm()), eval_dataset=data, **options)
    expected = t.evaluate()
    for found in (t.evaluate(data), t.evaluate(data.to_list()), t.evaluate(t.eval_dataset)):
        assert {k: v for k, v in found.items() if "ndcg" in k or "loss" in k} == {
            k: v for k, v in expected.items() if "ndcg" in k or "loss" in k
        }
    assert t.evaluate({"one": data, "two": data})["eval_two_loss"] == expected["eval_loss"]
    assert t.predict(data).metrics["test_loss"] == expected["eval_loss"]


def test_data_whose_reference_has_gone_cannot_be_evaluated(tmp_path, data):
    t = trainer(tmp_path, data, precompute_ref_log_probs=True)
    t.train()
    with pytest.raises(ValueError, match=r"no ref_logps.*hand it to the trainer as eval_dataset"):
        t.evaluate(data)
    assert t.evaluate(with_ref_logps(data, tiny.causal_lm()))["eval_loss"] > 0


def test_the_best_model_can_be_chosen_by_a_metric_of_order_before_there_is_one(tmp_path, data):
    t = trainer(
        tmp_path, data, eval_dataset=data, max_steps=4, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="kendall_tau", warmup_steps=2, learning_rate=1e-2,
    )  # fmt: skip
    t.train()
    taus = [entry["eval_kendall_tau"] for entry in t.state.log_history if "eval_kendall_tau" in entry]
    assert taus[0] == 0.0 and len(taus) == 4
    assert t.state.best_metric == max(taus) > 0


def test_data_without_any_order_is_warned_of(tmp_path):
    tied = Dataset.from_list([row | {"scores": [0.5] * 4} for row in tiny.lists(3)])
    with pytest.warns(UserWarning, match="no list of the train data has two scores that differ"):
        trainer(tmp_path, tied)


def test_one_list_with_an_order_is_enough(tmp_path, unwarned):
    rows = tiny.lists(3)
    trainer(tmp_path, Dataset.from_list([rows[0], rows[1] | {"scores": [0.5] * 4}, rows[2] | {"scores": [0.5] * 4}]))


def test_lists_of_one_length_can_come_together(tmp_path):
    rows = tiny.lists(64, m=None, seed=3)
    t = trainer(tmp_path, Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows), max_steps=2,
                train_sampling_strategy="group_by_length")  # fmt: skip
    t.train()
    assert math.isfinite(t.evaluate()["eval_loss"]) and math.isfinite(t.evaluate(Dataset.from_list(rows))["eval_loss"])
    lengths = [sum(len(row["prompt_ids"]) + len(c) for c in row["completion_ids"]) for row in t.train_dataset]
    assert t.train_dataset["length"][:] == lengths
    order = list(t._get_train_sampler())
    batches = [[lengths[i] for i in order[a : a + 2]] for a in range(0, 64, 2)]
    apart = sum(max(batch) - min(batch) for batch in batches)
    at_random = sum(abs(a - b) for a in lengths for b in lengths) / 64 / 63 * 32
    assert apart < at_random / 2


class Processor:
    """As transformers.ProcessorMixin: text goes to the tokenizer in it, the rest elsewhere."""

    def __init__(self, tokenizer, chat_template=None):
        self.tokenizer, self.chat_template = tokenizer, chat_template

    def __call__(self, images=None, text=None):
        raise AssertionError("text alone goes to the tokenizer")


TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)


def test_of_a_processor_the_tokenizer_is_taken(tmp_path, data):
    found = []
    for processing_class in (tiny.tokenizer(), Processor(tiny.tokenizer())):
        t = LarPOTrainer(tiny.causal_lm(), None, config(tmp_path), train_dataset=data, processing_class=processing_class)
        found.append((t.train_dataset.to_list(), t.evaluate(data)["eval_loss"]))
    assert found[0] == found[1] and t.processing_class is processing_class


def test_a_processor_brings_its_chat_template():
    from larpo.data.tokenization import tokenize_row

    row = {"prompt": [{"role": "user", "content": "a cat"}], "scores": [1.0],
           "completions": [[{"role": "assistant", "content": "the dog"}]]}  # fmt: skip
    own = copy.deepcopy(tiny.tokenizer())
    own.chat_template = TEMPLATE
    assert tokenize_row(row, Processor(tiny.tokenizer(), TEMPLATE)) == tokenize_row(row, own)
    assert tiny.tokenizer().chat_template is None


def test_what_tokenises_nothing_is_refused(tmp_path, data):
    for processing_class in ("a-name", Processor(None)):
        with pytest.raises(TypeError, match=r"the tokenizer must be one of transformers, or a processor.*got (str|Processor)"):
            LarPOTrainer(tiny.causal_lm(), None, config(tmp_path), train_dataset=data, processing_class=processing_class)


def test_splits_are_evaluated_each_and_not_trained_on_together(tmp_path, data):
    from datasets import DatasetDict

    splits = DatasetDict(train=data, test=data.select(range(2)))
    with pytest.raises(TypeError, match="DatasetDict with the splits train, test: choose one"):
        trainer(tmp_path, splits)
    found = trainer(tmp_path, data, eval_dataset=splits).evaluate()
    assert found["eval_test_loss"] != found["eval_train_loss"]


# --- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        dict(eval_on_start=True),
        dict(eval_accumulation_steps=1),
        dict(activation_checkpointing=True),
        dict(torch_empty_cache_steps=1, dataloader_num_workers=1),
        dict(debug="underflow_overflow"),
    ],
    ids=str,
)
def test_settings_of_how_a_run_is_computed_change_nothing(tmp_path, data, options):
    found = []
    for own in ({}, options):
        t = trainer(tmp_path, data, eval_dataset=data, max_steps=2, learning_rate=1e-2, **own)
        t.train()
        found.append([*losses(t), t.evaluate()["eval_loss"]])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_an_adapter_trains_with_checkpoints_of_activations(tmp_path, data):
    pytest.importorskip("peft")
    found = []
    for own in ({}, dict(activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True})):
        t = trainer(tmp_path, data, peft_config=lora(), max_steps=2, learning_rate=1e-1, **own)
        t.train()
        found.append(losses(t))
    assert found[1] == pytest.approx(found[0], rel=1e-5) and found[0][1] != found[0][0]


def test_an_evaluation_is_of_every_list_when_training_drops_its_last_batch(tmp_path, data):
    t = trainer(tmp_path, data, eval_dataset=data, dataloader_drop_last=True, per_device_eval_batch_size=4)
    expected = trainer(tmp_path, data, eval_dataset=data, per_device_eval_batch_size=4).evaluate()["eval_loss"]
    for found in (t.evaluate(), t.evaluate(data), t.predict(data).metrics):
        assert next(value for name, value in found.items() if name.endswith("_loss")) == expected
    assert len(t.get_train_dataloader()) == 3 and t.args.dataloader_drop_last


def test_workers_that_persist_evaluate_the_data_they_are_given(tmp_path, data):
    t = trainer(tmp_path, data, eval_dataset=data, dataloader_persistent_workers=True, dataloader_num_workers=1)
    whole, part = t.evaluate()["eval_loss"], t.evaluate(data.select(range(2)))["eval_loss"]
    assert part != whole
    assert t.evaluate(data.select([3]))["eval_loss"] not in (whole, part) and t.evaluate()["eval_loss"] == whole


def test_noise_on_embeddings_is_the_same_in_micro_batches_and_not_in_the_reference(tmp_path, data):
    found = []
    for micro in (None, 2):
        t = trainer(tmp_path, data, neftune_noise_alpha=5.0, candidate_micro_batch_size=micro, max_steps=2)
        t.train()
        assert t.evaluate(data)["eval_loss"] > 0
        found.append([entry["loss"] for entry in t.state.log_history if "loss" in entry])
    without = trainer(tmp_path, data, max_steps=2)
    without.train()
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[0][0] != pytest.approx(losses(without)[0], rel=1e-2), "with noise policy and reference differ at the start"


def test_a_checkpoint_named_in_the_arguments_is_gone_on_from(tmp_path, data):
    options = dict(max_steps=4, save_strategy="steps", save_steps=2)
    trainer(tmp_path, data, **options).train()
    t = trainer(tmp_path, data, **options, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    seen = []
    step_of, t.training_step = t.training_step, lambda *args, **kwargs: seen.append(1) or step_of(*args, **kwargs)
    t.train()
    assert len(seen) == 2


# --- checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [False, True])
def test_a_reference_that_follows_goes_on_from_a_checkpoint(tmp_path, data, adapter):
    options = dict(max_steps=6, save_strategy="steps", save_steps=4, sync_ref_model=True, ref_model_sync_steps=2,
                   learning_rate=1e-2)  # fmt: skip

    def model():
        if not adapter:
            return tiny.causal_lm()
        peft = pytest.importorskip("peft")
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


# --- the model afterwards


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

"""LarPOTrainer against a plain eager implementation written here, and what users of trainers are hurt by."""

import copy
import math
import warnings

import pytest
import torch

for package in ("transformers", "accelerate", "datasets"):
    pytest.importorskip(package)
from datasets import Dataset

from larpo.config import LarPOConfig
from larpo.runs.checkpoints import last_whole_checkpoint
from larpo.trainer import LarPOTrainer
from tests.helpers import tiny

OBJECTIVES = ["pairwise", "contrastive", "listmle", "lambdarank"]


@pytest.fixture(autouse=True)
def own_precision(monkeypatch):
    """transformers hands bf16=True on through the environment, where the next trainer would find it."""
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state(reset_partial_state=False)


@pytest.fixture(scope="module")
def data():
    return Dataset.from_list(tiny.lists(6, m=None, seed=3))


def config(folder, **options):
    defaults = dict(
        output_dir=str(folder), report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no", learning_rate=1e-3,
        per_device_train_batch_size=2, per_device_eval_batch_size=2, max_steps=1, logging_steps=1, max_grad_norm=1e9,
    )  # fmt: skip
    return LarPOConfig(**{**defaults, **options})


def trainer(folder, data, model=None, *, ref_model=None, peft_config=None, eval_dataset=None, callbacks=None, **options):
    return LarPOTrainer(
        tiny.causal_lm() if model is None else model,
        ref_model,
        config(folder, **options),
        train_dataset=data,
        eval_dataset=eval_dataset,
        processing_class=tiny.tokenizer(),
        peft_config=peft_config,
        callbacks=callbacks,
    )


# --- the specification -----------------------------------------------------------------------------------------


def eager_logps(model, row):
    """Log-likelihood of every completion of a row, one after the other, as anybody would write it."""
    tokenizer = tiny.tokenizer()
    prompt = tokenizer(row["prompt"]).input_ids
    logps = []
    for completion in row["completions"]:
        ids = torch.tensor([prompt + tokenizer(completion).input_ids + [tokenizer.eos_token_id]])
        logp = model(input_ids=ids).logits.float().log_softmax(-1)
        logps.append(logp[0, len(prompt) - 1 : -1].gather(-1, ids[0, len(prompt) :, None]).sum())
    return torch.stack(logps)


def eager_objective(name, g, relevance):
    order = relevance.argsort(descending=True, stable=True)
    g, relevance = g[order], relevance[order]
    m = len(g)
    if m == 1:
        return g.sum() * 0
    if name == "pairwise":
        return -torch.nn.functional.logsigmoid(g[0] - g[-1])
    if name == "contrastive":
        return -g.log_softmax(0)[0]
    if name == "listmle":
        return -sum(g[i:].log_softmax(0)[0] for i in range(m))
    return -sum(
        torch.nn.functional.logsigmoid(g[i] - g[j]) for i in range(m) for j in range(i + 1, m) if relevance[i] > relevance[j]
    )


def eager_loss(model, reference, lists, objective="contrastive", beta=0.1, mean=False):
    losses = []
    for row in lists:
        logps, ref = eager_logps(model, row), eager_logps(reference, row).detach()
        if mean:
            n = torch.tensor([len(tiny.tokenizer()(c).input_ids) + 1 for c in row["completions"]])
            logps, ref = logps / n, ref / n
        losses.append(eager_objective(objective, beta * (logps - ref), torch.tensor(row["scores"])))
    return sum(losses) / len(losses)


def gradients(model, loss):
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))


def step(t, examples):
    """Loss and gradients of one training step of trainer t on these tokenised rows."""
    t.create_optimizer()
    t.current_gradient_accumulation_steps = 1
    t.model.zero_grad()
    loss = t.training_step(t.model, t.data_collator(examples))
    return loss, {name: p.grad for name, p in t.model.named_parameters() if p.requires_grad}


def moved(model, seed=5, scale=0.03):
    """A policy that has left its reference."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * scale)
    return other


def assert_same_gradients(ours, theirs):
    assert ours.keys() == theirs.keys()
    largest = max(g.abs().max() for g in theirs.values() if g is not None)
    for name, g in theirs.items():
        torch.testing.assert_close(ours[name], g, rtol=1e-3, atol=1e-5 * largest.item(), msg=lambda m, n=name: f"{n}: {m}")


def check_against_eager(tmp_path, data, objective="contrastive", *, model=None, eager=None, beta=0.3, mean=False, **options):
    reference = tiny.causal_lm() if model is None else copy.deepcopy(model)
    policy = moved(reference)
    expected = eager_loss(policy, reference, data, objective, beta, mean)
    expected_gradients = gradients(policy, expected)
    t = trainer(
        tmp_path, data, copy.deepcopy(policy), ref_model=reference, objective=objective, beta=beta, length_normalized=mean,
        **options,
    )  # fmt: skip
    loss, found = step(t, [t.train_dataset[i] for i in range(len(data))])
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-6)
    assert_same_gradients(found, expected_gradients)
    return t


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradient_are_eagers(tmp_path, data, objective):
    check_against_eager(tmp_path, data, objective)


@pytest.mark.parametrize("options", [dict(tie_word_embeddings=True), dict(model_type="gemma2", final_logit_softcapping=2.0)])
def test_loss_and_gradient_are_eagers_with_other_heads(tmp_path, data, options):
    check_against_eager(tmp_path, data, model=tiny.causal_lm(**options))


def test_loss_and_gradient_with_length_normalisation(tmp_path, data):
    check_against_eager(tmp_path, data, "listmle", mean=True)


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("mean", [False, True])
def test_candidate_micro_batches_give_the_gradient_of_whole_lists(tmp_path, data, size, mean):
    check_against_eager(tmp_path, data, "listmle", mean=mean, candidate_micro_batch_size=size)


class Saved:
    """Counts the bytes that autograd keeps for a backward, at their peak."""

    live = peak = 0

    def __init__(self, tensor):
        self.tensor = tensor
        Saved.live += tensor.numel() * tensor.element_size()
        Saved.peak = max(Saved.peak, Saved.live)

    def __del__(self):
        Saved.live -= self.tensor.numel() * self.tensor.element_size()


def test_candidate_micro_batches_keep_the_activations_of_one_slice(tmp_path):
    data = Dataset.from_list(tiny.lists(1, m=16))
    peaks = []
    for size in (None, 2):
        t = trainer(tmp_path, data, candidate_micro_batch_size=size)
        step(t, list(t.train_dataset))  # the check of the first batch is done
        Saved.live = Saved.peak = 0
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            step(t, list(t.train_dataset))
        peaks.append(Saved.peak)
    parameters = sum(p.numel() * 4 for p in t.model.parameters())  # saved too, as views
    assert (peaks[1] - parameters) < (peaks[0] - parameters) / 4, peaks


def test_gradient_checkpointing_gives_the_same_gradient(tmp_path, data):
    t = check_against_eager(tmp_path, data, gradient_checkpointing=True)
    assert t.args.gradient_checkpointing


def test_a_shared_prefix_gives_the_same_gradient(tmp_path, data):
    t = check_against_eager(tmp_path, data, share_prefix=True)
    assert t.data_collator.layout == "shared"


def test_a_shared_prefix_in_micro_batches_gives_the_same_gradient(tmp_path, data):
    check_against_eager(tmp_path, data, share_prefix=True, candidate_micro_batch_size=3)


def test_packed_rows_give_the_same_gradient(tmp_path, data, monkeypatch):
    monkeypatch.setattr(LarPOTrainer, "_layout", lambda self: "packed")
    check_against_eager(tmp_path, data)


def test_a_model_whose_hidden_states_cannot_be_used_trains_from_logits(tmp_path, data):
    model = tiny.causal_lm()
    model.lm_head = torch.nn.Sequential(model.lm_head, torch.nn.Hardtanh(-2.0, 2.0))
    model.get_output_embeddings = lambda: model.lm_head
    with pytest.warns(UserWarning, match="is trained from its logits.*not a torch.nn.Linear"):
        t = trainer(tmp_path, data, copy.deepcopy(model), ref_model=copy.deepcopy(model), beta=0.3)
        loss, found = step(t, [t.train_dataset[i] for i in range(len(data))])
    expected = eager_loss(model, model, data, beta=0.3)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-6)
    assert_same_gradients(found, gradients(model, expected))


def test_gradient_accumulation_averages(tmp_path, data):
    reference = tiny.causal_lm()
    policy = moved(reference)
    expected = gradients(policy, eager_loss(policy, reference, data.select(range(4))))
    t = trainer(tmp_path, data.select(range(4)), copy.deepcopy(policy), ref_model=reference, gradient_accumulation_steps=2,
                optim="sgd", learning_rate=1.0, lr_scheduler_type="constant")  # fmt: skip
    t.train()
    updates = {name: p.detach() - q for (name, p), q in zip(policy.named_parameters(), t.model.parameters(), strict=True)}
    assert_same_gradients(updates, expected)


# --- the reference ---------------------------------------------------------------------------------------------


def test_no_reference_means_the_policy_as_it_was_handed_over(tmp_path, data):
    model = moved(tiny.causal_lm())
    before = copy.deepcopy(model.state_dict())
    t = trainer(tmp_path, data, model, max_steps=3, learning_rate=1e-2)
    t.train()
    for name, p in t.ref_model.state_dict().items():
        assert torch.equal(p, before[name]), name
    assert not torch.equal(t.model.lm_head.weight, t.ref_model.lm_head.weight)
    assert t.state.log_history[0]["loss"] == pytest.approx(  # all scores are 0 at the first step
        sum(math.log(len(data[i]["scores"])) for i in t_first_batch(t)) / 2, rel=1e-4
    )


def t_first_batch(t):
    from torch.utils.data import RandomSampler

    generator = torch.Generator().manual_seed(t.args.seed)
    return list(RandomSampler(range(len(t.train_dataset)), generator=generator))[:2]


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


def test_a_model_can_be_evaluated_without_training(tmp_path, data):
    metrics = trainer(tmp_path, None, eval_dataset=data).evaluate()
    assert metrics["eval_loss"] > 0 and "eval_ndcg" in metrics


def test_reference_free(tmp_path, data):
    t = trainer(tmp_path, data, reference_free=True, beta=0.05)
    assert t.ref_model is None
    loss, _ = step(t, list(t.train_dataset))
    model = tiny.causal_lm()
    each = [eager_objective("contrastive", 0.05 * eager_logps(model, row), torch.tensor(row["scores"])) for row in data]
    torch.testing.assert_close(loss, (sum(each) / len(each)).detach(), rtol=1e-4, atol=1e-6)


def test_the_reference_follows_when_asked_to(tmp_path, data):
    t = trainer(tmp_path, data, max_steps=2, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.25,
                learning_rate=1e-2)  # fmt: skip
    before = t.ref_model.lm_head.weight.clone()
    t.train()
    torch.testing.assert_close(t.ref_model.lm_head.weight, before.lerp(t.model.lm_head.weight, 0.25))


# --- PEFT ------------------------------------------------------------------------------------------------------


def lora(**options):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"], **options})


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_with_lora_the_reference_is_the_model_without_it(tmp_path, data, targets):
    t = trainer(tmp_path, data, peft_config=lora(target_modules=targets), beta=0.3)
    assert t.ref_model is None
    generator = torch.Generator().manual_seed(0)
    for name, p in t.model.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.2
    plain = copy.deepcopy(t.model)
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
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny.causal_lm(), lora())
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2)
    t = trainer(tmp_path, data, model)
    loss, _ = step(t, list(t.train_dataset))
    assert loss.item() == pytest.approx(sum(math.log(len(row["scores"])) for row in data) / len(data), rel=1e-5)
    base = [m.base_model.model.model.embed_tokens.weight for m in (t.ref_model, t.model)]
    assert base[0] is base[1]


def test_prompt_learning_is_refused(tmp_path, data):
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="prompt learning"):
        trainer(tmp_path, data, peft_config=peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


def test_an_adapter_on_an_adapter_is_refused(tmp_path, data):
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="already"):
        trainer(tmp_path, data, peft.get_peft_model(tiny.causal_lm(), lora()), peft_config=lora())


# --- running it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_model_learns_to_rank_lists_it_has_not_seen(tmp_path, objective):
    held_out = Dataset.from_list(tiny.lists(24, m=4, seed=100))
    t = trainer(
        tmp_path, Dataset.from_list(tiny.lists(64, m=4, seed=1)), eval_dataset=held_out, objective=objective, max_steps=40,
        per_device_train_batch_size=8, per_device_eval_batch_size=24, learning_rate=5e-3, logging_steps=20,
    )  # fmt: skip
    before = t.evaluate()
    t.train()
    after = t.evaluate()
    assert before["eval_kendall_tau"] == 0  # as are all implicit scores: there is no order
    assert after["eval_ndcg"] > before["eval_ndcg"] + 0.05, (before["eval_ndcg"], after["eval_ndcg"])
    assert after["eval_kendall_tau"] > 0.3
    assert after["eval_rewards/accuracies"] > 0.7
    assert after["eval_loss"] < before["eval_loss"]


def test_what_is_logged(tmp_path, data):
    t = trainer(tmp_path, data, eval_dataset={"one": data, "two": data.select(range(2))}, max_steps=2, ndcg_k=2)
    t.train()
    names = {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "ndcg", "ndcg@2", "mrr",
             "kendall_tau", "list/size", "list/frac_tied", "logps/chosen", "logps/rejected", "tokens_per_second"}  # fmt: skip
    assert names <= t.state.log_history[1].keys()
    metrics = t.evaluate()
    assert {"eval_one_ndcg", "eval_two_rewards/margins", "eval_one_loss"} <= metrics.keys()


def test_tensorboard_shows_list_metrics(tmp_path, data, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer(
        tmp_path, data, eval_dataset=data, report_to="tensorboard", max_steps=2, eval_strategy="steps", eval_steps=2
    ).train()
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert {"train/rewards/margins", "train/ndcg", "eval/kendall_tau"} <= set(board.Tags()["scalars"])


def test_the_best_model_can_be_chosen_by_a_list_metric(tmp_path, data):
    t = trainer(
        tmp_path, data, eval_dataset=data, max_steps=2, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_ndcg", greater_is_better=True,
    )  # fmt: skip
    t.train()
    assert t.state.best_metric is not None


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
    assert t.state.log_history[0]["loss"] == pytest.approx(
        sum(math.log(len(data[i]["scores"])) for i in t_first_batch(t)) / 2, abs=0.02
    )


def test_only_some_candidates_of_a_list_can_be_trained_on(tmp_path):
    data = Dataset.from_list(tiny.lists(4, m=6))
    t = trainer(tmp_path, data, list_top=1, list_bottom=2)
    for row, found in zip(data, t.train_dataset, strict=True):
        ordered = sorted(row["scores"], reverse=True)
        assert found["scores"] == [ordered[0], ordered[-2], ordered[-1]]
        assert len(found["completion_ids"]) == 3


def test_a_batch_in_which_nothing_can_be_learned_still_steps(tmp_path):
    data = Dataset.from_list([{"prompt": "the cat", "completions": [" sat"], "scores": [1.0]} for _ in range(2)])
    t = trainer(tmp_path, data)
    t.train()
    assert t.state.log_history[0]["loss"] == 0.0


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
        assert t.state.log_history[0]["loss"] == pytest.approx(
            sum(math.log(len(data[i]["scores"])) for i in t_first_batch(t)) / 2, abs=0.02
        )


def test_prefix_sharing_that_cannot_be_had_says_why(tmp_path, data):
    with pytest.warns(UserWarning, match="share_prefix is off.*bloom"):
        t = trainer(tmp_path, data, tiny.causal_lm("bloom", n_layer=1, n_head=4), share_prefix=True)
    assert t.data_collator.layout == "padded"


def test_prefix_sharing_that_gives_other_numbers_falls_back(tmp_path, data, monkeypatch):
    from larpo.modeling import prefix_sharing

    right = prefix_sharing.prefix_masks
    monkeypatch.setattr(prefix_sharing, "prefix_masks", lambda *args: torch.zeros_like(right(*args)))
    with pytest.warns(UserWarning, match="share_prefix is off.*nats"):
        t = trainer(tmp_path, data, share_prefix=True)
    assert t.data_collator.layout == "padded"


def test_saved_models_load_with_transformers(tmp_path, data):
    from transformers import AutoModelForCausalLM

    t = trainer(tmp_path, data, max_steps=1)
    t.train()
    t.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(loaded.lm_head.weight, t.model.lm_head.weight.detach())


def test_the_callers_data_and_config_stay_as_they_are(tmp_path, data):
    before = data.to_list()
    args = config(tmp_path)
    described = args.to_json_string()
    tokenizer = tiny.tokenizer()
    LarPOTrainer(tiny.causal_lm(), None, args, train_dataset=data, processing_class=tokenizer)
    assert data.to_list() == before
    assert args.to_json_string() == described
    assert tokenizer.padding_side == "right"


# --- checkpoints -----------------------------------------------------------------------------------------------


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


# --- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(objective="dpo"), "objective must be one of"),
        (dict(objective="lambdarank", objective_options={"kk": 1}), "objective_options of 'lambdarank' may hold"),
        (dict(objective_options="{no json"), "objective_options must be a dict or JSON"),
        (dict(beta=0.0), "beta must be > 0"),
        (dict(max_length=16, max_prompt_length=16), "max_prompt_length must be below max_length"),
        (dict(max_length=0), "max_length must be None or an int >= 1"),
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


def test_nothing_is_warned_of_in_an_ordinary_run(tmp_path, data):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        trainer(tmp_path, Dataset.from_list(tiny.lists(4))).train()


def test_a_base_model_that_was_scored_can_be_given_an_adapter(tmp_path, data):
    from larpo.modeling.policy import Policy, attach

    model = tiny.causal_lm()
    attach(model, Policy(model))
    t = trainer(tmp_path, data, model, peft_config=lora(), max_steps=2, learning_rate=1e-2)
    t.train()
    assert any("lora_B" in name and p.abs().sum() > 0 for name, p in t.model.named_parameters())

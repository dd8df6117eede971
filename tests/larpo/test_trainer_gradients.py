"""LarPOTrainer's loss and gradient against a plain eager implementation, however candidates are run."""

import copy

import pytest
import torch
from datasets import Dataset

from larpo.trainer import LarPOTrainer
from tests.helpers import tiny
from tests.helpers.trainers import SGD, assert_same_gradients, eager_loss, gradients, lora, losses, moved, step, trainer

WAYS = {
    **{objective: dict(objective=objective) for objective in ("pairwise", "contrastive", "listmle", "lambdarank")},
    "tied embeddings": dict(model=dict(tie_word_embeddings=True)),
    "a soft cap": dict(model=dict(model_type="gemma2", final_logit_softcapping=2.0)),
    "means over tokens": dict(objective="listmle", length_normalized=True),
    "one candidate at a time": dict(objective="listmle", candidate_micro_batch_size=1),
    "means, three candidates at a time": dict(objective="listmle", length_normalized=True, candidate_micro_batch_size=3),
    "more candidates at a time than there are": dict(objective="listmle", candidate_micro_batch_size=100),
    "gradient checkpointing": dict(gradient_checkpointing=True),
    "shared prompts": dict(share_prefix=True),
    "shared prompts, three candidates at a time": dict(share_prefix=True, candidate_micro_batch_size=3),
    "packed rows": dict(),
}


@pytest.mark.parametrize("way", WAYS)
def test_loss_and_gradient_are_eagers(tmp_path, data, monkeypatch, way):
    layout = {"shared": "shared", "packed": "packed"}.get(way.split()[0], "padded")
    if layout == "packed":
        monkeypatch.setattr(LarPOTrainer, "_layout", lambda self: layout)
    options = {"objective": "contrastive", "beta": 0.3, "length_normalized": False} | WAYS[way]
    reference = tiny.causal_lm(**options.pop("model", {}))
    policy = moved(reference)
    loss = (options["objective"], options["beta"], options["length_normalized"])
    expected = eager_loss(policy, reference, data, *loss)
    expected_gradients = gradients(policy, expected)
    t = trainer(tmp_path, data, copy.deepcopy(policy), ref_model=reference, **options)
    loss, found = step(t, list(t.train_dataset))
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-6)
    assert_same_gradients(found, expected_gradients)
    assert t.data_collator.layout == layout


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


@pytest.mark.parametrize("options", [dict(use_dora=True), dict(lora_bias=True)])
def test_an_adapter_on_the_head_that_needs_logits_trains_beside_its_base(tmp_path, data, options):
    """The first forward is the reference's, with the adapter off: what holds there need not hold with it on."""
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


def test_gradient_accumulation_averages(tmp_path, data):
    reference = tiny.causal_lm()
    policy = moved(reference)
    expected = gradients(policy, eager_loss(policy, reference, data.select(range(4))))
    four = data.select(range(4))
    t = trainer(tmp_path, four, copy.deepcopy(policy), ref_model=reference, gradient_accumulation_steps=2, **SGD)
    t.train()
    updates = {name: p.detach() - q for (name, p), q in zip(policy.named_parameters(), t.model.parameters(), strict=True)}
    assert_same_gradients(updates, expected)


class Squares(LarPOTrainer):
    def list_loss(self, logps, ref_logps, inputs):
        return ((logps - ref_logps - inputs["relevance"]) ** 2).mean(), logps - ref_logps


def test_a_loss_of_ones_own_is_minimised_in_micro_batches_too(tmp_path, data):
    found = []
    for micro in (None, 1, 3):
        model = tiny.causal_lm()
        t = trainer(tmp_path, data, moved(model), Squares, ref_model=model, candidate_micro_batch_size=micro)
        found.append(step(t, list(t.train_dataset)))
    (loss, gradients), *in_slices = found
    assert loss > 1
    for loss_in_slices, gradients_in_slices in in_slices:
        torch.testing.assert_close(loss_in_slices, loss.detach(), rtol=1e-5, atol=0)
        assert_same_gradients(gradients_in_slices, gradients)


def test_a_step_of_ones_own_that_micro_batches_would_not_take_is_refused(tmp_path, data):
    class Mine(LarPOTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    with pytest.raises(ValueError, match="does not call compute_loss"):
        trainer(tmp_path, data, kind=Mine, candidate_micro_batch_size=2)


def test_noise_on_embeddings_is_the_same_in_micro_batches_and_not_in_the_reference(tmp_path, data):
    found = []
    for micro in (None, 2):
        t = trainer(tmp_path, data, neftune_noise_alpha=5.0, candidate_micro_batch_size=micro, max_steps=2)
        t.train()
        assert t.evaluate(data)["eval_loss"] > 0
        found.append(losses(t))
    without = trainer(tmp_path, data, max_steps=2)
    without.train()
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[0][0] != pytest.approx(losses(without)[0], rel=1e-2), "with noise policy and reference differ at the start"


def a_run(folder, data, **options):
    t = trainer(folder, data, eval_dataset=data, max_steps=2, learning_rate=1e-2, **options)
    t.train()
    return [*losses(t), t.evaluate()["eval_loss"]]


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory, data):
    return a_run(tmp_path_factory.mktemp("plain"), data)


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
def test_settings_of_how_a_run_is_computed_change_nothing(tmp_path, data, plain_run, options):
    assert a_run(tmp_path, data, **options) == pytest.approx(plain_run, rel=1e-5)


def test_an_adapter_trains_with_checkpoints_of_activations(tmp_path, data):
    found = []
    for own in ({}, dict(activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True})):
        t = trainer(tmp_path, data, peft_config=lora(), max_steps=2, learning_rate=1e-1, **own)
        t.train()
        found.append(losses(t))
    assert found[1] == pytest.approx(found[0], rel=1e-5) and found[0][1] != found[0][0]

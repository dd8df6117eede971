"""The last step from hidden states to logits, per architecture, and what catches one that is not as the table says."""

import peft
import pytest
import torch

from larpo.modeling import lm_heads
from tests.helpers import tiny
from tests.helpers.trainers import as_trained, lora

ARCHITECTURES = {
    "llama": {},
    "llama-tied": dict(tie_word_embeddings=True),
    "qwen2": {},
    "mistral": {},
    "gpt2": {},
    "gptj": {},  # bias on the head
    "phi": {},  # bias on the head
    "gemma2": dict(final_logit_softcapping=2.0),
    "cohere": dict(logit_scale=0.25),
    "granite": dict(logits_scaling=4.0),
    "hyperclovax": dict(logits_scaling=0.3),
}


@pytest.fixture(params=ARCHITECTURES)
def model(request):
    return tiny.causal_lm(request.param.removesuffix("-tied"), **ARCHITECTURES[request.param])


def ids(n=20):
    return torch.randint(3, tiny.VOCAB, (2, n), generator=torch.Generator().manual_seed(1))


def inputs():
    return {"input_ids": ids()}


def test_the_table_gives_the_models_own_logits(model):
    hidden = model.base_model(input_ids=ids()).last_hidden_state
    x, weight, bias = lm_heads.head_inputs(model, hidden.flatten(0, 1))
    ours = lm_heads.post_processing(model.config)(torch.nn.functional.linear(x, weight, bias))
    torch.testing.assert_close(ours, model(input_ids=ids()).logits.flatten(0, 1))
    assert lm_heads.check(model, inputs()) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_check_allows_for_rounding(model, dtype):
    assert lm_heads.check(model.to(dtype), inputs()) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [lm_heads.PostProcessing(1.1), lm_heads.PostProcessing(1.0, 1.0)])
def test_the_check_catches_a_factor_or_a_soft_cap_that_the_table_does_not_know(monkeypatch, wrong, dtype):
    model = tiny.causal_lm().to(dtype)
    monkeypatch.setattr(lm_heads, "post_processing", lambda config: wrong)
    assert "is off its logits by" in lm_heads.check(model, inputs())


def test_the_check_catches_a_layer_before_the_head():
    model = tiny.causal_lm()
    own = model.forward

    def forward(**inputs):
        out = own(**inputs)
        out.logits = model.lm_head(model.base_model(**inputs).last_hidden_state * 1.5)
        return out

    assert "is off its logits by" in lm_heads.check(model, inputs(), forward)


def test_hooks_of_the_head_are_run():
    """FSDP and DeepSpeed gather weights in them."""
    model = tiny.causal_lm()
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
    assert lm_heads.check(model, inputs()) is None
    assert "forward" not in vars(model.lm_head)


def test_the_check_reports_a_head_that_is_not_linear():
    model = tiny.causal_lm()

    class Head(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    model.lm_head = Head(model.lm_head)
    assert "not a torch.nn.Linear" in lm_heads.check(model, inputs())


def test_the_check_leaves_mode_and_gradients_alone():
    model = tiny.causal_lm().train()
    assert lm_heads.check(model, inputs()) is None
    assert model.training and all(p.grad is None for p in model.parameters())


class TestAdapters:
    def adapted(self, **config):
        torch.manual_seed(0)
        return as_trained(peft.get_peft_model(tiny.causal_lm(), lora(**config)))

    def test_lora_on_the_head_counts_and_is_trained(self):
        model = self.adapted(target_modules=["q_proj", "lm_head"])
        lm = lm_heads.causal_lm(model)
        assert lm_heads.check(lm, inputs()) is None
        hidden = lm.base_model(input_ids=ids()).last_hidden_state.flatten(0, 1)
        x, weight, bias = lm_heads.head_inputs(lm, hidden)
        ours = torch.nn.functional.linear(x, weight, bias)
        theirs = model(input_ids=ids()).logits.flatten(0, 1)
        torch.testing.assert_close(ours, theirs)
        upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
        parameters = [p for n, p in model.named_parameters() if "lm_head" in n and p.requires_grad]
        assert len(parameters) == 2
        for a, b in zip(*(torch.autograd.grad(z, parameters, upstream) for z in (ours, theirs)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

    def test_with_adapters_off_it_is_the_base_model(self):
        model = self.adapted(target_modules=["q_proj", "lm_head"])
        base = tiny.causal_lm()
        with model.disable_adapter():
            lm = lm_heads.causal_lm(model)
            assert lm_heads.check(lm, inputs()) is None
            hidden = lm.base_model(input_ids=ids()).last_hidden_state.flatten(0, 1)
            ours = torch.nn.functional.linear(*lm_heads.head_inputs(lm, hidden))
        torch.testing.assert_close(ours, base(input_ids=ids()).logits.flatten(0, 1))

    def test_a_head_that_peft_saves_whole_is_the_trained_copy(self):
        model = self.adapted(target_modules=["q_proj"], modules_to_save=["lm_head"])
        lm = lm_heads.causal_lm(model)
        trained = lm.get_output_embeddings().modules_to_save["default"].weight
        with torch.no_grad():
            trained.mul_(1.3)
        assert lm_heads.check(lm, inputs()) is None
        assert lm_heads.head_inputs(lm, torch.zeros(1, 32)).weight is trained
        with model.disable_adapter():
            assert lm_heads.check(lm, inputs()) is None
            assert lm_heads.head_inputs(lm, torch.zeros(1, 32)).weight is not trained

    def test_two_adapters_at_once(self):
        model = self.adapted(target_modules=["lm_head"])
        model.add_adapter("other", peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"]))
        model.base_model.set_adapter(["default", "other"])
        lm = lm_heads.causal_lm(as_trained(model, "lora_B.other"))
        assert lm_heads.check(lm, inputs()) is None

    def test_a_variant_of_lora_on_the_head_goes_through_logits(self):
        model = self.adapted(target_modules=["lm_head"], use_dora=True)
        assert "variant of LoRA" in lm_heads.check(lm_heads.causal_lm(model), inputs())

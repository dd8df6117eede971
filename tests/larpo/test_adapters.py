"""Training of PEFT adapters: the reference is the policy that was handed over, from the first step to the last."""

import copy
import math
import warnings

import peft
import pytest
import torch
from datasets import Dataset
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM

from larpo.modeling.adapter_start import compare, handed_over
from larpo.modeling.loading import load_causal_lm
from larpo.modeling.reference_policy import Way
from tests.helpers import tiny
from tests.helpers.trainers import as_trained, eager_logps, lora, trainer


@pytest.fixture(scope="module")
def data():
    return Dataset.from_list(tiny.lists(4, m=3, seed=3))


def biased():
    """A model whose layers have biases."""
    return tiny.causal_lm("qwen2")


def ref_logps(t):
    """What the reference says now of each row, by the trainer's own path."""
    t.model.train()
    inputs = t._prepare_inputs(t.data_collator(list(t.train_dataset)))
    with t._policies.attached():
        return t._ref_logps(t.model, inputs)


def policy_logps(t):
    with t._policies.attached():
        return t._slices.logps(t.model, t._prepare_inputs(t.data_collator(list(t.train_dataset)))).detach()


def eager(model, data):
    with torch.no_grad():
        return torch.cat([eager_logps(model, row) for row in data])


STARTS = {
    "pissa": dict(init_lora_weights="pissa"),
    "olora": dict(init_lora_weights="olora"),
    "all biases": dict(bias="all"),
    "biases of lora": dict(bias="lora_only"),
    "random and biases": dict(bias="all", init_lora_weights=False),
    "random": dict(init_lora_weights=False),
    "head beside": dict(modules_to_save=["lm_head"]),
    "tokens beside": dict(trainable_token_indices=[5, 6, 7]),
    "dora": dict(use_dora=True),
}


@pytest.mark.parametrize("options", STARTS.values(), ids=STARTS)
def test_the_reference_is_the_policy_handed_over_and_stays_so(tmp_path, data, options):
    expected = eager(biased(), data)
    t = trainer(tmp_path, data, biased(), peft_config=lora(**options), max_steps=6, learning_rate=3e-2)
    torch.testing.assert_close(ref_logps(t), expected, rtol=1e-5, atol=1e-3)
    t.train()
    torch.testing.assert_close(ref_logps(t), expected, rtol=1e-5, atol=1e-3)
    policy = policy_logps(t)
    assert (policy - expected).abs().max() > 0.05, "nothing was learned"


@pytest.mark.parametrize("options", [STARTS["pissa"], STARTS["all biases"]], ids=["pissa", "all biases"])
def test_precomputed_log_likelihoods_are_of_the_policy_handed_over(tmp_path, data, options):
    t = trainer(tmp_path, data, biased(), peft_config=lora(**options), precompute_ref_log_probs=True, max_steps=1)
    found = torch.tensor([x for row in t.train_dataset["ref_logps"][:] for x in row])
    torch.testing.assert_close(found, eager(biased(), data), rtol=1e-5, atol=1e-3)
    assert t.ref_model is None
    t.train()
    assert t.state.log_history[0]["loss"] == pytest.approx(math.log(3), abs=1e-3)


def test_a_held_reference_shares_what_is_frozen(tmp_path, data):
    t = trainer(tmp_path, data, biased(), peft_config=lora(bias="all"))
    q, r = (m.base_model.model.model.layers[0].self_attn.q_proj.base_layer for m in (t.model, t.ref_model))
    assert q.weight is r.weight and q.bias is not r.bias


def test_an_adapter_that_leaves_the_base_alone_needs_no_copy(tmp_path, data):
    t = trainer(tmp_path, data, biased(), peft_config=lora())
    assert t.reference.way is Way.ADAPTER_OFF and t.ref_model is None


def test_a_model_that_is_another_with_the_adapter_on_and_off_is_refused(tmp_path, data):
    replicated = lora(layer_replication=[[0, 2], [1, 2]])
    with pytest.raises(ValueError, match="another one than was handed over, whether the adapter is on or off"):
        trainer(tmp_path, data, peft_config=replicated)
    assert trainer(tmp_path, data, peft_config=replicated, ref_model=tiny.causal_lm()).reference.way is Way.MODEL


def test_a_reference_without_the_adapter_cannot_follow(tmp_path, data):
    for options in (STARTS["dora"], STARTS["random and biases"]):
        with pytest.raises(ValueError, match="sync_ref_model needs a reference model"):
            trainer(tmp_path, data, biased(), peft_config=lora(**options), sync_ref_model=True)


def test_the_start_is_checked_where_it_can_be_and_read_from_the_configuration_elsewhere():
    """ZeRO-3 has cut the weights by then."""
    ids = [1, 5, 9, 12, 7, 30]
    for options in STARTS.values():
        model = biased()
        before = handed_over(model, ids)
        model = peft.get_peft_model(model, lora(**options))
        checked, read = (compare(model, x, ids) for x in (before, None))
        assert checked.off_is_start == read.off_is_start, options
        assert bool(checked.trained_outside) == bool(read.trained_outside), options
        kept = ("lora_", "modules_to_save", "trainable_tokens_delta")
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert all(any(part in name for part in kept) for name in trained - {*checked.trained_outside}), options


# --- adapters that the trainer's forward would not train -----------------------------------------------------------


def test_an_activated_lora_is_refused(tmp_path, data):
    config = lora(alora_invocation_tokens=[12, 7])
    for given in (dict(peft_config=config), dict(model=peft.get_peft_model(tiny.causal_lm(), config))):
        with pytest.raises(ValueError, match="alora_invocation_tokens must be None"):
            trainer(tmp_path, data, **given)


def test_an_adapter_that_gets_no_gradient_is_refused(tmp_path, data, monkeypatch):
    """As an activated LoRA does, of whatever name."""
    monkeypatch.setattr("larpo.modeling.adapters._refuse_kind", lambda config: None)
    row = data[0] | {"prompt_ids": [1, 5, 12, 7, 8], "completion_ids": [[5, 6], [7, 8, 9], [10]]}
    with pytest.raises(
        ValueError, match=r"adapter 'default' \(LoraConfig\) is not trained as PEFT means it: its gradient is zero"
    ):
        trainer(tmp_path, Dataset.from_list([row]), peft_config=lora(alora_invocation_tokens=[12, 7]))


def test_tokens_may_be_trained_that_the_first_list_does_not_have(tmp_path, data):
    config = peft.TrainableTokensConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens"], token_indices=[93, 94])
    assert trainer(tmp_path, data, peft_config=config).reference.way is Way.ADAPTER_OFF


def test_what_cannot_be_read_back_is_refused(tmp_path, data):
    with pytest.raises(ValueError, match="init_lora_weights='pissa_niter_4' takes a random approximation"):
        trainer(tmp_path, data, peft_config=lora(init_lora_weights="pissa_niter_4"))


def other_kinds():
    common = dict(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    given = {
        "AdaLora": dict(total_step=10, init_r=4, target_r=2),
        "BOFT": dict(boft_block_size=4),
        "C3A": dict(block_size=8),
        "FourierFT": dict(n_frequency=20),
        "HRA": {},
        "IA3": dict(target_modules=["q_proj", "v_proj", "up_proj"], feedforward_modules=["up_proj"]),
        "LNTuning": dict(target_modules=["input_layernorm"]),
        "LoHa": dict(r=4),
        "LoKr": dict(r=4),
        "Miss": dict(r=4),
        "OFT": dict(oft_block_size=4, r=0),
        "RandLora": dict(r=4),
        "Road": dict(group_size=4),
        "Shira": dict(r=2),
        "TrainableTokens": dict(target_modules=["embed_tokens"], token_indices=[80, 81, *range(20, 60)]),
        "VBLoRA": dict(num_vectors=8, vector_length=4),
        "Vera": dict(r=4),
        "WaveFT": dict(n_frequency=20),
    }
    return [(f"{name}Config", common | options) for name, options in given.items()]


@pytest.mark.slow
@pytest.mark.parametrize("name,options", other_kinds(), ids=[name for name, _ in other_kinds()])
def test_other_adapters_are_trained_against_the_policy_handed_over(tmp_path, data, name, options):
    if not hasattr(peft, name):
        pytest.skip(f"this PEFT has no {name}")
    expected = eager(tiny.causal_lm(), data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        t = trainer(tmp_path, data, peft_config=getattr(peft, name)(**options), max_steps=3, learning_rate=0.1)
        before = {n: p.detach().clone() for n, p in t.model.named_parameters() if p.requires_grad}
        t.train()
    torch.testing.assert_close(ref_logps(t), expected, rtol=1e-5, atol=1e-3)
    assert any(not torch.equal(p, before[n]) for n, p in t.model.named_parameters() if n in before)


# --- an adapter's folder as the model ------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path):
    """(folder of a trained adapter, a model with it that nothing trains)"""
    tiny.save(tmp_path / "base")
    model = as_trained(peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora()), scale=0.3)
    model.save_pretrained(tmp_path / "sft")
    return str(tmp_path / "sft"), model.merge_and_unload().eval()


def test_the_folder_of_an_adapter_is_trained_on_against_itself(tmp_path, data, adapter):
    folder, handed = adapter
    expected = eager(handed, data)
    assert (expected - eager(tiny.causal_lm(), data)).abs().max() > 1
    t = trainer(tmp_path, data, folder, max_steps=4, learning_rate=3e-2)
    assert isinstance(t.model, peft.PeftModel) and all(
        "lora_" in name for name, p in t.model.named_parameters() if p.requires_grad
    )
    t.train()
    torch.testing.assert_close(ref_logps(t), expected, rtol=1e-4, atol=1e-3)
    assert t.state.log_history[0]["loss"] == pytest.approx(math.log(3), abs=1e-3)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["o_proj"]], ids=["the same modules", "others"])
def test_a_new_adapter_goes_on_top_of_the_one_in_the_folder(tmp_path, data, adapter, targets):
    folder, handed = adapter
    expected = eager(handed, data)
    t = trainer(tmp_path, data, folder, peft_config=lora(target_modules=targets), max_steps=4, learning_rate=3e-2)
    assert t.reference.way is Way.ADAPTER_OFF
    t.train()
    torch.testing.assert_close(ref_logps(t), expected, rtol=1e-4, atol=1e-3)
    assert t.state.log_history[0]["loss"] == pytest.approx(math.log(3), abs=1e-3)
    t.save_model(str(tmp_path / "saved"))
    read_back = load_causal_lm(str(tmp_path / "saved")).eval()
    policy = policy_logps(t)
    torch.testing.assert_close(eager(read_back, data), policy, rtol=1e-4, atol=1e-3)
    assert (policy - expected).abs().max() > 0.05


def test_adapter_layers_without_a_peft_model_are_refused(tmp_path, data, adapter):
    folder, _ = adapter
    injected = AutoModelForCausalLM.from_pretrained(folder)
    assert any(isinstance(module, BaseTunerLayer) for module in injected.modules())
    for given in (dict(peft_config=lora()), {}):
        with pytest.raises(ValueError, match="model has adapter layers, but is no PeftModel"):
            trainer(tmp_path, data, copy.deepcopy(injected), **given)

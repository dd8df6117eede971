"""LoRA on a base in four bits, against eager on the same weights. Runs where bitsandbytes is installed (it has a CPU path)."""

import pytest
import torch

pytest.importorskip("bitsandbytes")
from datasets import Dataset

from tests.helpers import tiny
from tests.helpers.trainers import as_trained, assert_same_gradients, eager_loss, gradients, step, trainer


def in_four_bits(folder, **options):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny.causal_lm(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32, **options
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantised, device_map={"": "cpu"})


@pytest.mark.parametrize("head_too", [False, True])
@pytest.mark.parametrize("share_prefix", [False, True])
def test_loss_and_gradient_are_eagers(tmp_path, head_too, share_prefix):
    import peft

    options = {"llm_int8_skip_modules": ["no module"]} if head_too else {}
    model, reference = (in_four_bits(tmp_path / name, **options) for name in ("model", "reference"))
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    data = Dataset.from_list(tiny.lists(4, m=None, seed=3))
    t = trainer(tmp_path / "run", data, model, peft_config=adapter, beta=0.3, share_prefix=share_prefix)
    expected = eager_loss(as_trained(t.model), reference, data, "contrastive", beta=0.3)
    loss, found = step(t, [t.train_dataset[i] for i in range(len(data))])
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-6)
    assert_same_gradients(found, gradients(t.model, expected))
    calls = t.model._larpo_policy.calls.values()
    assert all(call.why_logits is None for call in calls) is not head_too, "a head in four bits goes through logits"

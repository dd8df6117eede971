"""Policies and references of the loop: which one is trained, from what, and what is left of it."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from larpo.align.models import Models
from larpo.runs.files import read_rows
from larpo.trainer import LarPOTrainer
from tests.helpers import align_runs, tiny
from tests.helpers.align_runs import align, config, counts_of, rows_of, weights


@pytest.mark.parametrize("reference", ["iteration", "initial"])
def test_the_reference_is_the_policy_at_the_iterations_start_or_the_initial_model(tmp_path, reference):
    align(tmp_path, reference=reference, training=dict(learning_rate=1e-2, beta=0.5, per_device_train_batch_size=6))
    first = counts_of(tmp_path, 2, "train")["log"][0]
    lists = rows_of(tmp_path, 2, "lists")
    untouched = sum(math.log(len(row["scores"])) for row in lists) / len(lists)
    assert (first["loss"] == pytest.approx(untouched, rel=1e-4)) == (reference == "iteration")
    start = counts_of(tmp_path, 1, "train")["log"][0]  # in the first iteration both are the same model
    lists = rows_of(tmp_path, 1, "lists")
    assert start["loss"] == pytest.approx(sum(math.log(len(row["scores"])) for row in lists) / len(lists), rel=1e-4)


def test_only_the_last_layers_are_trained(tmp_path):
    align(tmp_path, iterations=1, trained_layers=1, training=dict(learning_rate=1e-2))
    before, after = weights(Path(align_runs.model_folder())), weights(tmp_path / "iteration-01" / "model")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("model.layers.1.") for name in changed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(eos_token="<|im_end|>"), r"eos_token: the tokenizer has no token '<\|im_end\|>'"),
        (dict(trained_layers=3), "trained_layers=3, but LlamaForCausalLM has 2 layers"),
        (dict(peft={"rr": 2}), "peft: .*unexpected keyword argument 'rr'"),
        (dict(peft={"target_modules": ["nope"]}), "peft: Target modules .*nope.* not found"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_is_sampled(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        align(tmp_path, iterations=1, **changes)
    assert not list(tmp_path.rglob("*.parquet"))


def test_completions_end_where_the_settings_say(tmp_path):
    """The fewest tokens are for what is trained on: evaluation draws from the policy itself."""
    align(tmp_path, iterations=1, eos_token=["e", "</s>"], stop="o", min_new_tokens=2, max_new_tokens=20, temperatures=1.5)
    tokenizer = tiny.tokenizer()
    ends = {tokenizer.convert_tokens_to_ids(name) for name in ("e", "</s>")}
    for row in read_rows(tmp_path / "start" / "evaluation.parquet"):
        for ids, text, finished in zip(row["completion_ids"], row["completions"], row["finished"], strict=True):
            written = [tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:-1], ids)]
            assert finished is (ids[-1] in ends or "o" in written[1])
            assert not ends & set(ids[:-1]) and "o" not in written[0] and "o" not in text
    sampled = [ids for row in read_rows(tmp_path / "iteration-01" / "sampled.parquet") for ids in row["completion_ids"]]
    assert min(map(len, sampled)) == 3  # two, and one that may end it


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_policy_is_trained_in_float32_whatever_its_checkpoint_holds_unless_a_dtype_is_given(tmp_path, dtype):
    """In bf16 a step of 5e-7 changes hardly a weight: all that are larger than 2e-4 stay as they are."""
    tiny.save(tmp_path / "model", spread=2.0, dtype=torch.bfloat16)
    given = {} if dtype is None else {"model_init_kwargs": {"dtype": dtype}}
    align(tmp_path / "run", iterations=1, model=str(tmp_path / "model"), training=dict(learning_rate=5e-7), **given)
    before, after = weights(tmp_path / "model"), weights(tmp_path / "run" / "iteration-01" / "model")
    moved = torch.cat([(before[name].float() != after[name].float()).flatten() for name in before]).float().mean()
    if dtype is None:
        assert after["model.norm.weight"].dtype == torch.float32 and moved > 0.5
    else:
        assert after["model.norm.weight"].dtype == torch.bfloat16 and moved < 0.1


def test_a_model_in_the_home_folder_is_found(tmp_path, monkeypatch):
    model = Path(align_runs.model_folder())
    monkeypatch.setenv("HOME", str(model.parent))
    models = Models(config(tmp_path, model=f"~/{model.name}"), torch.device("cpu"))
    assert models.load(models.initial).config.hidden_size == 32


def test_an_adapter_goes_on_from_iteration_to_iteration(tmp_path):
    result = align(tmp_path, peft={"r": 2, "target_modules": ["q_proj", "v_proj"]}, training=dict(learning_rate=5e-2, beta=0.5))
    first, second = (load_file(tmp_path / f"iteration-0{i}" / "model" / "adapter_model.safetensors") for i in (1, 2))
    assert first.keys() == second.keys()
    moved = sum((second[name] - first[name]).norm() for name in first)
    whole = sum(second[name].norm() for name in first)
    assert 0 < moved < whole  # a fresh adapter would be further away
    assert result.metrics[2]["evaluate"]["kl"]["mean"] != 0
    first = counts_of(tmp_path, 2, "train")["log"][0]  # the reference has the adapter as it was
    assert first["loss"] == pytest.approx(math.log(4), abs=0.02)


def test_the_adapter_in_a_folder_goes_on_to_be_trained(tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    base = AutoModelForCausalLM.from_pretrained(align_runs.model_folder())
    peft.get_peft_model(base, lora).save_pretrained(tmp_path / "sft")
    given = dict(model=str(tmp_path / "sft"), training=dict(learning_rate=1e-2, beta=0.5))
    align(tmp_path / "run", **given)
    folders = [tmp_path / "sft", *(tmp_path / "run" / f"iteration-0{i}" / "model" for i in (1, 2))]
    sft, first, second = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert sft.keys() == first.keys() == second.keys()
    assert all(0 < (b[name] - a[name]).norm() < a[name].norm() for a, b in ((sft, first), (first, second)) for name in a)
    for i in (1, 2):
        assert counts_of(tmp_path / "run", i, "train")["log"][0]["loss"] == pytest.approx(math.log(4), abs=0.02)
    for other in (dict(peft={"r": 2}), dict(trained_layers=1)):
        with pytest.raises(ValueError, match=r"must be left out where model=.* is an adapter's folder"):
            align(tmp_path / "other", **given, **other)


def test_an_iteration_whose_training_diverges_is_not_done_and_not_repeated_blindly(tmp_path):
    for _ in range(2):
        with pytest.raises(FloatingPointError, match=r"training stops at step 2: the loss is nan.*lower learning_rate"):
            align(tmp_path, iterations=1, training=dict(learning_rate=1e30))
        folder = tmp_path / "iteration-01"
        assert not (folder / "model").exists() and not (folder / "train.json").exists()
        with pytest.raises(
            ValueError, match=r"iteration-01' has diverged before: training stops at step 2.*delete .*diverged.json"
        ):
            align(tmp_path, iterations=1, training=dict(learning_rate=1e30))
        (folder / "diverged.json").unlink()


def test_a_policy_whose_weights_are_not_finite_is_not_written(tmp_path, monkeypatch):
    train = LarPOTrainer.train

    def into_nothing(self, **options):
        train(self, **options)
        self.model.lm_head.weight.data[0] = torch.nan

    monkeypatch.setattr(LarPOTrainer, "train", into_nothing)
    with pytest.raises(FloatingPointError, match=r"not finite \(lm_head.weight\).*nothing is written to .*iteration-01/model"):
        align(tmp_path, iterations=1)
    assert not (tmp_path / "iteration-01" / "model").exists()

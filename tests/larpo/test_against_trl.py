"""On pairs LarPOTrainer is TRL's DPOTrainer: it logs the same numbers and ends with the same weights."""

import copy

import pytest
import torch
from datasets import Dataset

from larpo.config import LarPOConfig
from larpo.trainer import LarPOTrainer
from tests.helpers import tiny
from tests.helpers.tiny_tokenizer import tiny_tokenizer

STEPS, BATCH = 6, 2
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
LOGGED = ("loss", "logps/chosen", "logps/rejected", *REWARDS)
SETTINGS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": BATCH,
    "train_sampling_strategy": "sequential",
    "optim": "sgd",
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


@pytest.fixture(autouse=True)
def tells_nobody(monkeypatch):
    """TRL reports over the network that a trainer was made."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)


def texts():
    rows = tiny.lists(STEPS * BATCH, m=2, seed=3)
    return [(row["prompt"], *_best_first(row)) for row in rows], tiny.tokenizer()


def messages():
    rows = [("a b good", "c film", "bad"), ("d", "e f good .", "film a"), ("b", "good", "bad bad bad")]
    return [
        ([{"role": "user", "content": prompt}], *([{"role": "assistant", "content": x}] for x in answers))
        for prompt, *answers in rows * (STEPS * BATCH // len(rows))
    ], tiny_tokenizer()


def _best_first(row):
    return [text for _, text in sorted(zip(row["scores"], row["completions"], strict=True), reverse=True)]


def noisy(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * parameter.std())
    return model


def trained_by_both(folder, data, **options):
    """-> the log and the weights of each trainer."""
    from trl import DPOConfig, DPOTrainer

    rows, tokenizer = data()
    settings = {"output_dir": str(folder), **SETTINGS, **options}
    lists = [{"prompt": prompt, "completions": answers, "scores": [1.0, 0.0]} for prompt, *answers in rows]
    pairs = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows]
    trainers = [
        (LarPOTrainer, LarPOConfig(objective="pairwise", **settings), lists),
        (DPOTrainer, DPOConfig(bf16=False, gradient_checkpointing=False, **settings), pairs),
    ]
    found = []
    for trainer_of, args, given in trainers:
        reference = None if options.get("precompute_ref_log_probs") else noisy(tiny.causal_lm())
        trainer = trainer_of(
            tiny.causal_lm(), reference, args, train_dataset=Dataset.from_list(given), processing_class=copy.deepcopy(tokenizer)
        )
        trainer.train()
        found.append((trainer.state.log_history[:STEPS], dict(trainer.model.named_parameters())))
    return found


@pytest.mark.parametrize(
    ("data", "options"),
    [(texts, {}), (texts, {"beta": 0.5, "precompute_ref_log_probs": True}), (messages, {})],
    ids=["texts", "reference log-likelihoods computed before", "messages"],
)
def test_six_steps_on_pairs_are_those_of_trl(tmp_path, data, options):
    (ours, weights), (theirs, their_weights) = trained_by_both(tmp_path, data, **options)
    assert len(ours) == len(theirs) == STEPS
    for mine, other in zip(ours, theirs, strict=True):
        assert [mine[name] for name in LOGGED] == pytest.approx([other[name] for name in LOGGED], rel=1e-5, abs=1e-5)
    assert abs(ours[-1]["loss"] - ours[0]["loss"]) > 1e-3  # they have moved
    for name, weight in weights.items():
        torch.testing.assert_close(weight, their_weights[name], rtol=0, atol=1e-6)

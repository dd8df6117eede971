"""What test_deepspeed.py runs on two gloo ranks: ZeRO against what one process found."""

import os
from pathlib import Path

import pytest
import torch
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from tests.helpers import tiny, trainer_checks

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.pop("ACCELERATE_USE_CPU", None)  # accelerate would take it for a reason to leave DeepSpeed out


def zero(stage):
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    settings = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto")
    return settings | {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}


def same_as_one_process(name, ranks, stage, **options):
    trainer_checks.assert_like_one_process(name, ranks, deepspeed=zero(stage), **options)


def check_that_deepspeed_is_what_runs(rank, ranks):
    from deepspeed import DeepSpeedEngine

    t = trainer_checks.make_trainer(Path(os.environ["CHECKS_FOLDER"]) / "run", ranks, deepspeed=zero(2), max_steps=1)
    t.train()
    assert isinstance(t.model_wrapped, DeepSpeedEngine) and t.model_wrapped.zero_optimization_stage() == 2


def check_zero1(rank, ranks):
    same_as_one_process("full", ranks, 1)


def check_zero2(rank, ranks):
    for name in ("full", "other reference", "tied", "partly frozen"):
        same_as_one_process(name, ranks, 2)


def check_zero2_in_micro_batches_of_which_ranks_have_different_numbers(rank, ranks):
    same_as_one_process("full", ranks, 2, candidate_micro_batch_size=2)


def check_zero1_in_micro_batches(rank, ranks):
    same_as_one_process("full", ranks, 1, candidate_micro_batch_size=2)


def check_zero2_accumulating_gradients(rank, ranks):
    same_as_one_process("other reference", ranks, 2, gradient_accumulation_steps=2)


def check_zero2_accumulating_gradients_of_micro_batches(rank, ranks):
    same_as_one_process("other reference", ranks, 2, gradient_accumulation_steps=2, candidate_micro_batch_size=2)


def check_zero2_where_lists_do_not_fill_the_batches_of_a_window(rank, ranks):
    for options in (dict(), dict(candidate_micro_batch_size=2)):
        same_as_one_process("five lists", ranks, 2, **trainer_checks.in_window_of_five(2), **options)


def check_zero2_with_an_adapter(rank, ranks):
    same_as_one_process("adapter", ranks, 2)
    same_as_one_process("adapter", ranks, 2, candidate_micro_batch_size=3)


def check_zero2_with_precomputed_reference_log_probs(rank, ranks):
    same_as_one_process("full", ranks, 2, precompute_ref_log_probs=True)


def check_zero2_with_a_reference_that_follows(rank, ranks):
    same_as_one_process("reference follows", ranks, 2)


def model_made_whole():
    """While ZeRO-3 is asked for, transformers cuts models as it makes them; what an earlier check asked for lives on."""
    unset_hf_deepspeed_config()
    return tiny.causal_lm()


def check_zero3_with_an_adapter(rank, ranks):
    same_as_one_process("adapter", ranks, 3, given=dict(model=model_made_whole()))
    same_as_one_process("adapter", ranks, 3, given=dict(model=model_made_whole()), candidate_micro_batch_size=2)


def check_zero3_refuses_a_reference_model(rank, ranks):
    with pytest.raises(ValueError, match="sharded by ZeRO-3 is not supported: give the data ref_logps"):
        trainer_checks.make_trainer(
            Path(os.environ["CHECKS_FOLDER"]) / "run", ranks, deepspeed=zero(3), model=model_made_whole()
        )


def check_zero2_in_bf16_casts_the_reference_as_the_policy(rank, ranks):
    folder = Path(os.environ["CHECKS_FOLDER"]) / "run"
    t = trainer_checks.make_trainer(folder, ranks, deepspeed=zero(2) | {"bf16": {"enabled": "auto"}}, bf16=True, max_steps=1)
    t.train()
    assert {p.dtype for model in (t.model, t.ref_model) for p in model.parameters()} == {torch.bfloat16}
    assert t.state.log_history[0]["rewards/margins"] == 0, "before the first step the two are one model"

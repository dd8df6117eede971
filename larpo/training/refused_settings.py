"""Settings and arguments of transformers that would do nothing here, or something else than they say: refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainingArguments

# name: (values that are fine, why no other is)
FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "remove_unused_columns": ((False,), "the data's columns are lists, not the model's arguments"),
    "label_smoothing_factor": ((0,), "a ranking has no labels. label_smoothing is for preferences"),
    "include_num_input_tokens_seen": (
        ("no", False),
        "transformers counts them in a batch that is one tensor of ids. tokens_per_second is logged without it",
    ),
    "auto_find_batch_size": (
        (False,),
        "where memory runs out transformers begins again with the weights as they are by then. candidate_micro_batch_size "
        "bounds the memory of a step without changing it",
    ),
    "bf16_full_eval": (
        (False,),
        "it casts the policy for good, and not the reference beside it. bf16=True evaluates in bf16 and keeps the weights",
    ),
    "fp16_full_eval": (
        (False,),
        "it casts the policy for good, and not the reference beside it. fp16=True evaluates in fp16 and keeps the weights",
    ),
    "include_for_metrics": (
        ([],),
        "a batch is lists of candidates, not one tensor. compute_metrics gets scores, log-likelihoods and relevance",
    ),
    "batch_eval_metrics": ((False,), "compute_metrics gets all lists at once: they are two numbers a candidate"),
    "eval_do_concat_batches": ((True,), "predictions are one array of all lists"),
    "eval_use_gather_object": ((False,), "predictions are gathered as lists differ in size, without it"),
    "use_liger_kernel": (
        (False,),
        "it replaces the forward that log-likelihoods come from. The head is fused without it; for Liger's layers patch the "
        "model before it is handed over",
    ),
}
NOT_TAKEN = {  # arguments of transformers.Trainer and of earlier TRL
    "model_init": "the reference is the policy that is handed over, and train() would put another one in its place. Call it: "
    "LarPOTrainer(model_init(), ...)",
    "compute_loss_func": "override list_loss, which gets the log-likelihoods of all candidates",
    "preprocess_logits_for_metrics": "no logits are computed. compute_metrics gets scores and log-likelihoods",
    "tokenizer": "it is called processing_class",
}
UPDATING_IN_BACKWARD = ("lomo", "adalomo")  # and those whose name ends in layerwise


def refuse_arguments(given: Mapping[str, Any]) -> None:
    """Raises TypeError for the first of these keyword arguments of a trainer: it is not one of LarPOTrainer."""
    for name in given:
        if name in NOT_TAKEN:
            raise TypeError(f"LarPOTrainer takes no {name}: {NOT_TAKEN[name]}")
        raise TypeError(f"LarPOTrainer got an unexpected keyword argument {name!r}")


def refuse_settings(args: TrainingArguments) -> None:
    """Raises ValueError for a setting of TrainingArguments that has no meaning for lists of candidates, and says why."""
    for name, (fine, why) in FIXED.items():
        value = getattr(args, name, fine[0])
        if value not in fine:
            raise ValueError(f"{name} must be {fine[0]!r}, got {value!r}: {why}")
    for name in ("split_batches", "dispatch_batches"):
        if getattr(args.accelerator_config, name, None):
            raise ValueError(
                f"accelerator_config: {name} must be left out: it cuts a batch at equal rows of each tensor, and lists have "
                "different numbers of candidates and tokens"
            )
    if not args.accelerator_config.even_batches:
        raise ValueError(
            "accelerator_config: even_batches must be True, or a rank could run out of batches that the others wait for; lists "
            "that only fill the last batches are not counted"
        )
    if getattr(args, "train_sampling_strategy", None) == "batch_rebalance":
        raise ValueError(
            "train_sampling_strategy must be random, sequential or group_by_length: batch_rebalance balances the "
            "cost of single sequences, and a list is several"
        )
    if args.max_tokens_per_batch is not None and getattr(args, "train_sampling_strategy", None) == "group_by_length":
        raise ValueError(
            "train_sampling_strategy must be random or sequential with max_tokens_per_batch: that puts lists of similar "
            "length together itself"
        )
    if getattr(args, "parallelism_config", None) is not None:
        _refuse_parallelism(args.parallelism_config)
    if args.candidate_micro_batch_size is not None:
        _refuse_with_micro_batches(args)
    if args.share_prefix and args.neftune_noise_alpha is not None:
        raise ValueError(
            "neftune_noise_alpha needs share_prefix=False: the noise is scaled by the length of a row, and a shared row holds "
            "all candidates of a list"
        )


def _refuse_parallelism(config: Any) -> None:
    for name in ("tp_size", "cp_size", "sp_size"):
        if getattr(config, name, 1) > 1:
            raise ValueError(
                f"parallelism_config: {name} must be 1, got {getattr(config, name)}: a candidate's log-likelihood is computed "
                "on one device. Data-parallel settings (FSDP, ZeRO) shard parameters"
            )


def _refuse_with_micro_batches(args: TrainingArguments) -> None:
    optimizer = getattr(args.optim, "value", args.optim)
    if optimizer in UPDATING_IN_BACKWARD or optimizer.endswith("layerwise"):
        raise ValueError(
            f"optim must not be {optimizer!r} with candidate_micro_batch_size: it updates weights in every backward, and "
            "a step has several then"
        )
    if args.torch_empty_cache_steps is not None:
        raise ValueError("torch_empty_cache_steps must be None with candidate_micro_batch_size: its steps do not read it")


def refuse_unapplied(args: TrainingArguments, inputs: dict[str, Any]) -> None:
    """Raises ValueError for settings that nothing applies, because list_loss or compute_loss is overridden."""
    unapplied = [name for name in ("margin", "label_smoothing", "sft_weight", "ties") if getattr(args, name)]
    if "weight" in inputs:
        unapplied.append("the data's column weight")
    if unapplied:
        raise ValueError(
            f"{', '.join(unapplied)} would do nothing: list_loss or compute_loss is overridden and does not call that of "
            "LarPOTrainer, which applies them. Leave them out, or call it"
        )

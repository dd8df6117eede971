"""What LarPOTrainer is handed, checked and made ready before transformers.Trainer is set up."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.data import IterableDataset

from ..config import LarPOConfig
from ..data.collator import ListCollator
from ..data.text_tokenizer import padding_id
from ..modeling import adapters
from ..modeling.checks import check_tokens, refuse_frozen, vocabulary
from ..modeling.lm_heads import causal_lm
from ..modeling.loading import load_causal_lm, load_tokenizer
from .list_stream import ListStream, training_stream
from .preprocessing import prepare

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PretrainedConfig

    from ..data.summary import DataSummary


def refuse_conflicts(
    args: Any, *, has_data: bool, compute_metrics: Callable | None, data_collator: Any, overrides_compute_loss: bool
) -> None:
    """Raises TypeError or ValueError for arguments of LarPOTrainer that are of another kind or exclude each other."""
    if not isinstance(args, LarPOConfig):
        raise TypeError(f"args must be a LarPOConfig, got {type(args).__name__}")
    if not has_data:
        raise ValueError("train_dataset is needed (or eval_dataset, to evaluate only)")
    if args.candidate_micro_batch_size is not None and overrides_compute_loss:
        raise ValueError("candidate_micro_batch_size does not call compute_loss, which is overridden: override list_loss")
    if compute_metrics is not None and args.prediction_loss_only:
        raise ValueError("compute_metrics is given, but prediction_loss_only leaves it nothing to look at")
    if data_collator is not None and not isinstance(data_collator, ListCollator):
        raise TypeError(f"data_collator must be a larpo.data.collator.ListCollator, got {type(data_collator).__name__}")


def use_one_gpu(args: LarPOConfig) -> None:
    """Keeps transformers from torch.nn.DataParallel, which would cut rows and their borders apart."""
    if args.n_gpu > 1:
        warnings.warn(
            f"{args.n_gpu} GPUs are visible, one is used; for all of them start with `accelerate launch` or `torchrun`",
            stacklevel=3,
        )
        args._n_gpu = 1


def load_models(
    model: str | nn.Module,
    ref_model: str | nn.Module | None,
    processing_class: Any,
    peft_config: PeftConfig | None,
    args: LarPOConfig,
    *,
    trains: bool,
) -> tuple[nn.Module, nn.Module | None, Any]:
    """The policy, the reference and the tokenizer, loaded where they are given by name; without a tokenizer the model's.

    An adapter's folder with `peft_config` gives the model with that adapter merged into it. Raises for one model in both
    roles, for a model of which nothing can be trained, and for adapters that do not go together.
    """
    options, name = args.model_init_kwargs, model if isinstance(model, str) else None
    if options is not None and name is None:
        raise ValueError("model_init_kwargs are for a model given by name; this one is loaded already")
    model, ref_model = (load_causal_lm(one, options) if isinstance(one, str) else one for one in (model, ref_model))
    if ref_model is model:
        raise ValueError("ref_model must not be the model that is trained; leave it out to hold a copy of it apart")
    if processing_class is None:
        processing_class = load_tokenizer(name or causal_lm(model).config._name_or_path, options)
    if name is not None and peft_config is not None and adapters.has_adapter(model):
        model = adapters.merged(model, Path(args.output_dir), write=args.should_save and trains)
    adapters.check_adapter(model, peft_config)
    if trains and peft_config is None:
        refuse_frozen(model)
    return model, ref_model, processing_class


@dataclass(frozen=True)
class TrainerData:
    """The data of a trainer, tokenised.

    lists: data sets by the name they have in messages: "train", "eval", "eval NAME"; of a stream its first lists.
    """

    lists: dict[str, Dataset]
    summaries: dict[str, DataSummary]
    train: Dataset | ListStream | None
    eval: Dataset | dict[str, Dataset] | None


def prepare_data(train: Any, eval: Any, tokenizer: Any, args: LarPOConfig, model_config: PretrainedConfig) -> TrainerData:
    """Converts and tokenises what the trainer was handed, and compares the tokens with the model's vocabulary."""
    stream = training_stream(train, tokenizer, args) if isinstance(train, IterableDataset) else None
    whole = {"train": train} if train is not None and stream is None else {}
    if isinstance(eval, dict):
        whole |= {f"eval {name}": one for name, one in eval.items()}
    elif eval is not None:
        whole["eval"] = eval
    prepared = {name: prepare(one, tokenizer, args, name) for name, one in whole.items()}
    if stream is not None:
        prepared = {"train": stream.prepared} | prepared
    lists = {name: one.lists for name, one in prepared.items()}
    for name, one in lists.items():
        check_tokens(one, model_config, name)
    if stream is not None:
        stream.vocabulary = vocabulary(model_config)
        args.accelerator_config.dispatch_batches = False  # each rank reads for itself: lists can't be cut as tensors are
    return TrainerData(
        lists,
        {name: one.summary for name, one in prepared.items()},
        train=lists.get("train") if stream is None else stream,
        eval={name: lists[f"eval {name}"] for name in eval} if isinstance(eval, dict) else lists.get("eval"),
    )


def collator_for(given: ListCollator | None, tokenizer: Any, args: LarPOConfig) -> ListCollator:
    """A copy of the collator that was given, or a new one, with the fields that settings and tokenizer decide."""
    collator = ListCollator() if given is None else copy.copy(given)
    collator.pad_token_id = padding_id(tokenizer)
    collator.slice_size, collator.pad_to_multiple_of = args.candidate_micro_batch_size, args.pad_to_multiple_of
    return collator


def with_learning_rate(optimizer: tuple[type, dict[str, Any]] | None, args: LarPOConfig) -> tuple | None:
    """optimizer_cls_and_kwargs with args.learning_rate where the class takes an `lr` and was given none."""
    if optimizer is None or "lr" not in inspect.signature(optimizer[0]).parameters:
        return optimizer
    return optimizer[0], {"lr": args.learning_rate} | optimizer[1]

"""LarPOTrainer: listwise preference optimisation on transformers.Trainer."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerState, set_seed
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, PredictionOutput, denumpify_detensorize, seed_worker

import larpo_kernels as lk

from .config import LarPOConfig
from .data.collator import ListCollator
from .data.preprocessing import is_tokenised, prepare, training_lists
from .data.summary import write_summaries
from .data.text_tokenizer import text_tokenizer
from .data.training_stream import ListStream, training_stream
from .modeling import adapter_start, adapters, lm_heads, prefix_sharing
from .modeling.checks import check_tokens, refuse_foreign_optimizer, refuse_frozen, vocabulary, warn_half_precision
from .modeling.loading import load_causal_lm, load_tokenizer
from .modeling.policy import Policy, attach, compute_dtype, detach
from .modeling.reference_model import SyncReference, without_dropout
from .modeling.reference_policy import ReferencePolicy, Way
from .modeling.router_loss import RouterLoss
from .modeling.sharding import is_sharded, on_deepspeed, will_replace_parameters
from .runs.checkpoints import STATE, checkpoint_to_go_on_from, refuse_incomplete
from .training import model_card
from .training.list_log import ListLog
from .training.list_weights import batches_of_window, lists_of_window, without_repeats
from .training.losses import mean_over_lists
from .training.nonfinite import FiniteLoss, SkippedBatch, finish_update_without, refuse_nonfinite_weights
from .training.predictions import PredictionLog
from .training.refused_settings import refuse_arguments, refuse_unapplied
from .training.token_batches import TokenBatchSampler, shapes_of

if TYPE_CHECKING:
    import psutil
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin


class LarPOTrainer(Trainer):
    """Trains a causal LM on ranked candidate lists (LarPO, arXiv 2502.03699); names follow trl.DPOTrainer.

    Args:
        model: a transformers causal LM, one with a PEFT adapter, or the name or path of one, which is loaded in float32
            unless `model_init_kwargs` has another dtype. An adapter's folder gives its model with it: it is trained on, or
            with `peft_config` merged into its model, which is written to `output_dir/merged-base`.
        ref_model: the reference policy, or its name or path. None: the policy as it is now, held apart; with
            `peft_config`, the model without the adapter where that is the policy as it is now and stays so. None is needed
            where the data has `ref_logps` (data sets may differ in that), or with `reference_free`.
        args: a `LarPOConfig`.
        train_dataset, eval_dataset: datasets.Dataset with `prompt`, `completions`, `scores`, or anything `larpo.as_lists`
            converts; eval_dataset may be a dict of them. train_dataset may be a datasets.IterableDataset, with max_steps.
        processing_class: the tokenizer, or a processor that holds one, which is saved whole; None loads the model's tokenizer.
        peft_config: puts this adapter on the model.
        callbacks, optimizers, optimizer_cls_and_kwargs: as in transformers.Trainer; a class that is given no `lr` gets
            args.learning_rate.
        compute_metrics: gets an EvalPrediction of all lists evaluated: predictions are (scores, logps) as in `predict`,
            label_ids the relevance. What it returns is logged beside the metrics of order.
        data_collator: a `larpo.data.collator.ListCollator` of one's own; the trainer sets its fields.

    The loss of an update is the mean over its lists: all those of its batches, on all ranks. Logged beside it:
    rewards/chosen, rewards/rejected, rewards/margins, rewards/accuracies, ndcg, mrr, kendall_tau (implicit scores against
    rewards), list/size, list/frac_tied, logps/*, tokens_per_second, padding and memory/peak_mib (memory/rss_mib on a CPU).
    """

    loss_is_scaled_for_ga = False  # it is the mean over this batch's lists, whoever overrides compute_loss or list_loss

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        ref_model: str | PreTrainedModel | nn.Module | None = None,
        args: LarPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: PeftConfig | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        data_collator: ListCollator | None = None,
        **others: Any,
    ):
        refuse_arguments(others)
        args = LarPOConfig(output_dir="larpo-output") if args is None else args
        if not isinstance(args, LarPOConfig):
            raise TypeError(f"args must be a LarPOConfig, got {type(args).__name__}")
        if train_dataset is None and eval_dataset is None:
            raise ValueError("train_dataset is needed (or eval_dataset, to evaluate only)")
        if args.candidate_micro_batch_size is not None and type(self).compute_loss is not LarPOTrainer.compute_loss:
            raise ValueError("candidate_micro_batch_size does not call compute_loss, which is overridden: override list_loss")
        if compute_metrics is not None and args.prediction_loss_only:
            raise ValueError("compute_metrics is given, but prediction_loss_only leaves it nothing to look at")
        if data_collator is not None and not isinstance(data_collator, ListCollator):
            raise TypeError(f"data_collator must be a larpo.data.collator.ListCollator, got {type(data_collator).__name__}")
        if args.n_gpu > 1:  # torch.nn.DataParallel would cut rows and their borders apart
            warnings.warn(
                f"{args.n_gpu} GPUs are visible, one is used; for all of them start with `accelerate launch` or `torchrun`",
                stacklevel=2,
            )
            args._n_gpu = 1
        set_seed(args.seed)  # adapters are drawn at random
        if args.model_init_kwargs is not None and not isinstance(model, str):
            raise ValueError("model_init_kwargs are for a model given by name; this one is loaded already")
        named = model if isinstance(model, str) else None
        model, ref_model = (load_causal_lm(x, args.model_init_kwargs) if isinstance(x, str) else x for x in (model, ref_model))
        if ref_model is model:
            raise ValueError("ref_model must not be the model that is trained; leave it out to hold a copy of it apart")
        lm_config = lm_heads.causal_lm(model).config
        if processing_class is None:
            processing_class = load_tokenizer(named or lm_config._name_or_path, args.model_init_kwargs)
        tokenizer = text_tokenizer(processing_class)
        if named is not None and peft_config is not None and adapters.has_adapter(model):
            model = adapters.merged(model, Path(args.output_dir), write=args.should_save and train_dataset is not None)
        adapters.check_adapter(model, peft_config)
        if train_dataset is not None and peft_config is None:
            refuse_frozen(model)
        self._list_losses = args.resolved_loss()
        self.objective = self._list_losses.objective
        self._applies_settings = False  # known once a loss has been computed: list_loss may be overridden
        self._router_loss = RouterLoss.asked_for(lm_heads.causal_lm(model), args)

        stream = training_stream(train_dataset, tokenizer, args) if isinstance(train_dataset, IterableDataset) else None
        whole = {"train": train_dataset} if train_dataset is not None and stream is None else {}
        several = isinstance(eval_dataset, dict)
        evals = eval_dataset if several else {"": eval_dataset} if eval_dataset is not None else {}
        whole |= {f"eval {name}".strip(): data for name, data in evals.items()}
        prepared = {name: prepare(data, tokenizer, args, name) for name, data in whole.items()}
        if stream is not None:
            prepared = {"train": stream.prepared} | prepared
        tokenised = {name: one.lists for name, one in prepared.items()}
        self.data_summaries = {name: one.summary for name, one in prepared.items()}
        for name, data in tokenised.items():
            check_tokens(data, lm_config, name)
        if stream is not None:
            stream.vocabulary = vocabulary(lm_config)
            args.accelerator_config.dispatch_batches = False  # each rank reads for itself: lists can't be cut as tensors are
        ids, start = adapter_start.sample(tokenised.values()), None
        if peft_config is not None:
            if not (will_replace_parameters(args) or hasattr(model, "hf_device_map")):
                model.to(args.device)  # where transformers.Trainer takes it: it is called before that
            model, start = adapters.with_new_adapter(model, peft_config, ids)
            if args.gradient_checkpointing:
                model.enable_input_require_grads()
        self._policies = {"model": self._policy(model, args)}
        self._detached = False  # `train` detaches them when it ends
        attach(model, self._policies["model"])
        if train_dataset is not None:
            refuse_foreign_optimizer(optimizers[0], model)
            if adapters.has_adapter(model):
                adapter_start.refuse_untrainable(model, ids)
        if args.disable_dropout:
            without_dropout(model)
        self.reference = ReferencePolicy.choose(
            model,
            ref_model,
            args,
            new_adapter=start,
            with_ref_logps={name: "ref_logps" in data.column_names for name, data in tokenised.items()},
        )
        if self.ref_model is not None:
            self._policies["ref_model"] = self._policy(self.ref_model, args)
            attach(self.ref_model, self._policies["ref_model"])

        self._seen = {"train": ListLog(args.ndcg_k), "eval": ListLog(args.ndcg_k)}
        self._tail = lk.TailShares()
        self._tokens_since_log, self._padded_since_log, self._time_of_log = 0, 0, time.monotonic()
        collator = ListCollator() if data_collator is None else copy.copy(data_collator)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        collator.pad_token_id = 0 if pad is None else pad
        collator.slice_size, collator.pad_to_multiple_of = args.candidate_micro_batch_size, args.pad_to_multiple_of
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=tokenised.get("train") if stream is None else stream,
            eval_dataset={name: tokenised[f"eval {name}".strip()] for name in evals} if several else tokenised.get("eval"),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            compute_metrics=compute_metrics,
            optimizer_cls_and_kwargs=_with_learning_rate(optimizer_cls_and_kwargs, args.learning_rate),
        )
        self.model_accepts_loss_kwargs = False
        self._finite = FiniteLoss(self.accelerator, args.on_nonfinite)
        if train_dataset is not None and not self._keeps_full_precision():
            warn_half_precision(model, args.learning_rate)
        if self._on_deepspeed and not self._sharded:
            model.to(args.device)  # DeepSpeed takes it there when training starts; the reference may be scored before
        self._keep_logps_exact()
        self.data_collator.layout = self._layout()
        if lm_heads.causal_lm(model).config._attn_implementation != "flex_attention":
            self.data_collator.max_completion_tokens = prefix_sharing.DENSE_MASK_TOKENS
        self.reference.prepare(self.accelerator, self.args.device)
        self._sync: SyncReference | None = self.reference.following(model, args)
        if self._sync is not None:
            self.add_callback(self._sync)
        for name, data in tokenised.items():
            self.reference.compare_with_stored(
                data, name, model, collator=self.data_collator, accelerator=self.accelerator, device=args.device
            )
        if args.precompute_ref_log_probs:
            self._precompute_ref_logps()

    # --- set-up ---------------------------------------------------------------------------------------------

    @staticmethod
    def _policy(model: nn.Module, args: LarPOConfig) -> Policy:
        return Policy(
            model,
            schedule=args.schedule,
            memory_budget=args.memory_budget,
            tail_threshold=args.tail_threshold,
            backend=args.kernel_backend,
        )

    def _attach(self) -> None:
        """The model and its reference accept rows, also after `train`."""
        if self._detached:
            self._detached = False
            for model, policy in self._with_policies():
                attach(model, policy)

    def _detach(self) -> None:
        """They are again what they were handed over as: what they are used for next reads and wraps their own forward."""
        self._detached = True
        for model, _ in self._with_policies():
            detach(model)

    @contextlib.contextmanager
    def _attached(self) -> Iterator[None]:
        """They accept rows while it lasts, from before accelerate wraps anything, and are then as before."""
        detached = self._detached
        self._attach()
        try:
            yield
        finally:
            if detached:
                self._detach()

    def _with_policies(self) -> list[tuple[nn.Module, Policy]]:
        models = ((getattr(self, name), policy) for name, policy in self._policies.items())
        unwrap = self.accelerator.unwrap_model  # FSDP1 puts its wrapper in the model's place
        return [(unwrap(model, keep_torch_compile=False), policy) for model, policy in models if model is not None]

    def _keeps_full_precision(self) -> bool:
        """Whether something holds float32 weights beside those of the model, or these are not what is trained."""
        if getattr(lm_heads.causal_lm(self.model), "is_quantized", False) or self._on_deepspeed:
            return True
        return self.is_fsdp_enabled and self.accelerator.mixed_precision != "no"

    def _layout(self) -> str:
        """How candidates are laid out in rows, settled before any worker holds the collator."""
        lm = lm_heads.causal_lm(self.model)
        if self.args.share_prefix:
            reason = prefix_sharing.supports_prefix_sharing(lm.config) or self._compare_shared_prefix()
            if reason is None:
                return "shared"
            warnings.warn(f"share_prefix is off, every candidate runs its own prompt: {reason}", stacklevel=3)
        return "packed" if "flash" in (lm.config._attn_implementation or "") else "padded"

    @torch.no_grad()
    def _compare_shared_prefix(self) -> str | None:
        """The first list with its prompt shared, against separate rows; None where they agree."""
        if self._sharded:
            return None  # parameters are not whole here: the table of known architectures has to do
        dataset = self.train_dataset if self.train_dataset is not None else self._eval_datasets()[0]
        dataset = dataset.first if isinstance(dataset, ListStream) else dataset
        if len(dataset) == 0:
            return None
        logps = []
        training = self.model.training
        self.model.eval()
        for layout in ("shared", "padded"):
            batch = self._prepare_inputs(ListCollator(self.data_collator.pad_token_id, layout)([dataset[0]]))
            with self.accelerator.autocast():
                dtype = compute_dtype(lm_heads.causal_lm(self.model))
                logps.append(self.model(rows=batch["rows"][0]))
        self.model.train(training)
        return prefix_sharing.check_prefix_sharing(*logps, batch["num_tokens"], dtype)

    def _eval_datasets(self) -> list[Dataset]:
        return list(self.eval_dataset.values()) if isinstance(self.eval_dataset, dict) else [self.eval_dataset]

    def _keep_logps_exact(self) -> None:
        """FSDP2 as accelerate sets it up rounds every output to the parameters' dtype: log-likelihoods of hundreds of nats
        would be known to whole nats in bf16. Nothing else depends on that: activations are in that dtype already."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if self.accelerator.is_fsdp2 and plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)

    @property
    def _on_deepspeed(self) -> bool:
        return on_deepspeed(self.accelerator)

    @property
    def _sharded(self) -> bool:
        return is_sharded(self.accelerator)

    # --- the reference --------------------------------------------------------------------------------------

    @property
    def ref_model(self) -> nn.Module | None:
        """The model that is the reference; None where it is none, in the data, or the policy without its adapter."""
        return self.reference.model

    def _ref_logps(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor | None:
        """Log-likelihood of each candidate under the reference: sums over tokens, [S]; None for no reference."""
        return self.reference.logps(model, inputs, functools.partial(self._logps, inputs=inputs), self.accelerator)

    def _precompute_ref_logps(self) -> None:
        """Adds the column ref_logps to the data; the policy is still what it was when it was handed over."""
        if self.train_dataset is not None:
            self.train_dataset = self._with_ref_logps(self.train_dataset, "train")
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: self._with_ref_logps(data, name) for name, data in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            self.eval_dataset = self._with_ref_logps(self.eval_dataset, "eval")

    def _with_ref_logps(self, dataset: Dataset, name: str) -> Dataset:
        self._attach()
        return self.reference.fill(
            dataset, name, self.model, collator=self.data_collator, args=self.args, accelerator=self.accelerator
        )

    # --- batches ----------------------------------------------------------------------------------------------

    def get_train_dataloader(self):
        """As transformers.Trainer.get_train_dataloader; with max_tokens_per_batch batches are made by their tokens."""
        args = self.args
        if args.max_tokens_per_batch is None or self.train_dataset is None:
            return super().get_train_dataloader()
        batches = TokenBatchSampler(
            shapes_of(self.train_dataset, self.data_collator),
            args.max_tokens_per_batch,
            seed=args.seed if args.data_seed is None else args.data_seed,
            epoch=lambda: int(self.state.epoch or 0),
            ranks=args.world_size,
            in_order=args.train_sampling_strategy == "sequential",
            drop_last=args.dataloader_drop_last,
        )
        if args.should_log:
            batches.say(args.per_device_train_batch_size)
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            in_order=args.dataloader_in_order,
            worker_init_fn=functools.partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
        )
        return self.accelerator.prepare(loader)

    # --- data that comes later ------------------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset=None):
        if eval_dataset is None or isinstance(eval_dataset, str):
            with self._whole_data():
                return super().get_eval_dataloader(eval_dataset)
        # with persistent workers transformers would keep the first such loader and evaluate on it ever after
        return self.get_test_dataloader(eval_dataset, "eval")

    def get_test_dataloader(self, test_dataset, name: str = "test"):
        with self._whole_data():
            return super().get_test_dataloader(self._prepared(test_dataset, name))

    def _get_eval_sampler(self, eval_dataset):
        """In the order of the data, whatever train_sampling_strategy is: predictions are told apart by it."""
        return SequentialSampler(eval_dataset)

    @contextlib.contextmanager
    def _whole_data(self) -> Iterator[None]:
        """dataloader_drop_last is for training: an evaluation is of every list."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop_last

    def _prepared(self, dataset: Any, name: str) -> Any:
        """What `evaluate` and `predict` are given, as the trainer's own data is: tokens, with ref_logps where needed."""
        if is_tokenised(dataset):
            return dataset
        lists = training_lists(dataset, self.processing_class, self.args, name)
        check_tokens(lists, lm_heads.causal_lm(self.model).config, name)
        if "ref_logps" in lists.column_names or self.reference.way is not Way.STORED:
            return lists
        if not self.args.precompute_ref_log_probs or self.state.global_step:
            raise ValueError(
                f"the {name} data has no ref_logps, and no reference model is held to compute them: hand it to the trainer as "
                "eval_dataset, or write them with `larpo score`"
            )
        return self._with_ref_logps(lists, name)

    # --- the loss -------------------------------------------------------------------------------------------

    def list_loss(self, logps: Tensor, ref_logps: Tensor | None, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The loss of `larpo.training.losses` over implicit rewards: (mean over the batch's lists, scores [S]).

        logps, ref_logps: [S] per candidate, sums or (length_normalized) means over its tokens. Override it for another
        loss of the same numbers. Without a call to this one ties, margin, label_smoothing, sft_weight and the data's `weight`
        would do nothing, and are refused.
        """
        self._applies_settings = True
        losses, scores = self._list_losses(logps, ref_logps, inputs)
        return mean_over_lists(losses, inputs), scores

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self._attach()
        ref_logps = self._per_candidate(self._ref_logps(model, inputs), inputs)
        logps, router_loss = self._logps_and_router_loss(model, inputs)
        logps = self._per_candidate(logps, inputs)
        loss, scores = self._loss_of_lists(logps, ref_logps, inputs)
        loss = loss if router_loss is None else loss + router_loss
        self._record("train" if model.training else "eval", inputs, loss, logps, scores)
        return (loss, {"logps": logps, "scores": scores}) if return_outputs else loss

    def _loss_of_lists(self, logps: Tensor, ref_logps: Tensor | None, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """`list_loss`, which must be finite to train on; for a batch of no list 0, with a gradient of 0."""
        counted = len(inputs["list_sizes"]) > 0
        loss, scores = self.list_loss(logps, ref_logps, inputs) if counted else (logps.sum(), logps)
        if counted and not self._applies_settings:
            refuse_unapplied(self.args, inputs)
        if self.model.training:
            found = {"loss": loss, "logps": logps, "ref_logps": ref_logps, "scores": scores}
            self._finite.check(self.model, inputs, self.state.global_step + 1, **found)
        return loss, scores

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of an update, and the number of their lists on all ranks."""
        own = (without_repeats(batch, self.accelerator) for batch in epoch_iterator)
        batches, _ = super().get_batch_samples(own, num_batches, device)
        return batches, lists_of_window(batches, self.accelerator)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._attach()
        if num_items_in_batch is not None:
            self.current_gradient_accumulation_steps = batches_of_window(num_items_in_batch, inputs, self.accelerator)
        try:
            with self._tail:
                return self._forward_and_backward(model, inputs)
        except SkippedBatch:
            finish_update_without(model, self.accelerator)
            return torch.zeros((), device=self.args.device)

    def _forward_and_backward(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        if self.args.candidate_micro_batch_size is None:
            loss = super().training_step(model, inputs)
            if type(self).compute_loss is not LarPOTrainer.compute_loss:  # one that may be made of other numbers
                self._finite.check(model, inputs, self.state.global_step + 1, may_skip=False, loss=loss)
                if not self._applies_settings:
                    refuse_unapplied(self.args, inputs)
            return loss
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            ref_logps = self._per_candidate(self._ref_logps(model, inputs), inputs)
            out = lk.backward_in_slices(
                lambda at: self._per_candidate(self._logps_of_slice(model, inputs, at), inputs, at),
                inputs["relevance"],
                list_sizes=inputs["list_sizes"],
                slice_size=self._slice,
                num_slices=self._num_slices(inputs),
                loss=lambda logps, _: self._loss_of_lists(logps, ref_logps, inputs),
                backward=self._backward,
                no_sync=lambda: self._more_to_come(model),
            )
        self._record("train", inputs, out.loss, out.logps, out.scores)
        return out.loss / self.current_gradient_accumulation_steps

    def _backward(self, loss: Tensor) -> None:
        options = {"scale_wrt_gas": False} if self._on_deepspeed else {}  # or it divides a second time
        self.accelerator.backward(loss / self.current_gradient_accumulation_steps, **options)

    @contextlib.contextmanager
    def _more_to_come(self, model: nn.Module) -> Iterator[None]:
        """Around all but the last backward of a step: no gradient is exchanged; DeepSpeed, whose backward steps, does not."""
        if not self._on_deepspeed:
            with getattr(model, "no_sync", contextlib.nullcontext)():
                yield
            return
        state = self.accelerator.gradient_state
        syncs = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            yield
        finally:
            state._set_sync_gradients(syncs)

    @property
    def _slice(self) -> int:
        return self.args.candidate_micro_batch_size

    def _num_slices(self, inputs: dict[str, Any]) -> int:
        """Slices of candidates that every rank runs: forwards are collective, so a rank with fewer runs some for nothing."""
        if self.args.candidate_micro_batch_size is None or self.accelerator.num_processes == 1:
            return len(inputs["rows"])
        if "num_slices" not in inputs:
            most = torch.tensor(len(inputs["rows"]), device=self.args.device)
            torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
            inputs["num_slices"] = int(most)
        return inputs["num_slices"]

    def _logps(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Log-likelihood of each candidate, [S]."""
        parts = [self._logps_of_part(model, inputs, i) for i in range(self._num_slices(inputs))]
        logps = torch.cat(parts) if len(parts) > 1 else parts[0]
        return logps[: len(inputs["relevance"])]

    def _logps_and_router_loss(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Log-likelihood of each candidate, [S], and what is added to the batch's loss to balance experts, if anything is."""
        if self._router_loss is None or len(inputs["list_sizes"]) == 0:  # a batch of no list adds nothing to an update
            return self._logps(model, inputs), None
        (rows,) = inputs["rows"]
        logps, balance = model(rows=rows, router_loss=self._router_loss)
        return logps[: len(inputs["relevance"])], self._router_loss.coefficient * balance

    def _logps_of_slice(self, model: nn.Module, inputs: dict[str, Any], at: slice) -> Tensor:
        return self._logps_of_part(model, inputs, -(-at.start // self._slice))[: at.stop - at.start]

    @staticmethod
    def _logps_of_part(model: nn.Module, inputs: dict[str, Any], i: int) -> Tensor:
        """Of the i-th of the rows that are run together; past the last one [0], by a forward all the same."""
        parts = inputs["rows"]
        return model(rows=parts[i]) if i < len(parts) else model(rows=parts[0])[:0]

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(without_repeats(inputs, self.accelerator))
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only:
                return self.compute_loss(model, inputs).detach(), None, None
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        self._predicted.add(outputs["scores"], outputs["logps"], inputs["relevance"], inputs["list_sizes"])
        return loss.detach(), None, None  # transformers would gather rows of one length

    def _per_candidate(self, logps: Tensor | None, inputs: dict[str, Any], at: slice = slice(None)) -> Tensor | None:
        """Sums over tokens -> what a score is made of: the sums, or means with length_normalized."""
        if logps is None or not self.args.length_normalized:
            return logps
        return logps / inputs["num_tokens"][at].clamp(min=1)

    def _prepare_inputs(self, inputs):
        """To the device, in their own dtypes: rewards and log-likelihoods must not be rounded to the model's."""
        if self.args.device.type == "mps":
            inputs["relevance"] = inputs["relevance"].float()  # has no float64
        return send_to_device(inputs, self.args.device, non_blocking=True)

    # --- logs -----------------------------------------------------------------------------------------------

    def _record(self, split: str, inputs: dict[str, Any], loss: Tensor, logps: Tensor, scores: Tensor) -> None:
        self._seen[split].add(loss, scores, inputs["relevance"], inputs["list_sizes"], logps)
        if split == "train":
            self._tokens_since_log += inputs["num_input_tokens"]
            self._padded_since_log += sum(rows["input_ids"].numel() for rows in inputs["rows"])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            now = time.monotonic()
            seen = self._seen["train"].pop(self.accelerator.num_processes)
            if self._finite.skipped and "loss" not in seen and type(self).compute_loss is LarPOTrainer.compute_loss:
                seen["loss"] = float("nan")  # all was left out: the 0 of transformers would be the loss of nothing
            logs = {**logs, **seen}
            if self.args.on_nonfinite == "skip":
                logs["skipped_batches"] = self._finite.skipped
            logs["tokens_per_second"] = round(self._tokens_since_log / max(now - self._time_of_log, 1e-9), 1)
            logs["padding"] = round(1 - self._tokens_since_log / self._padded_since_log, 4) if self._padded_since_log else 0.0
            logs |= _memory(self.args.device)
            if self.args.tail_threshold is not None:
                logs |= {"tail/rows": self._tail.rows, "tail/merged": self._tail.merged}
                self._tail = lk.TailShares()
            self._tokens_since_log, self._padded_since_log, self._time_of_log = 0, 0, now
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        self._seen["eval"].clear()
        self._predicted = PredictionLog()
        with self._attached():
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        found = self._seen["eval"].pop(self.accelerator.num_processes)
        predictions, relevance = self._predicted.pop(self.accelerator.num_processes)
        if self.compute_metrics is not None and predictions is not None:
            found |= denumpify_detensorize(self.compute_metrics(EvalPrediction(predictions=predictions, label_ids=relevance)))
        start = f"{metric_key_prefix}_"
        output.metrics.update({name if name.startswith(start) else start + name: x for name, x in found.items()})
        return output._replace(predictions=predictions, label_ids=relevance)

    def predict(self, *args, **kwargs) -> PredictionOutput:
        """As transformers.Trainer.predict: predictions are `ListPredictions` (scores, logps), label_ids the
        relevance; arrays of a row for each list in the order of the data, filled up with NaN to the largest."""
        return super().predict(*args, **kwargs)

    def create_model_card(self, language=None, license=None, tags=None, **options) -> None:
        """As transformers.Trainer.create_model_card, with tags of the method and the paper that it is from."""
        objective = self.args.objective if type(self).list_loss is LarPOTrainer.list_loss else None
        super().create_model_card(language, license, model_card.tags(objective, tags), **options)
        if self.is_world_process_zero():
            model_card.name_the_paper(Path(self.args.output_dir) / "README.md", objective)

    # --- checkpoints ----------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As transformers.Trainer.train; True resumes from the newest checkpoint that is whole, and where nothing is said here
        `args.resume_from_checkpoint` counts. A checkpoint that is not whole is refused."""
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        if resume_from_checkpoint is True:
            resume_from_checkpoint = checkpoint_to_go_on_from(self.args.output_dir, self.args)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint=True, but output_dir={self.args.output_dir!r} holds no whole checkpoint"
                )
        if resume_from_checkpoint:
            refuse_incomplete(resume_from_checkpoint, self.args)
        if resume_from_checkpoint and self._sync is not None:
            self._sync.load(resume_from_checkpoint)
        if isinstance(self.train_dataset, ListStream):
            self.train_dataset.skip = self._lists_before(resume_from_checkpoint)
        if self.args.should_save:
            write_summaries(Path(self.args.output_dir), self.data_summaries, examples=not self.args.push_to_hub)
        self._time_of_log = time.monotonic()
        self._attach()
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self._detach()

    def _lists_before(self, checkpoint: str | None) -> int:
        """Lists of the stream, on all ranks, that transformers skips as it goes on from there; 0 where several workers share
        files out, and each has its own."""
        if not checkpoint or self.args.ignore_data_skip or self.args.dataloader_num_workers > 1:
            return 0
        batches = (
            TrainerState.load_from_json(os.path.join(checkpoint, STATE)).global_step * self.args.gradient_accumulation_steps
        )
        return batches * self.args.per_device_train_batch_size * self.args.world_size

    def _save(self, *args, **kwargs):
        """transformers pickles the settings beside the model: without the secrets among them."""
        settings, self.args = self.args, self.args.without_secrets()
        try:
            super()._save(*args, **kwargs)
        finally:
            self.args = settings

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """As transformers.Trainer.save_model; raises NonFiniteError instead of writing weights that are NaN or infinite."""
        where = self.args.output_dir if output_dir is None else output_dir
        refuse_nonfinite_weights(self.model, where, self.accelerator if self._sharded else None)
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model, trial):
        if self._sync is not None:  # first: a checkpoint is whole once the last file of transformers' own is there
            folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            self._sync.save(folder, write=self.args.should_save)
        super()._save_checkpoint(model, trial)


def _with_learning_rate(optimizer: tuple[type, dict[str, Any]] | None, learning_rate: float) -> tuple | None:
    if optimizer is None or "lr" not in inspect.signature(optimizer[0]).parameters:
        return optimizer
    return optimizer[0], {"lr": learning_rate} | optimizer[1]


def _memory(device: torch.device) -> dict[str, float]:
    """Peak of what torch allocated on a GPU since the start; on a CPU what the process holds now. MiB."""
    if device.type == "cuda":
        return {"memory/peak_mib": round(torch.cuda.max_memory_allocated(device) / 2**20, 1)}
    return {"memory/rss_mib": round(_process(os.getpid()).memory_info().rss / 2**20, 1)}


@functools.cache
def _process(pid: int) -> psutil.Process:
    """Made once: psutil reads when it was started, which takes longer than its memory."""
    import psutil

    return psutil.Process(pid)

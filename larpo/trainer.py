"""LarPOTrainer: listwise preference optimisation on transformers.Trainer. Its parts, in the order of the class, are in

a step          training/losses.py, training/candidate_slices.py, modeling/policy.py
what guards it  training/nonfinite.py, training/refused_settings.py, modeling/checks.py
batches         training/preprocessing.py, data/collator.py, training/token_batches.py, training/list_weights.py
logs            training/training_log.py, training/predictions.py
checkpoints     training/resuming.py, runs/checkpoints.py
the reference   modeling/reference_policy.py
set-up          training/setup.py, modeling/layout_choice.py, modeling/adapters.py
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, PredictionOutput, denumpify_detensorize

import larpo_kernels as lk

from .config import LarPOConfig
from .data.collator import Layout, ListCollator
from .data.summary import write_summaries
from .data.text_tokenizer import text_tokenizer
from .modeling import adapter_start, adapters, lm_heads, prefix_sharing
from .modeling.checks import check_tokens, refuse_foreign_optimizer, warn_half_precision
from .modeling.layout_choice import choose_layout, differs_when_shared
from .modeling.policy import AttachedPolicies
from .modeling.reference_model import SyncReference, without_dropout
from .modeling.reference_policy import ReferencePolicy
from .modeling.router_loss import RouterLoss
from .modeling.sharding import is_sharded, on_deepspeed
from .training import model_card, setup
from .training.candidate_slices import CandidateSlices
from .training.list_log import ListLog
from .training.list_stream import ListStream
from .training.list_weights import batches_of_window, lists_of_window, without_repeats
from .training.losses import mean_over_lists
from .training.nonfinite import FiniteLoss, SkippedBatch, finish_update_without, refuse_nonfinite_weights
from .training.predictions import PredictionLog
from .training.preprocessing import is_tokenised, training_lists
from .training.refused_settings import refuse_arguments, refuse_unapplied
from .training.resuming import checkpoint_asked_for, lists_before
from .training.token_batches import token_batches_loader
from .training.training_log import TrainingLog

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin


class LarPOTrainer(Trainer):
    """Trains a causal LM on ranked candidate lists (LarPO, arXiv 2502.03699); names follow trl.DPOTrainer.

    Args:
        model: a transformers causal LM, one with a PEFT adapter, or the name or path of one, which is loaded in float32
            unless `model_init_kwargs` has another dtype. The folder of an adapter loads its model with it: that adapter is
            trained further, or with `peft_config` merged into its model, which is written to `output_dir/merged-base`.
        ref_model: the reference policy, or its name or path. None: a copy of the policy as it is now; with `peft_config`, the
            model without the adapter if that is the policy as it is now and stays so. No reference is needed if the data
            has `ref_logps` (data sets may differ in that), or with `reference_free`.
        args: a `LarPOConfig`; None for one with defaults, in the folder larpo-output.
        train_dataset: a datasets.Dataset with `prompt`, `completions`, `scores`, or anything that `larpo.as_lists` converts;
            or a datasets.IterableDataset of such rows, with max_steps. May be left out to evaluate only.
        eval_dataset: a datasets.Dataset as above, or a dict of them by name.
        processing_class: the tokenizer, or a processor that holds one, which is saved whole; None loads the model's tokenizer.
        callbacks: as in transformers.Trainer.
        optimizers: an optimizer and a scheduler, as in transformers.Trainer.
        peft_config: adds this adapter to the model, and trains it.
        compute_metrics: gets an EvalPrediction of all lists evaluated: predictions are (scores, logps) as in `predict`,
            label_ids the relevance. What it returns is logged with the other metrics.
        optimizer_cls_and_kwargs: as in transformers.Trainer; a class that is given no `lr` gets args.learning_rate.
        data_collator: a `larpo.data.collator.ListCollator` of your own; the trainer sets its fields.

    Raises:
        TypeError: an argument that `LarPOTrainer` does not take, saying what to do instead.
        ValueError: settings, a model, an adapter or data that cannot be trained on as given, saying which and why.

    The loss of an update is the mean over its lists: all those of its batches, on all ranks. Logged beside it:
    rewards/chosen, rewards/rejected, rewards/margins, rewards/accuracies, ndcg, mrr, kendall_tau (implicit scores against
    rewards), list/size, list/frac_tied, logps/*, tokens_per_second, padding and memory/peak_mib (memory/rss_mib on a CPU).

    A step calls `larpo_kernels.linear_sequence_logps` and then `listwise_loss`, not `fused_linear_listwise_loss`, which is both
    at once. FSDP and DDP gather weights and exchange gradients around the model's forward, so the head must be computed
    inside it: `larpo.modeling.policy` makes `model(rows=...)` return log-likelihoods in one forward, and the loss of lists is
    made of these outside, together with the reference's.
    """

    loss_is_scaled_for_ga = False  # the loss is the mean over this batch's lists, also in subclasses

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
        setup.refuse_conflicts(
            args,
            has_data=not (train_dataset is None and eval_dataset is None),
            compute_metrics=compute_metrics,
            data_collator=data_collator,
            overrides_compute_loss=self._overrides_compute_loss,
        )
        setup.use_one_gpu(args)
        set_seed(args.seed)  # adapters are drawn at random
        model, ref_model, processing_class = setup.load_models(
            model, ref_model, processing_class, peft_config, args, trains=train_dataset is not None
        )
        self._set_up_loss(model, args)
        tokenizer = text_tokenizer(processing_class)
        data = setup.prepare_data(train_dataset, eval_dataset, tokenizer, args, lm_heads.causal_lm(model).config)
        self.data_summaries = data.summaries
        super().__init__(
            model=self._set_up_models(model, ref_model, peft_config, optimizers[0], data, args),
            args=args,
            data_collator=setup.collator_for(data_collator, tokenizer, args),
            train_dataset=data.train,
            eval_dataset=data.eval,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            compute_metrics=compute_metrics,
            optimizer_cls_and_kwargs=setup.with_learning_rate(optimizer_cls_and_kwargs, args),
        )
        self._set_up_run(data)

    # --- a step: from a batch of lists to a loss and its gradient -------------------------------------------

    def list_loss(self, logps: Tensor, ref_logps: Tensor | None, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The loss of a batch of lists. Override it for another loss of the same numbers.

        If an override does not call this one, ties, margin, label_smoothing, sft_weight and the data's `weight` would have no
        effect, and are refused.

        Args:
            logps: [S] log-likelihood of each candidate under the policy, differentiable: the sum over its tokens, or the mean
                with length_normalized; nats.
            ref_logps: [S] the same under the reference; None with reference_free.
            inputs: the batch, as `larpo.data.collator.ListCollator` makes it: relevance [S], list_sizes [L], num_tokens [S].

        Returns:
            A pair: the mean over the batch's lists, and scores [S], which are logged as implicit rewards.
        """
        self._applies_settings = True
        losses, scores = self._list_losses(logps, ref_logps, inputs)
        return mean_over_lists(losses, inputs), scores

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self._policies.attach()
        ref_logps = self._per_candidate(self._ref_logps(model, inputs), inputs)
        logps, router_loss = self._logps_and_router_loss(model, inputs)
        logps = self._per_candidate(logps, inputs)
        loss, scores = self._finite_list_loss(logps, ref_logps, inputs)
        loss = loss if router_loss is None else loss + router_loss
        self._record(model.training, inputs, loss, logps, scores)
        return (loss, {"logps": logps, "scores": scores}) if return_outputs else loss

    def _logps_and_router_loss(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Log-likelihood of each candidate, [S], and what is added to the batch's loss to balance experts, if anything is."""
        if self._router_loss is None or len(inputs["list_sizes"]) == 0:  # a batch of no list adds nothing to an update
            return self._slices.logps(model, inputs), None
        (rows,) = inputs["rows"]
        logps, balance = model(rows=rows, router_loss=self._router_loss)
        return logps[: len(inputs["relevance"])], self._router_loss.coefficient * balance

    def _per_candidate(self, logps: Tensor | None, inputs: dict[str, Any], at: slice = slice(None)) -> Tensor | None:
        """Sums over tokens -> what a score is made of: the sums, or means with length_normalized."""
        if logps is None or not self.args.length_normalized:
            return logps
        return logps / inputs["num_tokens"][at].clamp(min=1)

    def _finite_list_loss(self, logps: Tensor, ref_logps: Tensor | None, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """`list_loss`, which must be finite to train on; for a batch of no list 0, with a gradient of 0."""
        has_lists = len(inputs["list_sizes"]) > 0
        loss, scores = self.list_loss(logps, ref_logps, inputs) if has_lists else (logps.sum(), logps)
        if has_lists:
            self._refuse_unapplied(inputs)
        if self.model.training:
            found = {"loss": loss, "logps": logps, "ref_logps": ref_logps, "scores": scores}
            self._finite.check(self.model, inputs, self.state.global_step + 1, **found)
        return loss, scores

    def _refuse_unapplied(self, inputs: dict[str, Any]) -> None:
        if not self._applies_settings:
            refuse_unapplied(self.args, inputs)

    @property
    def _overrides_compute_loss(self) -> bool:
        return type(self).compute_loss is not LarPOTrainer.compute_loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._policies.attach()
        if num_items_in_batch is not None:
            self.current_gradient_accumulation_steps = batches_of_window(num_items_in_batch, inputs, self.accelerator)
        try:
            with self._training_log.tail:
                if self.args.candidate_micro_batch_size is not None:
                    return self._forward_and_backward_in_slices(model, inputs)
                return self._forward_and_backward(model, inputs)
        except SkippedBatch:
            finish_update_without(model, self.accelerator)
            return torch.zeros((), device=self.args.device)

    def _forward_and_backward(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        loss = super().training_step(model, inputs)
        if self._overrides_compute_loss:  # a loss that may be made of other numbers
            self._finite.check(model, inputs, self.state.global_step + 1, may_skip=False, loss=loss)
            self._refuse_unapplied(inputs)
        return loss

    def _forward_and_backward_in_slices(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        slices, batches = self._slices, self.current_gradient_accumulation_steps
        with self.compute_loss_context_manager():
            ref_logps = self._per_candidate(self._ref_logps(model, inputs), inputs)
            out = lk.backward_in_slices(
                lambda at: self._per_candidate(slices.logps_of(model, inputs, at), inputs, at),
                inputs["relevance"],
                list_sizes=inputs["list_sizes"],
                slice_size=slices.size,
                num_slices=slices.count(inputs),
                loss=lambda logps, _: self._finite_list_loss(logps, ref_logps, inputs),
                backward=lambda loss: slices.backward(loss / batches),
                no_sync=lambda: slices.no_sync(model),
            )
        self._record(True, inputs, out.loss, out.logps, out.scores)
        return out.loss / batches

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(without_repeats(inputs, self.accelerator))
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only:
                return self.compute_loss(model, inputs).detach(), None, None
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        self._predicted.add(outputs["scores"], outputs["logps"], inputs["relevance"], inputs["list_sizes"])
        return loss.detach(), None, None  # transformers would gather rows of one length

    # --- batches --------------------------------------------------------------------------------------------

    def get_train_dataloader(self):
        """As transformers.Trainer.get_train_dataloader; with max_tokens_per_batch batches are made by their tokens."""
        if self.args.max_tokens_per_batch is None or self.train_dataset is None:
            return super().get_train_dataloader()
        return self.accelerator.prepare(
            token_batches_loader(self.train_dataset, self.data_collator, self.args, epoch=lambda: int(self.state.epoch or 0))
        )

    def get_eval_dataloader(self, eval_dataset=None):
        if eval_dataset is None or isinstance(eval_dataset, str):
            with self._every_list():
                return super().get_eval_dataloader(eval_dataset)
        # with persistent workers transformers would keep the first such loader and evaluate on it ever after
        return self.get_test_dataloader(eval_dataset, "eval")

    def get_test_dataloader(self, test_dataset, name: str = "test"):
        # a loader that is used once: PyTorch waits 5 s for each persistent worker of a loader that is dropped
        with self._every_list(dataloader_persistent_workers=False):
            return super().get_test_dataloader(self._as_own_data(test_dataset, name))

    def _get_eval_sampler(self, eval_dataset):
        """In the order of the data, whatever train_sampling_strategy is: predictions are told apart by it."""
        return SequentialSampler(eval_dataset)

    @contextlib.contextmanager
    def _every_list(self, **settings: Any) -> Iterator[None]:
        """dataloader_drop_last is for training: an evaluation is of every list. Other `settings` hold for its loader too."""
        settings["dataloader_drop_last"] = False
        before = {name: getattr(self.args, name) for name in settings}
        vars(self.args).update(settings)
        try:
            yield
        finally:
            vars(self.args).update(before)

    def _as_own_data(self, dataset: Any, name: str) -> Any:
        """What `evaluate` and `predict` are given, as the trainer's own data is: tokens, with ref_logps where needed."""
        if is_tokenised(dataset):
            return dataset
        lists = training_lists(dataset, self.processing_class, self.args, name)
        check_tokens(lists, lm_heads.causal_lm(self.model).config, name)
        untrained = self.args.precompute_ref_log_probs and not self.state.global_step
        if self.reference.must_be_filled(lists, name, policy_is_reference=untrained):
            return self._with_ref_logps(lists, name)
        return lists

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of an update, and the number of their lists on all ranks."""
        own = (without_repeats(batch, self.accelerator) for batch in epoch_iterator)
        batches, _ = super().get_batch_samples(own, num_batches, device)
        return batches, lists_of_window(batches, self.accelerator)

    def _prepare_inputs(self, inputs):
        """To the device, in their own dtypes: rewards and log-likelihoods must not be rounded to the model's."""
        if self.args.device.type == "mps":
            inputs["relevance"] = inputs["relevance"].float()  # has no float64
        return send_to_device(inputs, self.args.device, non_blocking=True)

    # --- logs -----------------------------------------------------------------------------------------------

    def _record(self, training: bool, inputs: dict[str, Any], loss: Tensor, logps: Tensor, scores: Tensor) -> None:
        if training:
            self._training_log.add(inputs, loss, logps, scores)
        else:
            self._eval_log.add(loss, scores, inputs["relevance"], inputs["list_sizes"], logps)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            seen = self._training_log.pop(self.accelerator.num_processes, self.args.device)
            if self._finite.skipped and "loss" not in seen and not self._overrides_compute_loss:
                seen["loss"] = float("nan")  # all was left out: the 0 of transformers would be the loss of nothing
            if self.args.on_nonfinite == "skip":
                seen["skipped_batches"] = self._finite.skipped
            logs = logs | seen
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        self._eval_log.clear()
        self._predicted = PredictionLog()
        with self._policies.attached():
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        found = self._eval_log.pop(self.accelerator.num_processes)
        predictions, relevance = self._predicted.pop(self.accelerator.num_processes)
        if self.compute_metrics is not None and predictions is not None:
            found |= denumpify_detensorize(self.compute_metrics(EvalPrediction(predictions=predictions, label_ids=relevance)))
        start = f"{metric_key_prefix}_"
        output.metrics.update({name if name.startswith(start) else start + name: x for name, x in found.items()})
        return output._replace(predictions=predictions, label_ids=relevance)

    def predict(self, *args, **kwargs) -> PredictionOutput:
        """As transformers.Trainer.predict, with a row for each list in the order of the data.

        Returns:
            A PredictionOutput. Its `predictions` are `ListPredictions` (scores, logps) and its `label_ids` the relevance, as
                arrays [lists, most candidates] with NaN behind the last candidate of a shorter list.
        """
        return super().predict(*args, **kwargs)

    def create_model_card(self, language=None, license=None, tags=None, **options) -> None:
        """As transformers.Trainer.create_model_card, with tags of the method and the paper that it is from."""
        objective = self.args.objective if type(self).list_loss is LarPOTrainer.list_loss else None
        super().create_model_card(language, license, model_card.tags(objective, tags), **options)
        if self.is_world_process_zero():
            model_card.name_the_paper(Path(self.args.output_dir) / "README.md", objective)

    # --- checkpoints ----------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As transformers.Trainer.train, but never resumes from a checkpoint that is not whole.

        Args:
            resume_from_checkpoint: a folder, or True for the newest checkpoint that is whole; None for
                `args.resume_from_checkpoint`.
        """
        checkpoint = checkpoint_asked_for(resume_from_checkpoint, self.args)
        if checkpoint and self._sync is not None:
            self._sync.load(checkpoint)
        if isinstance(self.train_dataset, ListStream):
            self.train_dataset.skip = lists_before(checkpoint, self.args)
        if self.args.should_save:
            write_summaries(Path(self.args.output_dir), self.data_summaries, examples=not self.args.push_to_hub)
        self._training_log.start()
        self._policies.attach()
        try:
            return super().train(resume_from_checkpoint=checkpoint, **kwargs)
        finally:
            self._policies.detach()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """As transformers.Trainer.save_model; raises NonFiniteError instead of writing weights that are NaN or infinite."""
        where = self.args.output_dir if output_dir is None else output_dir
        refuse_nonfinite_weights(self.model, where, self.accelerator if is_sharded(self.accelerator) else None)
        super().save_model(output_dir, _internal_call)

    def _save(self, *args, **kwargs):
        """transformers pickles the settings beside the model: without the secrets among them."""
        settings, self.args = self.args, self.args.without_secrets()
        try:
            super()._save(*args, **kwargs)
        finally:
            self.args = settings

    def _save_checkpoint(self, model, trial):
        if self._sync is not None:  # first: a checkpoint is whole once the last file of transformers' own is there
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            self._sync.save(folder, write=self.args.should_save)
        super()._save_checkpoint(model, trial)

    # --- the reference --------------------------------------------------------------------------------------

    @property
    def ref_model(self) -> nn.Module | None:
        """The model that is the reference; None where it is none, in the data, or the policy without its adapter."""
        return self.reference.model

    def _ref_logps(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor | None:
        """Log-likelihood of each candidate under the reference: sums over tokens, [S]; None for no reference."""
        return self.reference.logps(model, inputs, functools.partial(self._slices.logps, batch=inputs))

    def _precompute_ref_logps(self) -> None:
        """Adds the column ref_logps to the data; the policy is still what it was when it was handed over."""
        if self.train_dataset is not None:
            self.train_dataset = self._with_ref_logps(self.train_dataset, "train")
        if self.eval_dataset is not None:
            filled = {name: self._with_ref_logps(one, name) for name, one in self._eval_datasets().items()}
            self.eval_dataset = filled if isinstance(self.eval_dataset, dict) else filled["eval"]

    def _with_ref_logps(self, dataset: Dataset, name: str) -> Dataset:
        self._policies.attach()
        return self.reference.fill(dataset, name, self.model)

    # --- set-up ---------------------------------------------------------------------------------------------

    def _set_up_loss(self, model: nn.Module, args: LarPOConfig) -> None:
        self._list_losses = args.resolved_loss()
        self.objective = self._list_losses.objective
        self._applies_settings = False  # known once a loss has been computed: list_loss may be overridden
        self._router_loss = RouterLoss.asked_for(lm_heads.causal_lm(model), args)

    def _set_up_models(
        self,
        model: nn.Module,
        ref_model: nn.Module | None,
        peft_config: PeftConfig | None,
        optimizer: torch.optim.Optimizer | None,
        data: setup.TrainerData,
        args: LarPOConfig,
    ) -> nn.Module:
        """The model, with its adapter. It and the reference, which is chosen here, accept rows from now on."""
        ids, new_adapter = adapter_start.sample(data.lists.values()), None
        if peft_config is not None:
            model, new_adapter = adapters.with_new_adapter(model, peft_config, ids, args)
        self._policies = AttachedPolicies(
            self._unwrapped,
            schedule=args.schedule,
            memory_budget=args.memory_budget,
            tail_threshold=args.tail_threshold,
            backend=args.kernel_backend,
        )
        self._policies.add("model", model)
        if data.train is not None:
            refuse_foreign_optimizer(optimizer, model)
            if adapters.has_adapter(model):
                adapter_start.refuse_untrainable(model, ids)
        if args.disable_dropout:
            without_dropout(model)
        self.reference = ReferencePolicy.choose(model, ref_model, args, new_adapter, data.lists)
        if self.ref_model is not None:
            self._policies.add("ref_model", self.ref_model)
        return model

    def _unwrapped(self, name: str) -> nn.Module | None:
        model = getattr(self, name)
        return None if model is None else self.accelerator.unwrap_model(model, keep_torch_compile=False)

    def _set_up_run(self, data: setup.TrainerData) -> None:
        """What depends on the device and on how processes share the work, known once transformers.Trainer is set up."""
        args = self.args
        self.model_accepts_loss_kwargs = False
        self._finite = FiniteLoss(self.accelerator, args.on_nonfinite)
        self._slices = CandidateSlices(self.accelerator, args.candidate_micro_batch_size)
        self._training_log, self._eval_log = TrainingLog(args.ndcg_k, args.tail_threshold), ListLog(args.ndcg_k)
        if data.train is not None and not self._keeps_full_precision():
            warn_half_precision(self.model, args.learning_rate)
        if on_deepspeed(self.accelerator) and not is_sharded(self.accelerator):
            self.model.to(args.device)  # DeepSpeed takes it there when training starts; the reference may be scored before
        self._keep_logps_exact()
        self.data_collator.layout = self._layout()
        if lm_heads.causal_lm(self.model).config._attn_implementation != "flex_attention":
            self.data_collator.max_completion_tokens = prefix_sharing.DENSE_MASK_TOKENS
        self.reference.prepare(self.accelerator, self.data_collator)
        self._sync: SyncReference | None = None
        if args.sync_ref_model:
            self._sync = SyncReference(self.model, self.ref_model, args.ref_model_mixup_alpha, args.ref_model_sync_steps)
            self.add_callback(self._sync)
        for name, one in data.lists.items():
            self.reference.compare_with_stored(one, name, self.model)
        if args.precompute_ref_log_probs:
            self._precompute_ref_logps()

    def _keeps_full_precision(self) -> bool:
        """Whether float32 weights are held elsewhere (FSDP, DeepSpeed), or the model's own are quantised and not trained."""
        if getattr(lm_heads.causal_lm(self.model), "is_quantized", False) or on_deepspeed(self.accelerator):
            return True
        return self.is_fsdp_enabled and self.accelerator.mixed_precision != "no"

    def _keep_logps_exact(self) -> None:
        """FSDP2 as accelerate sets it up rounds every output to the parameters' dtype: log-likelihoods of hundreds of nats
        would be known to whole nats in bf16. Nothing else depends on that: activations are in that dtype already."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if self.accelerator.is_fsdp2 and plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)

    def _layout(self) -> Layout:
        """How candidates are laid out in rows, settled before any worker process gets a copy of the collator."""
        return choose_layout(self.model, self.args.share_prefix, self._differs_when_shared)

    def _differs_when_shared(self) -> str | None:
        if is_sharded(self.accelerator):
            return None  # parameters are not whole here: the table of known architectures has to do
        dataset = self.train_dataset if self.train_dataset is not None else next(iter(self._eval_datasets().values()))
        dataset = dataset.first if isinstance(dataset, ListStream) else dataset
        if len(dataset) == 0:
            return None
        with self.accelerator.autocast():
            return differs_when_shared(self.model, dataset[0], self.data_collator.pad_token_id, self._prepare_inputs)

    def _eval_datasets(self) -> dict[str, Dataset]:
        return self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}

"""LarPOConfig: what a training run is, with transformers.TrainingArguments for everything that is not ours."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, fields
from typing import Any, get_args, get_type_hints

from transformers import TrainingArguments

from larpo_kernels import validation
from larpo_kernels.linear.schedules import SCHEDULES
from larpo_kernels.objectives import Objective

from .data.limits import PROMPT_LENGTH, TokenLimits, Truncation
from .field_docs import documented
from .runs.checks import check_choice, check_count
from .runs.secrets import given_again, is_secret, masked, without_secrets
from .runs.yaml_config import as_meant, json_object
from .training.losses import ListLoss, objective_of
from .training.nonfinite import ON_NONFINITE
from .training.refused_settings import refuse_settings

COUNTS = {  # settings that are None or whole numbers, and the least of each
    "candidate_micro_batch_size": 1,
    "precompute_ref_batch_size": 1,
    "ndcg_k": 1,
    "max_tokens_per_batch": 1,
    "list_top": 0,
    "list_bottom": 0,
}


@documented
@dataclass
class LarPOConfig(TrainingArguments):
    """Arguments of `LarPOTrainer`: those below, and all of transformers.TrainingArguments.

    A batch is counted in lists (prompts): `per_device_train_batch_size=2` with 8 completions per prompt runs 16
    candidates. Other defaults than in TrainingArguments: learning_rate 1e-6, logging_steps 10.

    Args:
        learning_rate: Initial learning rate.
        logging_steps: Log every so many steps; a share of all steps if below 1.
        remove_unused_columns: Must stay False: the data's columns are lists, not the model's arguments.
        objective: Ranking loss: pairwise, contrastive, listmle, lambdarank or listnet.
        objective_options: Options of the objective, a dict (JSON on a command line): {'weighting': 'dcg', 'k': 5} for
            lambdarank.
        ties: What pairwise, contrastive and listmle do with equal scores: mean over their orders (pairwise, contrastive),
            efron (listmle), skip such lists, or take the order they stand in. None: mean or efron.
        beta: Scale of the implicit reward beta * (log pi - log pi_ref), > 0.
        length_normalized: Use the mean log-prob of a candidate's tokens instead of the sum.
        reference_free: Leave the reference policy out: scores are beta * log pi.
        label_smoothing: Share of preferences taken to be noise, as in cDPO; below 0.5. Not for listmle.
        margin: How far a candidate must be ahead in implicit reward, per unit of difference in scores.
        sft_weight: Weight of the negative log-likelihood per token of the best candidate (rpo_alpha of earlier TRL).
        on_nonfinite: A batch whose loss is NaN or infinite: 'raise' stops before the update, 'skip' leaves it out and counts
            it.
        list_top: Candidates of each list that are trained on, from the best on; together with list_bottom (None: all).
        list_bottom: Candidates of each list that are trained on, from the worst on; together with list_top (None: all).
        max_length: Most tokens of prompt + completion; completions lose their end. None: no limit.
        max_prompt_length: Most tokens of a prompt, below max_length (not given: half of it, 512 at most). None: no limit.
        truncation_mode: Which end of a prompt that is too long stays: keep_end or keep_start.
        append_eos: End completions that are plain strings with the tokenizer's EOS.
        max_tokens_per_batch: Most tokens of a batch on each device, padding counted: a batch is as many whole lists of
            similar lengths as fit, instead of per_device_train_batch_size lists.
        dataset_num_proc: Processes that tokenise the data.
        ref_logps: A file that `larpo score` wrote, or a folder of such, with the reference's log-likelihoods of all
            candidates, which are found by their tokens.
        precompute_ref_log_probs: Score the data under the reference once, before training.
        precompute_ref_batch_size: Lists per batch while precompute_ref_log_probs scores (None: the training batch size).
        sync_ref_model: Move the reference towards the policy every ref_model_sync_steps steps.
        ref_model_mixup_alpha: alpha of sync_ref_model's ref = alpha * policy + (1 - alpha) * ref.
        ref_model_sync_steps: Steps between two moves of sync_ref_model.
        model_init_kwargs: Arguments of from_pretrained where model is a name or a path.
        disable_dropout: Set every dropout of the policy and the reference to 0.
        share_prefix: Run the prompt of a list once for all its candidates, where the model allows it.
        candidate_micro_batch_size: Run this many candidates at a time, with the exact gradient of whole lists, for one more
            forward.
        schedule: What the head keeps of the logits for the backward: frozen_head (nothing, for a head that is not trained),
            list_hold (all), recompute (nothing, they are formed again) or auto, by what memory_budget allows.
        memory_budget: Bytes the head may use beyond gradients (None: half of what is free).
        tail_threshold: A probability, such as 2**-12 = 0.000244: gradients are formed only of the vocabulary rows that some
            token gives more (None: of all rows, exact).
        kernel_backend: torch or triton (None: the best one on the device).
        pad_to_multiple_of: Round padded lengths up to a multiple of this.
        ndcg_k: Cut-off of the logged ndcg (None: the whole list).
    """

    learning_rate: float = 1e-6
    logging_steps: float = 10
    remove_unused_columns: bool = False

    # --- the loss
    objective: str = "contrastive"
    objective_options: dict[str, Any] | str | None = None
    ties: str | None = None
    beta: float = 0.1
    length_normalized: bool = False
    reference_free: bool = False
    label_smoothing: float = 0.0
    margin: float = 0.0
    sft_weight: float = 0.0

    on_nonfinite: str = "raise"

    # --- the lists
    list_top: int | None = None
    list_bottom: int | None = None
    max_length: int | None = 1024
    max_prompt_length: int | None = PROMPT_LENGTH
    truncation_mode: Truncation = "keep_end"
    append_eos: bool = True
    max_tokens_per_batch: int | None = None
    dataset_num_proc: int | None = None

    # --- the reference policy
    ref_logps: str | None = None
    precompute_ref_log_probs: bool = False
    precompute_ref_batch_size: int | None = None
    sync_ref_model: bool = False
    ref_model_mixup_alpha: float = 0.6
    ref_model_sync_steps: int = 512

    # --- the model, and how it is run
    model_init_kwargs: dict[str, Any] | str | None = None
    disable_dropout: bool = True
    share_prefix: bool = False
    candidate_micro_batch_size: int | None = None
    schedule: str = "auto"
    memory_budget: int | None = None
    tail_threshold: float | None = None
    kernel_backend: str | None = None
    pad_to_multiple_of: int | None = None
    ndcg_k: int | None = None

    def __post_init__(self):
        self._read_values()
        super().__post_init__()
        self.label_names = self.label_names or []  # the trainer's own; or transformers looks for a PEFT model's and warns
        self.logging_nan_inf_filter = False  # it would wait for each loss once more, and log another number in its place
        check_choice("truncation_mode", self.truncation_mode, get_args(Truncation))
        self.max_prompt_length = self.token_limits().max_prompt_length
        validation.positive("beta", self.beta)
        self.resolved_loss()  # refused here, not after the model is loaded
        self._check_lists()
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("on_nonfinite", self.on_nonfinite, ON_NONFINITE)
        check_choice("kernel_backend", self.kernel_backend, (None, "torch", "triton"))
        if self.tail_threshold is not None:
            validation.probability("tail_threshold", self.tail_threshold)
        refuse_settings(self)
        self._check_reference()

    def _read_values(self) -> None:
        """Values as a YAML file or a command line gives them, as the types of the fields say; secrets as they were given."""
        hints = get_type_hints(LarPOConfig)
        for one in fields(LarPOConfig):
            if one.init and one.name != "fsdp":  # where transformers itself puts True
                setattr(self, one.name, as_meant(one.name, getattr(self, one.name), hints[one.name]))
        for name in ("objective_options", "model_init_kwargs"):
            value = getattr(self, name)
            if isinstance(value, str):
                setattr(self, name, json_object(name, value))
            if isinstance(getattr(self, name), dict):
                setattr(self, name, given_again(getattr(self, name), f"{name}."))
        self.hub_token = given_again({"hub_token": self.hub_token}).get("hub_token")

    def _check_lists(self) -> None:
        for name, least in COUNTS.items():
            check_count(name, getattr(self, name), least)
        if (self.list_top is None) != (self.list_bottom is None):
            raise ValueError(f"list_top and list_bottom go together, got {self.list_top} and {self.list_bottom}")
        if self.list_top is not None and self.list_top + self.list_bottom < 2:
            raise ValueError(f"list_top + list_bottom must be at least 2, got {self.list_top} + {self.list_bottom}")

    def _check_reference(self) -> None:
        if self.ref_logps is not None:
            self.ref_logps = os.fspath(self.ref_logps)
            for name in ("reference_free", "precompute_ref_log_probs", "sync_ref_model"):
                if getattr(self, name):
                    raise ValueError(
                        f"ref_logps brings the log-likelihoods of a reference that stays, so {name} must be left out"
                    )
        if self.sync_ref_model and (self.reference_free or self.precompute_ref_log_probs):
            raise ValueError("sync_ref_model needs a reference model; reference_free and precompute_ref_log_probs have none")

    def to_dict(self) -> dict[str, Any]:
        """As in TrainingArguments, for what logs and reports the settings: secrets are masked at any depth."""
        settings = super().to_dict()  # which has a text of its own for a token, also where there is none
        return {name: masked(None if getattr(self, name) is None else value, name) for name, value in settings.items()}

    def __str__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in sorted(self.to_dict().items()))})"

    __repr__ = __str__

    def without_secrets(self) -> LarPOConfig:
        """A copy for training_args.bin, which is shared with the model: tokens, keys and passwords are not there."""
        shared = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, str | dict):
                setattr(shared, name, None if is_secret(name) else without_secrets(value))
        return shared

    def token_limits(self) -> TokenLimits:
        """How long prompts and completions may be, and what ends them."""
        return TokenLimits(self.max_length, self.max_prompt_length, self.truncation_mode, self.append_eos)

    def resolved_objective(self) -> Objective:
        """The objective with its options."""
        return objective_of(self.objective, self.ties, self.objective_options)

    def resolved_loss(self) -> ListLoss:
        """What a list costs: the objective with the settings of the loss."""
        return ListLoss(
            self.resolved_objective(),
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            margin=self.margin,
            sft_weight=self.sft_weight,
            length_normalized=self.length_normalized,
            backend=self.kernel_backend,
        )

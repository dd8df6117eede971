"""Where the reference's log-likelihoods come from: nowhere, the data, the policy without its adapter, or a model of its own."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import fsdp2_prepare_model, gather_object
from torch import Tensor, nn

from ..data.scored_tokens import SCORED_WITH, counted_tokens, model_name, reference
from . import adapters
from .checks import refuse_shared
from .dataset_logps import candidate_logps
from .eval_mode import in_eval_mode
from .reference_model import frozen_copy, without_dropout
from .sharding import is_sharded, on_deepspeed, reshard, will_replace_parameters

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset

    from ..config import LarPOConfig
    from ..data.collator import ListCollator
    from .adapter_start import AdapterStart

logger = logging.getLogger(__name__)

COMPARED_LISTS, FAR_PER_TOKEN = 2, 0.1  # nats; scoring in bf16 is off by less
DEEPSPEED_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Way(Enum):
    """Where ref_logps of a batch come from."""

    NONE = "reference_free: there is no reference"
    STORED = "every row has them: given with the data, or written before training"
    ADAPTER_OFF = "the policy with its adapter switched off"
    MODEL = "a model of its own"


@dataclass
class ReferencePolicy:
    """The reference of one training run; `choose` decides which it is, `prepare` takes it to where it runs."""

    way: Way
    args: LarPOConfig = field(repr=False)
    model: nn.Module | None = field(default=None, repr=False)
    adapter_off: bool = False  # the model that stands for it, or before training the policy, has its adapter off
    accelerator: Accelerator = field(init=False, repr=False)
    collator: ListCollator = field(init=False, repr=False)

    @classmethod
    def choose(
        cls,
        policy: nn.Module,
        given: nn.Module | None,
        args: LarPOConfig,
        new_adapter: AdapterStart | None,
        lists: Mapping[str, Dataset],
    ) -> ReferencePolicy:
        """Decides what the reference of `policy` is, before anything wraps or trains it.

        Args:
            given: the reference that was asked for, or None for the policy as it was handed over.
            new_adapter: what is known of the adapter that the policy was given since it was handed over, if it was.
            lists: the data sets by name, which may have ref_logps.

        Raises ValueError for a reference that would not be asked, would move with training, or could not follow it.
        """
        having = [name for name, one in lists.items() if "ref_logps" in one.column_names]
        if given is not None and (args.reference_free or having):
            why = "reference_free is set" if args.reference_free else f"the {having[0]} data has ref_logps"
            raise ValueError(f"ref_model is given, but {why}: it would not be asked. Leave one of the two out")
        if args.reference_free:
            chosen = cls(Way.NONE, args)
        elif given is not None:
            refuse_shared(policy, given)
            model = without_dropout(given) if args.disable_dropout else given
            chosen = cls(Way.MODEL, args, model.requires_grad_(False).eval())
        elif new_adapter is not None and new_adapter.off_is_start and not new_adapter.trained_outside:
            chosen = cls(Way.ADAPTER_OFF, args, adapter_off=True)
        else:
            chosen = cls._as_handed_over(policy, args, new_adapter, stored=len(having) == len(lists))
        if args.sync_ref_model and (chosen.way is not Way.MODEL or chosen.adapter_off):
            raise ValueError(
                "sync_ref_model needs a reference model; here the reference is the model without its adapter or given"
            )
        return chosen

    @classmethod
    def _as_handed_over(
        cls, policy: nn.Module, args: LarPOConfig, new_adapter: AdapterStart | None, *, stored: bool
    ) -> ReferencePolicy:
        """The policy as it was before training and before a new adapter: its log-likelihoods are stored, or a copy is held."""
        off = False
        if new_adapter is not None and not stored:
            off = not new_adapter.on_is_start
            if off and not new_adapter.off_is_start:
                raise ValueError(
                    "the model with the adapter of peft_config is another one than was handed over, whether the adapter is on "
                    "or off, so there is no reference: give ref_model, or an adapter that starts from the model as it is"
                )
        if stored or args.precompute_ref_log_probs:
            return cls(Way.STORED, args, adapter_off=off)
        copy = frozen_copy(policy, share_frozen=not will_replace_parameters(args))
        if off:
            copy.base_model.disable_adapter_layers()
        return cls(Way.MODEL, args, copy, adapter_off=off)

    # --- set-up ---------------------------------------------------------------------------------------------

    def prepare(self, accelerator: Accelerator, collator: ListCollator) -> None:
        """Moves the model to its device, wrapped as accelerate wraps the policy. collator: makes batches of the data."""
        self.accelerator, self.collator = accelerator, collator
        if self.model is not None:
            self.model = self._prepared(self.model)

    def release(self) -> None:
        """Log-probs are precomputed: frees the reference model, if there is one."""
        if self.way is Way.MODEL:
            self.way, self.model = Way.STORED, None

    # --- log-likelihoods ------------------------------------------------------------------------------------

    @torch.no_grad()
    def logps(self, policy: nn.Module, inputs: Mapping[str, Any], logps_of: Callable[[nn.Module], Tensor]) -> Tensor | None:
        """Log-likelihood of each candidate: sums over tokens, [S]; None for no reference.

        policy: as it is trained, wrapped; logps_of: a model's log-likelihoods of the same inputs, [S].
        """
        if self.way is Way.NONE:
            return None
        if "ref_logps" in inputs:
            return inputs["ref_logps"]
        if self.way is Way.MODEL:
            logps = logps_of(self.model)
            reshard(self.model)
            return logps
        with self._switched(self.accelerator.unwrap_model(policy)):
            with in_eval_mode(policy):
                logps = logps_of(policy)
            reshard(policy)  # PEFT is about to set requires_grad: on gathered parameters it would be forgotten
        return logps

    def compare_with_stored(self, dataset: Dataset, name: str, policy: nn.Module) -> None:
        """Warns where ref_logps that came with the data are far from those of the policy that was handed over, on a few lists.

        By default that policy is the reference. Where the data names another one, that is only logged. With sharded parameters
        nothing is compared.
        """
        if "ref_logps" not in dataset.column_names or self.way is Way.NONE or is_sharded(self.accelerator):
            return
        rows = dataset.select(range(min(len(dataset), COMPARED_LISTS)))
        with self._switched(policy), self.accelerator.autocast():
            found = candidate_logps(policy, rows, self.collator, batch_size=1, device=self.args.device, progress=False)
        lengths = [max(n, 1) for row in rows for n in counted_tokens(row)]
        off = [abs(a - b) for i, row in enumerate(rows) for a, b in zip(row["ref_logps"], found[i], strict=True)]
        per_token = sum(off) / sum(lengths)
        if per_token <= FAR_PER_TOKEN or not self.accelerator.is_main_process:
            return
        of, _ = reference(rows[0].get(SCORED_WITH))
        figures = f"off by {per_token:.3g} nats a token, {max(off):.3g} a candidate, in the first {len(rows)} lists"
        if of is not None and of != model_name(policy):
            logger.warning("ref_logps of the %s data are of %s, not of the policy that is trained: %s", name, of, figures)
        else:
            warnings.warn(
                f"ref_logps of the {name} data are not those of the policy that is handed over: {figures}. If no other "
                "reference is meant, score the lists under this model, with this tokenizer and these limits",
                stacklevel=4,
            )

    def fill(self, dataset: Dataset, name: str, policy: nn.Module) -> Dataset:
        """The data with the column ref_logps, while the policy is still what it was when it was handed over."""
        if "ref_logps" in dataset.column_names or self.way is Way.NONE:
            return dataset
        args, accelerator = self.args, self.accelerator
        rank, ranks = accelerator.process_index, accelerator.num_processes
        sharded = is_sharded(accelerator)
        scorer = self.model or (self._sharded_copy(policy) if sharded else policy)
        with self._switched(scorer):
            found = candidate_logps(
                scorer,
                dataset,
                self.collator,
                batch_size=args.precompute_ref_batch_size or args.per_device_train_batch_size,
                device=args.device,
                autocast=accelerator.autocast(),
                shard=(rank, ranks),
                collective=sharded,
                description=f"Reference log-probs ({name})",
                progress=not args.disable_tqdm and rank == 0,
            )
        if ranks > 1:
            found = {i: part for one in gather_object([found]) for i, part in one.items()}
        return dataset.add_column("ref_logps", [found[i] for i in range(len(dataset))])

    def must_be_filled(self, dataset: Dataset, name: str, *, policy_is_reference: bool) -> bool:
        """Whether data that comes after the trainer was made needs `fill`: no reference is held to ask batch by batch.

        policy_is_reference: ref_logps are precomputed, and the policy is still untrained. Raises ValueError where it is not.
        """
        if "ref_logps" in dataset.column_names or self.way is not Way.STORED:
            return False
        if not policy_is_reference:
            raise ValueError(
                f"the {name} data has no ref_logps, and no reference model is held to compute them: hand it to the trainer as "
                "eval_dataset, or write them with `larpo score`"
            )
        return True

    def _prepared(self, reference: nn.Module) -> nn.Module:
        accelerator = self.accelerator
        if accelerator.is_fsdp2:
            return fsdp2_prepare_model(accelerator, reference)
        if is_sharded(accelerator):
            raise ValueError(
                f"a reference model beside a policy sharded by {self._kind_of_sharding()} is not supported: give the data "
                "ref_logps (`larpo score` writes them), or train an adapter with peft_config, without biases"
            )
        if on_deepspeed(accelerator):  # it casts the policy's parameters, not its buffers: rotary frequencies stay in float32
            dtype = DEEPSPEED_DTYPES.get(accelerator.mixed_precision)
            for p in reference.parameters() if dtype else ():
                p.data = p.data.to(dtype)
            return reference.to(self.args.device)
        return accelerator.prepare_model(reference, evaluation_mode=True)

    def _kind_of_sharding(self) -> str:
        return "ZeRO-3" if on_deepspeed(self.accelerator) else "FSDP1"

    def _sharded_copy(self, policy: nn.Module) -> nn.Module:
        """The policy as it is, sharded to be scored: itself it is sharded when training begins."""
        if not self.accelerator.is_fsdp2:
            raise ValueError(
                f"precompute_ref_log_probs does not work with parameters sharded by {self._kind_of_sharding()}: "
                "`larpo score` writes ref_logps"
            )
        if any(hasattr(p, "full_tensor") for p in policy.parameters()):
            raise ValueError("ref_logps of further data can't be had once parameters are sharded: hand it over as eval_dataset")
        return self._prepared(frozen_copy(policy, share_frozen=False))

    @contextlib.contextmanager
    def _switched(self, policy: nn.Module) -> Iterator[None]:
        """While it lasts, the policy is the reference as far as it can be: with its adapter off."""
        with adapters.switched_off(policy) if self.adapter_off and self.model is None else contextlib.nullcontext():
            yield

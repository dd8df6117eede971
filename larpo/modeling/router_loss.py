"""The loss that keeps the experts of a mixture in balance, added as the model's own forward adds it.

With f_e the share of a batch's tokens that expert e is chosen for and P_e its mean probability, over the tokens of all layers,

    loss = list loss + router_aux_loss_coef * E sum_e f_e P_e                (Switch Transformers, arXiv 2101.03961, eq. 4 to 6)

A config with output_router_logits asks for it. It is of the tokens that the backbone runs, prompts included and padding not:
with share_prefix a prompt counts once for its list.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .eval_mode import in_eval_mode

if TYPE_CHECKING:
    from ..config import LarPOConfig

CHECKED_TOKENS = 8


@dataclass(frozen=True)
class RouterLoss:
    """What a batch's router loss is made of; `coefficient` is for the caller."""

    coefficient: float
    experts_per_token: int
    balance: Callable[..., Tensor]  # of transformers: router logits, experts, experts per token, mask -> []

    @classmethod
    def asked_for(cls, lm: Any, args: LarPOConfig | None = None) -> RouterLoss | None:
        """The router loss of a causal LM, compared with its own forward on a few tokens; None where its config asks for none.

        Raises ValueError where the config asks for a loss that cannot be added: the model's is of another kind, or a setting in
        `args` leaves it without its value or gradient.
        """
        config = lm.config.get_text_config()
        balance = getattr(sys.modules[type(lm).__module__], "load_balancing_loss_func", None)
        if not getattr(config, "output_router_logits", False) or balance is None:
            return None
        coefficient = getattr(config, "router_aux_loss_coef", None)
        chosen = getattr(lm, "num_experts_per_tok", None) or getattr(config, "num_experts_per_tok", None)
        if coefficient == 0:
            return None
        why = "its config has no router_aux_loss_coef and num_experts_per_tok"
        if args is not None and (in_the_way := _in_the_way(args)):
            why = in_the_way
        elif coefficient is not None and chosen is not None:
            found = cls(float(coefficient), int(chosen), balance)
            why = found._differs_from_own(lm)
            if why is None:
                return found
        raise ValueError(
            f"output_router_logits is set, but the router's auxiliary loss of {type(lm).__name__} cannot be added: {why}. "
            "Set output_router_logits=False in the model's config to train without it"
        )

    def __call__(self, router_logits: tuple[Tensor, ...], rows: Mapping[str, Tensor]) -> Tensor:
        """E sum_e f_e P_e of the tokens in rows (see row_layouts.py), []."""
        mask = rows.get("attention_mask")
        if "segments" in rows:
            mask = (rows["segments"] >= 0).int()
        return self.balance(router_logits, router_logits[0].shape[-1], self.experts_per_token, mask)

    @torch.no_grad()
    def _differs_from_own(self, lm: Any) -> str | None:
        """The reason why this is not what the model's own forward reports; None where it is."""
        config = lm.config.get_text_config()
        ids = torch.arange(CHECKED_TOKENS, device=lm.device)[None] % config.vocab_size
        if lm.device.type == "meta" or any(hasattr(p, "ds_id") for p in lm.parameters()):
            return None  # FSDP or ZeRO-3 hold the weights elsewhere: nothing can be run yet
        try:
            with in_eval_mode(lm):
                own = lm(input_ids=ids, use_cache=False, output_router_logits=True).aux_loss
                ours = self(lm.base_model(input_ids=ids, use_cache=False, output_router_logits=True).router_logits, {})
        except (AttributeError, TypeError, IndexError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        if not torch.is_tensor(own) or not torch.allclose(own.float(), ours.float(), rtol=1e-2):
            return f"its own forward reports {own}, its router logits make {ours}"
        return None


def _in_the_way(args: LarPOConfig) -> str | None:
    """Why a setting would give the loss another value than the batch's, or no gradient; None if none does."""
    if args.candidate_micro_batch_size is not None:
        return "it is of a whole batch, and candidate_micro_batch_size runs parts of it"
    if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        return "gradient_checkpointing with use_reentrant=True leaves router logits without a gradient; set it to False"
    return None

"""A causal LM that answers with log-likelihoods: rows of tokens in, one number per candidate out, in one forward.

The head's log-probs are computed inside the model's own forward, so that whatever wraps the model (DDP, FSDP, autocast)
sees an ordinary call, and gathered weights are whole when they are read.
"""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import larpo_kernels as lk

from . import lm_heads, row_checks, row_layouts
from .router_loss import RouterLoss


class Policy:
    """How candidates' log-likelihoods are computed for one model: the path to them, checked on the first batch.

    Args:
        model: a causal LM of transformers, or one with a PEFT adapter.
        schedule, memory_budget, tail_threshold, backend: of the fused head, as in `larpo_kernels.linear_sequence_logps`.
        alone: other processes run other batches, or none: they are not asked how the model is to be called.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        schedule: str = "auto",
        memory_budget: int | None = None,
        tail_threshold: float | None = None,
        backend: str | None = None,
        alone: bool = False,
    ):
        self.alone = alone
        self.options = dict(schedule=schedule, memory_budget=memory_budget, tail_threshold=tail_threshold, backend=backend)
        self.calls: dict[tuple[str, lm_heads.AdapterState], row_checks.Call] = {}  # known after a first batch
        self.wrapped: dict[str, Any] = {}  # while detached: what accelerate had made of the forward
        refuse(model)

    @torch.compiler.disable(recursive=False)  # torch.compile is for the backbone, which is called from here
    def logps(
        self, model: nn.Module, batch: Mapping[str, Tensor], router_loss: RouterLoss | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Sum of token log-probs of each candidate in `batch` (see larpo/modeling/row_layouts.py): [S] float32, nats; with
        router_loss also that loss of the batch, [].

        Raises ValueError at the first batch of a model that computes something else in such rows than alone."""
        lm = lm_heads.causal_lm(model)
        call = self._call(lm, batch)
        inputs = _inputs_of(batch, lm.config, compute_dtype(lm), call.with_positions)
        if "output_router_logits" in inputs:
            inputs["output_router_logits"] = router_loss is not None
        at, labels, cu_seqlens = batch["predictor_positions"], batch["labels"], batch["cu_seqlens"]
        if call.why_logits is None:
            out = lm.base_model(**inputs, use_cache=False)
            logps = self._head(lm, out.last_hidden_state.flatten(0, 1).index_select(0, at), labels, cu_seqlens)
        else:
            out = _own_forward(lm)(**inputs, use_cache=False)
            logits = out.logits.flatten(0, 1).index_select(0, at)
            logps = lk.sequence_logps(logits, labels, cu_seqlens=cu_seqlens, ignore_index=None, backend=self.options["backend"])
        return logps if router_loss is None else (logps, router_loss(out.router_logits, batch))

    @torch.compiler.disable
    def _head(self, lm: nn.Module, hidden: Tensor, labels: Tensor, cu_seqlens: Tensor) -> Tensor:
        post = lm_heads.post_processing(lm.config)
        # Rows hold only tokens that count, so there is no ignore_index: the device need not be asked how many are ignored.
        options = {"logit_scale": post.logit_scale, "softcap": post.softcap, "ignore_index": None, **self.options}

        def logps(hidden: Tensor) -> Tensor:
            hidden, weight, bias = lm_heads.head_inputs(lm, hidden)
            return lk.linear_sequence_logps(hidden, weight, labels, bias=bias, cu_seqlens=cu_seqlens, **options)

        return lm_heads.within_head(lm, logps, hidden)

    @torch.compiler.disable
    def _call(self, lm: nn.Module, batch: Mapping[str, Tensor]) -> row_checks.Call:
        """How `lm` is to be called: checked once for a layout of rows and for a state of an adapter on its head."""
        known_by = row_layouts.layout_of(batch), lm_heads.adapter_state(lm)
        if known_by not in self.calls:
            call = self.calls[known_by] = row_checks.choose(lm, batch, _own_forward(lm), compute_dtype(lm), self._agreed)
            if call.why_logits is not None:
                warnings.warn(
                    f"{type(lm).__name__} is trained from its logits, which takes more memory than hidden states: "
                    f"{call.why_logits}",
                    stacklevel=2,
                )
        return self.calls[known_by]

    def _agreed(self, reason: str | None) -> str | None:
        """The same answer on every process: one that must fall back takes all along, since collectives must match."""
        if self.alone or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return reason
        reasons: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(reasons, reason)
        return next((r for r in reasons if r is not None), None)


def attach(model: nn.Module, policy: Policy) -> nn.Module:
    """Makes `model.forward` accept `rows=`: model(rows=batch) gives log-likelihoods [S], with router_loss=... also that loss.
    Any other call is what it was.

    `inspect.signature(model.forward)` shows the model's own parameters beside these: from it transformers settles what
    `generate` passes (position_ids, logits_to_keep) and which columns of a data set a Trainer keeps.
    """
    model._larpo_policy = policy
    if accepts_rows(model):  # autocast may have wrapped this forward since: it stays
        return model
    model._larpo_forward = model.forward
    model._larpo_before = _taken(model)
    vars(model).update(policy.wrapped or {"forward": types.MethodType(_forward_like(model._larpo_forward), model)})
    policy.wrapped = {}
    return model


def detach(model: nn.Module) -> nn.Module:
    """Gives the model the forward back that it had before `attach`. A later `attach` of the same policy brings back what
    accelerate wrapped the other one in."""
    if accepts_rows(model):
        policy, before = model._larpo_policy, model._larpo_before
        policy.wrapped = _taken(model)
        del model._larpo_forward, model._larpo_policy, model._larpo_before
        vars(model).update(before)
    return model


@contextmanager
def attached(model: nn.Module, policy: Policy) -> Iterator[nn.Module]:
    """The model with `policy` attached, and afterwards as it was: a trainer may be at work on it."""
    before = model._larpo_policy if accepts_rows(model) else None
    attach(model, policy)
    try:
        yield model
    finally:
        if before is None:
            detach(model)
        else:
            model._larpo_policy = before


class AttachedPolicies:
    """The models of a trainer with their policies, attached while the trainer is at work. In between the models have their own
    forward, for whatever else they are used for.

    models: the model of a name, or None where it has been freed; it is asked each time, since FSDP1 puts a wrapper in its
        place. options: as in `Policy`.
    """

    def __init__(self, models: Callable[[str], nn.Module | None], **options: Any):
        self._models, self._options = models, options
        self._policies: dict[str, Policy] = {}
        self._detached = False

    def add(self, name: str, model: nn.Module) -> None:
        self._policies[name] = Policy(model, **self._options)
        attach(model, self._policies[name])

    def attach(self) -> None:
        if self._detached:
            self._detached = False
            for model, policy in self._pairs():
                attach(model, policy)

    def detach(self) -> None:
        self._detached = True
        for model, _ in self._pairs():
            detach(model)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """They are attached while it lasts, and afterwards as before."""
        detached = self._detached
        self.attach()
        try:
            yield
        finally:
            if detached:
                self.detach()

    def _pairs(self) -> list[tuple[nn.Module, Policy]]:
        found = ((self._models(name), policy) for name, policy in self._policies.items())
        return [(model, policy) for model, policy in found if model is not None]


def accepts_rows(model: nn.Module) -> bool:
    """Whether `attach` has been here, however the forward is wrapped by now."""
    return "rows" in inspect.signature(model.forward).parameters


# What a wrapped forward leaves on a model. accelerate wraps no model in autocast that has the last of them, so they go and
# come with the forward.
FORWARD = ("forward", "_original_forward", "_is_accelerate_prepared")


def _taken(model: nn.Module) -> dict[str, Any]:
    return {name: vars(model).pop(name) for name in FORWARD if name in vars(model)}


_inputs_of = torch.compiler.disable(row_checks.inputs_of)


def _forward_like(own: Callable) -> Callable:
    """An unbound forward that accepts rows, with the signature of `own` beside its own parameters.

    Not by functools.wraps: accelerate takes off whatever is found under `__wrapped__`. It holds no model, so that copies of
    one call themselves, and its name is one that pickle finds on every model.
    """

    def forward(self, *args, rows: Mapping[str, Tensor] | None = None, router_loss: RouterLoss | None = None, **kwargs):
        if rows is None:
            return self._larpo_forward(*args, **kwargs)
        return self._larpo_policy.logps(self, rows, router_loss)

    parameters = list(inspect.signature(own).parameters.values())
    after = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
    first, _, *added, _ = inspect.signature(forward).parameters.values()
    first = first.replace(kind=inspect.Parameter.POSITIONAL_ONLY)
    forward.__signature__ = inspect.Signature([first, *parameters[: len(parameters) - len(after)], *added, *after])
    return torch.compiler.disable(forward, recursive=False)


def _own_forward(lm: nn.Module) -> Callable:
    """The forward that lm had before `attach`: what wraps it now (autocast, FSDP) is running already, and must not be entered
    twice (accelerate's autocast would stay on for good)."""
    return getattr(lm, "_larpo_forward", lm.forward)


def refuse(model: nn.Module) -> None:
    """Raises ValueError for models that cannot be a policy here, with the reason."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"model must be a decoder-only causal LM, got the encoder-decoder {type(model).__name__}")
    for name, config in getattr(model, "peft_config", {}).items():
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"PEFT adapter {name!r} is prompt learning ({type(config).__name__}): its virtual tokens shift every position, "
                "which this trainer does not support. Use LoRA or another adapter on the weights"
            )


def compute_dtype(lm: nn.Module) -> torch.dtype:
    """The dtype attention runs in, for additive masks."""
    device = lm.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else lm.dtype

"""What putting an adapter on a policy changes, found on a few tokens of the data before anything is trained.

The reference of an adapter's training is the policy that was handed over. The policy with its adapter off is that only if
putting the adapter on changed no weight (PiSSA and OLoRA subtract from the base what the adapter starts with), and stays
that only if nothing is trained outside the adapter (biases).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .eval_mode import in_eval_mode
from .lm_heads import causal_lm

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel

PROMPT_TOKENS, COMPLETION_TOKENS = 48, 32
BASE_AS_IT_IS = (True, False, "gaussian", "orthogonal")  # values of LoraConfig.init_lora_weights


@dataclass(frozen=True)
class AdapterStart:
    """What holds of a policy with a new adapter, before it is trained.

    off_is_start, on_is_start: whether the policy with the adapter off, on, is the policy that was handed over.
    trained_outside: names of trained parameters that are in effect with the adapter off.
    """

    off_is_start: bool
    on_is_start: bool
    trained_outside: tuple[str, ...] = ()


def sample(data_sets: Iterable[Dataset]) -> list[int]:
    """Some tokens of the first list: the end of its prompt and the start of its longest completion; none without data."""
    row = next((data[0] for data in data_sets if len(data)), None)
    if row is None:
        return []
    return [*row["prompt_ids"][-PROMPT_TOKENS:], *max(row["completion_ids"], key=len)[:COMPLETION_TOKENS]]


def can_run(model: nn.Module, ids: Sequence[int]) -> bool:
    """Whether the model can be called already: ZeRO-3 cuts parameters as they are made, others may be on no device yet."""
    if len(ids) < 2 or any(hasattr(p, "ds_id") or p.is_meta for p in model.parameters()):
        return False
    on_cpu = next(model.parameters()).device.type == "cpu"
    return not (on_cpu and "flash" in (causal_lm(model).config._attn_implementation or ""))


def token_logps(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """Log-likelihoods of ids[1:] under the causal LM inside the model, which is what the trainer calls: [T - 1] float32."""
    return _token_logps(causal_lm(model), ids)


def handed_over(model: nn.Module, ids: Sequence[int]) -> Tensor | None:
    """`token_logps` of a model before it is given an adapter; None where it can't be called yet."""
    if not can_run(model, ids):
        return None
    with in_eval_mode(model), torch.no_grad():
        return token_logps(model, ids)


def compare(model: PeftModel, before: Tensor | None, ids: Sequence[int]) -> AdapterStart:
    """Compares a model that has been given an adapter with the model before.

    before: what `handed_over` found; without it the adapter's configuration has to say what holds.
    """
    if before is None:
        return _by_configuration(model)
    trained = _trained(model)
    with in_eval_mode(model):
        with torch.no_grad():
            on = token_logps(model, ids)
        with _adapter_off(model), _requiring_grad(model, trained.values()), torch.enable_grad():
            off = token_logps(model, ids)
            gradients = _gradients(off, trained.values())
    coarsest = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())
    found = AdapterStart(
        off_is_start=_same(off, before, max(1e-5, coarsest / 2)),  # mostly the very same numbers
        on_is_start=_same(on, before, max(1e-4, 4 * coarsest)),  # W - BA + BA, rounded on the way
        trained_outside=tuple(name for name, g in zip(trained, gradients, strict=True) if g is not None),
    )
    return _of_first_process(found)


def refuse_untrainable(model: PeftModel, ids: Sequence[int]) -> None:
    """Raises ValueError for an adapter that is not trained by calling the causal LM inside, as the trainer does."""
    if not can_run(model, ids):
        return
    trained = _trained(model)
    with in_eval_mode(model), torch.enable_grad():
        ours, of_peft = (_gradients(_token_logps(called, ids), trained.values()) for called in (causal_lm(model), model))
    idle = all(g is None or not g.any() for g in ours)
    idle &= not all("trainable_tokens" in name for name in trained)  # which these tokens need not be
    if _of_first_process(idle or _differ(ours, of_peft)):
        raise ValueError(
            f"the adapter {_kinds(model)} is not trained as PEFT means it{': its gradient is zero' if idle else ''}. It needs "
            "what PeftModel.forward sets up, and training calls the model inside. Use LoRA or another adapter on the weights"
        )


def _token_logps(called: nn.Module, ids: Sequence[int]) -> Tensor:
    tokens = torch.tensor([list(ids)], device=next(called.parameters()).device)
    logits = called(input_ids=tokens, use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, tokens[0, 1:, None]).squeeze(1)


def _by_configuration(model: PeftModel) -> AdapterStart:
    """By the configuration: which LoRA initialisations change the base is known; other adapters leave it as it is."""
    configs = list(model.peft_config.values())
    leaves = all(
        getattr(one, "init_lora_weights", True) in BASE_AS_IT_IS and not getattr(one, "layer_replication", None)
        for one in configs
    )
    biased = any(getattr(one, "bias", "none") != "none" for one in configs)
    outside = tuple(name for name in _trained(model) if biased and name.rsplit(".", 1)[-1] == "bias")
    return AdapterStart(off_is_start=leaves, on_is_start=False, trained_outside=outside)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _gradients(logps: Tensor, of: Any) -> tuple[Tensor | None, ...]:
    of = list(of)
    return torch.autograd.grad(logps.sum(), of, allow_unused=True) if logps.requires_grad else (None,) * len(of)


def _differ(ours: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> bool:
    pairs = [[torch.zeros(()) if g is None else g.float().cpu() for g in pair] for pair in zip(ours, others, strict=True)]
    largest = max(b.abs().max().item() for _, b in pairs)
    return any((a - b).abs().max().item() > 0.05 * largest for a, b in pairs)


def _same(x: Tensor, y: Tensor, tolerance: float) -> bool:
    """Whether they are the same but for rounding: root mean squares, relative."""
    difference, size = ((z.detach().float().square().mean().sqrt()).item() for z in (x - y, y))
    return difference <= tolerance * max(size, 1.0)


def _kinds(model: PeftModel) -> str:
    return ", ".join(f"{name!r} ({type(one).__name__})" for name, one in model.peft_config.items())


@contextmanager
def _adapter_off(model: PeftModel) -> Iterator[None]:
    """Without PEFT's warning that trained biases stay on: that is what is looked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Careful, disabling adapter layers with bias")
        with model.disable_adapter():
            yield


@contextmanager
def _requiring_grad(model: nn.Module, parameters: Any) -> Iterator[None]:
    """PEFT makes an adapter that is off require no grad; required again, gradients show what is still in effect."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p in parameters:
            p.requires_grad_(True)
        yield
    finally:
        for p, required in before:
            p.requires_grad_(required)


def _of_first_process(found: Any) -> Any:
    """The first process's answer for all: it may be the only one whose weights are loaded, and all must do the same."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return found
    answers = [found]
    torch.distributed.broadcast_object_list(answers, src=0)
    return answers[0]

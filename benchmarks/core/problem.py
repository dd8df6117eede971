"""One thing to measure: the tensors of a case, whether providers get logits or hidden states, and which require grad."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

OBJECTIVE = "contrastive"  # the list stage is a few microseconds whatever the objective
BETA = 0.1
IGNORE = -100

SIDES = {
    "logits": ("train", "score"),
    "linear": ("trainable", "frozen", "score"),
    "prefix": ("step",),
    "trainer": ("pairs", "lists"),
}
MODES = {
    "train": "forward and backward to the logits",
    "trainable": "forward and backward to hidden and weight",
    "frozen": "forward and backward to hidden; the weight needs no gradient",
    "score": "forward only",
    "step": "forward and backward of a whole model, one list",
    "pairs": "a training step on lists of two candidates",
    "lists": "a training step on longer lists",
}
WANTED = {  # mode -> inputs that require a gradient
    "train": ("logits",),
    "trainable": ("hidden", "weight"),
    "frozen": ("hidden",),
    "score": (),
}
SCHEDULES = {  # of our head -> mode, GEMMs of tokens x hidden x vocabulary
    "score_only": ("score", 1),
    "frozen_head": ("frozen", 2),
    "list_hold": ("trainable", 3),
    "recompute": ("trainable", 4),
}


class _Catch(torch.autograd.Function):
    """Logits as a model hands them on: no leaf, so an in-place gradient is not copied into a .grad."""

    @staticmethod
    def forward(ctx, logits, wants_gradient, caught):
        ctx.caught = caught
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx, gradient):
        ctx.caught["logits"] = gradient
        return None, None, None


def identity(one) -> dict:
    """The head of a table's description, of a Problem or of what stands in its place."""
    dtype = str(one.dtype).removeprefix("torch.")
    return {"case": one.case, "side": one.side, "mode": one.mode, "dtype": dtype, "device": one.device.type}


@dataclass
class Problem:
    """S candidates of T tokens; logits or hidden and weight, never both."""

    case: str
    note: str
    side: str  # "logits" or "linear"
    mode: str  # one of SIDES[side]
    labels: torch.Tensor  # [S, T] int64, IGNORE where no token is scored
    relevance: torch.Tensor  # [S]
    list_sizes: list[int]
    ref_logps: torch.Tensor  # [S] float32
    logits: torch.Tensor | None = None  # [S, T, V]
    hidden: torch.Tensor | None = None  # [S, T, H]
    weight: torch.Tensor | None = None  # [V, H]
    caught: dict[str, torch.Tensor] = field(default_factory=dict)  # gradients of inputs that are no leaves

    @classmethod
    def from_case(cls, case, side: str, mode: str) -> Problem:
        if side not in SIDES or mode not in SIDES[side]:
            raise ValueError(f"side and mode: got {side!r} and {mode!r}, expected one of {SIDES}")
        data = {"logits": case.logits} if side == "logits" else {"hidden": case.hidden, "weight": case.weight}
        data = {name: tensor.detach() for name, tensor in data.items()}
        sizes, count = case.list_sizes, len(case.labels)
        sizes = [sizes] * (count // sizes) if isinstance(sizes, int) else [int(m) for m in sizes]
        return cls(
            case.name,
            case.note,
            side,
            mode,
            case.labels,
            case.relevance,
            sizes,
            case.ref_logps.float(),
            **data,
        )

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        names = ("logits",) if self.side == "logits" else ("hidden", "weight")
        return {name: getattr(self, name) for name in names}

    @property
    def wanted(self) -> tuple[str, ...]:
        """The inputs that require a gradient."""
        return WANTED[self.mode]

    def fresh(self, *, copy: bool = False) -> Problem:
        """The same numbers without gradients yet; copy=True for a provider that overwrites its input."""
        inputs = {name: x.detach().clone() if copy else x.detach() for name, x in self.inputs.items()}
        caught = {}
        for name in self.wanted:
            if name == "logits":
                inputs[name] = _Catch.apply(inputs[name], torch.ones((), requires_grad=True), caught)
            else:
                inputs[name].requires_grad_()
        return replace(self, caught=caught, **inputs)

    def gradients(self) -> dict[str, torch.Tensor | None]:
        """The gradients of the inputs that require one."""
        return {name: self.caught.get(name) if name == "logits" else getattr(self, name).grad for name in self.wanted}

    def first_list(self) -> Problem:
        """The smallest problem of the same kind: warms libraries up without touching much memory."""
        m = self.list_sizes[0]
        rows = {name: x if name == "weight" else x[:m] for name, x in self.inputs.items()}
        per_candidate = {name: getattr(self, name)[:m] for name in ("labels", "relevance", "ref_logps")}
        return replace(self, list_sizes=[m], **rows, **per_candidate)

    @property
    def data(self) -> torch.Tensor:
        """The large input with one row a token: logits or hidden."""
        return self.logits if self.side == "logits" else self.hidden

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def rows(self) -> torch.Tensor:
        """logits [S * T, V] or hidden [S * T, H]."""
        return self.data.flatten(0, 1)

    @property
    def vocabulary(self) -> int:
        return self.logits.shape[-1] if self.side == "logits" else self.weight.shape[0]

    @property
    def scored_tokens(self) -> int:
        return int((self.labels != IGNORE).sum())

    @property
    def gemm_flops(self) -> int:
        """Floating point operations of one hidden x weight product over the scored tokens."""
        return 2 * self.scored_tokens * self.weight.numel() if self.side == "linear" else 0

    @property
    def traffic_bytes(self) -> int:
        """What must cross memory from logits: one read to score, one more and one write for the gradient."""
        passes = {"score": 1, "train": 3}.get(self.mode, 0)
        return passes * self.logits.numel() * self.logits.element_size() if self.side == "logits" else 0

    @property
    def gradient_bytes(self) -> int:
        """Memory of the gradients asked for: no provider can use less."""
        return sum(x.numel() * x.element_size() for x in map(self.inputs.get, self.wanted))

    def describe(self) -> dict:
        """Shape and kind, as the recorded results hold them."""
        sizes = self.list_sizes
        return {
            **identity(self),
            "note": self.note,
            "candidates": len(self.labels),
            "lists": len(sizes),
            "m": sizes[0] if len(set(sizes)) == 1 else f"{min(sizes)}-{max(sizes)}",
            "T": self.labels.numel(),
            "scored_tokens": self.scored_tokens,
            "masked": round(1 - self.scored_tokens / self.labels.numel(), 4),
            "H": self.weight.shape[1] if self.side == "linear" else None,
            "V": self.vocabulary,
            "gemm_flops": self.gemm_flops,
            "traffic_bytes": self.traffic_bytes,
            "gradient_bytes": self.gradient_bytes,
        }

    def save(self, path: Path) -> None:
        torch.save(vars(self), path)

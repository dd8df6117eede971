"""Who is measured: one entry a provider. Here the registry, ours and plain PyTorch; in peers.py the others.

A provider's `forward` takes a Problem whose inputs want gradients and returns Output(value, logps). The
harness calls backward on the value: plainly where it is one loss, with the list loss's gradient where it is one
number a token. So everybody is asked for the same derivative.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import NamedTuple

import torch
import torch.nn.functional as F

import larpo_kernels as lk
from benchmarks.problem import BETA, IGNORE, OBJECTIVE, SIDES, Problem
from benchmarks.truth import COMPUTES


class Output(NamedTuple):
    value: torch.Tensor | None  # a scalar loss, or [S, T] token log-probs
    logps: torch.Tensor | None = None  # [S]; None where the provider shows none


@dataclass(frozen=True)
class Provider:
    name: str
    side: str
    forward: Callable[[Problem], Output]
    modes: tuple[str, ...]
    computes: str = "list loss"  # one of truth.COMPUTES
    gemms: dict[str, int] | None = None  # mode -> hidden x weight sized products; linear side only
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[torch.dtype, ...] | None = None  # where it is not for all
    needs: str | None = None  # module that must be installed
    group: str | None = None  # formulations of one thing: the report shows the fastest under this name
    compiles: bool = False  # the first call builds code, whose memory is not the call's
    overwrites_input: bool = False  # each run gets its own copy of the input
    floor: bool = False  # no provider, but what the machine could do at best
    pairs_only: bool = False
    prepare: Callable[[Problem], Problem] = lambda problem: problem  # once, outside all measuring

    def missing(self, problem: Problem | None = None, device: str = "cpu") -> str | None:
        """Why it can't run here, or None."""
        if device not in self.devices:
            return f"runs on {' or '.join(self.devices)}"
        if self.needs and not _importable(self.needs):
            return f"{self.needs} is not installed"
        if problem is not None and self.dtypes and problem.dtype not in self.dtypes:
            return f"not for {problem.dtype}"
        if problem is not None and self.pairs_only and len(problem.labels) % 2:
            return "needs an even number of candidates"
        return None


REGISTRY: list[Provider] = []


def provider(name: str, side: str, **options):
    """Register `forward` under a name. modes defaults to all of the side's."""
    options.setdefault("modes", SIDES[side])
    if options.get("computes", "list loss") not in COMPUTES:
        raise ValueError(f"computes: got {options['computes']!r}, expected one of {tuple(COMPUTES)}")

    def register(forward):
        REGISTRY.append(Provider(name, side, forward, **options))
        return forward

    return register


def select(side: str, mode: str, globs: list[str] | None = None) -> list[Provider]:
    """Entries of one side and mode; globs match a name or its group, case ignored."""
    patterns = [g.lower() for g in globs or ["*"]]
    names = lambda p: [p.name.lower(), (p.group or p.name).lower()]  # noqa: E731
    return [
        p for p in REGISTRY if p.side == side and mode in p.modes and any(fnmatch(n, g) for n in names(p) for g in patterns)
    ]


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


def list_loss(token_logps: torch.Tensor, problem: Problem) -> Output:
    """The eager list stage on [S, T] (or [S * T]) differentiable token log-probs, 0 where ignored."""
    logps = token_logps.view_as(problem.labels).float().sum(-1)
    scores = BETA * (logps - problem.ref_logps)
    loss = lk.reference.listwise_loss(scores, problem.relevance, list_sizes=problem.list_sizes, objective=OBJECTIVE)
    return Output(loss, logps.detach())


def token_output(token_logps: torch.Tensor, problem: Problem) -> Output:
    """For those who stop at tokens: [S * T], 0 where ignored."""
    token_logps = token_logps.view_as(problem.labels)
    return Output(token_logps, token_logps.detach().double().sum(-1))


def scored(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, Callable]:
    """hidden of the scored tokens [N, H], their labels [N], and the way back to [S, T], 0 elsewhere."""
    keep = problem.labels != IGNORE
    back = lambda x: x.new_zeros(keep.shape).masked_scatter(keep, x)  # noqa: E731
    return problem.data[keep], problem.labels[keep], back


# --- ours -----------------------------------------------------------------------------------------------


def _common(problem: Problem) -> dict:
    return {
        "list_sizes": problem.list_sizes,
        "objective": OBJECTIVE,
        "ref_logps": problem.ref_logps,
        "beta": BETA,
    }


def _ours_from_logits(backend: str, inplace: bool):
    def forward(problem: Problem) -> Output:
        out = lk.fused_listwise_loss(
            problem.logits,
            problem.labels,
            problem.relevance,
            inplace_backward=inplace,
            backend=backend,
            **_common(problem),
        )
        return Output(out.loss, out.logps)

    return forward


def _ours_from_hidden(schedule: str, backend: str):
    def forward(problem: Problem) -> Output:
        out = lk.fused_linear_listwise_loss(
            problem.hidden,
            problem.weight,
            problem.labels,
            problem.relevance,
            schedule=schedule,
            backend=backend,
            **_common(problem),
        )
        return Output(out.loss, out.logps)

    return forward


SCHEDULE_GEMMS = {  # schedule -> mode -> GEMMs
    "score_only": {"score": 1},
    "frozen_head": {"frozen": 2},
    "list_hold": {"trainable": 3},
    "recompute": {"trainable": 4},
}

for _backend, _devices in (("torch", ("cpu", "cuda")), ("triton", ("cuda",))):
    _needs = "triton" if _backend == "triton" else None
    provider(f"ours ({_backend})", "logits", devices=_devices, needs=_needs)(_ours_from_logits(_backend, False))
    provider(
        f"ours ({_backend}), in place",
        "logits",
        devices=_devices,
        needs=_needs,
        modes=("train",),
        overwrites_input=True,
    )(_ours_from_logits(_backend, True))
    for _schedule, _gemms in SCHEDULE_GEMMS.items():
        provider(
            f"ours {_schedule} ({_backend})",
            "linear",
            devices=_devices,
            needs=_needs,
            modes=tuple(_gemms),
            gemms=_gemms,
        )(_ours_from_hidden(_schedule, _backend))


# --- plain PyTorch: eager, and compiled -----------------------------------------------------------------

PLAIN_GEMMS = {"score": 1, "frozen": 2, "trainable": 3}  # whoever keeps the logits


def log_softmax_logps(logits, labels):
    """float32 log-softmax, then gather. logits [N, V], labels [N] -> [N], 0 where ignored."""
    keep = labels != IGNORE
    logps = logits.float().log_softmax(-1).gather(-1, labels.where(keep, 0)[:, None])[:, 0]
    return logps.where(keep, 0.0)


def cross_entropy_logps(logits, labels):
    """The same through F.cross_entropy."""
    return -F.cross_entropy(logits.float(), labels, reduction="none", ignore_index=IGNORE)


FORMULATIONS = {"log_softmax": log_softmax_logps, "cross_entropy": cross_entropy_logps}


def from_hidden(formulation):
    return lambda hidden, weight, labels: formulation(F.linear(hidden, weight), labels)


@provider("eager", "logits")
def eager_from_logits(problem):
    return list_loss(log_softmax_logps(problem.rows, problem.labels.flatten()), problem)


@provider("eager", "linear", gemms=PLAIN_GEMMS)
def eager_from_hidden(problem):
    token_logps = from_hidden(log_softmax_logps)(problem.rows, problem.weight, problem.labels.flatten())
    return list_loss(token_logps, problem)


def _compiled_from_logits(formulation):
    compiled = torch.compile(formulation, dynamic=False)
    return lambda problem: list_loss(compiled(problem.rows, problem.labels.flatten()), problem)


def _compiled_from_hidden(formulation):
    compiled = torch.compile(from_hidden(formulation), dynamic=False)
    return lambda problem: list_loss(compiled(problem.rows, problem.weight, problem.labels.flatten()), problem)


def _compiled_scored_only(formulation):
    compiled = torch.compile(from_hidden(formulation), dynamic=False)

    def forward(problem):
        hidden, labels, back = scored(problem)
        return list_loss(back(compiled(hidden, problem.weight, labels)), problem)

    return forward


_compiled = {"group": "torch.compile", "compiles": True}
for _name, _formulation in FORMULATIONS.items():
    provider(f"torch.compile {_name}", "logits", **_compiled)(_compiled_from_logits(_formulation))
    provider(f"torch.compile {_name}", "linear", gemms=PLAIN_GEMMS, **_compiled)(_compiled_from_hidden(_formulation))
provider("torch.compile cross_entropy, scored tokens only", "linear", gemms=PLAIN_GEMMS, **_compiled)(
    _compiled_scored_only(cross_entropy_logps)
)


@provider("log_softmax a row", "logits")
def row_by_row(problem):
    """As trainers do to save memory: a candidate at a time, in the dtype of the logits."""
    keep = problem.labels != IGNORE
    index = problem.labels.where(keep, 0)[..., None]
    rows = [x.log_softmax(-1).gather(-1, i)[:, 0] for x, i in zip(problem.logits, index, strict=True)]
    return list_loss(torch.stack(rows).where(keep, 0.0), problem)


@provider(
    "torch linear_cross_entropy",
    "linear",
    computes="token logps",
    gemms={"score": 1, "frozen": 3, "trainable": 4},
    needs="torch.nn.modules.linear_cross_entropy",
)
def torch_linear_cross_entropy(problem):
    """PyTorch's own chunked head (2.13 and later): reduction="none" forms the logits again in backward."""
    loss = F.linear_cross_entropy(
        problem.rows,
        problem.weight,
        problem.labels.flatten(),
        reduction="none",
        ignore_index=IGNORE,
        options=torch.nn.LinearCrossEntropyOptions(),
    )
    return token_output(-loss, problem)

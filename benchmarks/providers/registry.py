"""The list of providers: one entry for each implementation that is measured, registered by the modules beside this one.

A provider's `forward` takes a Problem whose inputs require gradients and returns Output(value, logps). The
harness calls backward on the value: plainly where it is one loss, with the list loss's gradient where it is one
number a token. So every provider computes the same derivative.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import NamedTuple

import torch

import larpo_kernels as lk
from benchmarks.core.problem import BETA, IGNORE, OBJECTIVE, SIDES, Problem
from benchmarks.core.truth import COMPUTES


class Output(NamedTuple):
    value: torch.Tensor | None  # a scalar loss, or [S, T] token log-probs
    logps: torch.Tensor | None = None  # [S]; None where the provider shows none
    note: str = ""  # what a reader of the table must know


@dataclass(frozen=True)
class Provider:
    name: str
    side: str
    forward: Callable[[Problem], Output]
    modes: tuple[str, ...]
    computes: str = "list loss"  # one of truth.COMPUTES
    gemms: dict[str, int] | None = None  # mode -> hidden x weight sized products; linear side only
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[torch.dtype, ...] | None = None  # None: all
    needs: str | None = None  # module that must be installed
    group: str | None = None  # formulations of one thing: the report shows the fastest under this name
    leaves_memory: bool = False  # what the first call leaves is not a call's own: compiled code, AdamW's moments
    overwrites_input: bool = False  # each run gets its own copy of the input
    floor: bool = False  # no provider, but what the machine could do at best
    small: bool = False  # measured in the suite of small calls only
    pairs_only: bool = False
    rounds_tokens: bool = False  # returns log-probs of tokens in the dtype of the inputs
    merges: float = 0.0  # the relative error of gradients that its settings allow, beyond rounding
    prepare: Callable[[Problem], Problem] = lambda problem: problem  # once, before all measuring
    finish: Callable[[Problem], None] | None = None  # once, after it

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


def select(side: str, mode: str, globs: list[str] | None = None, *, small: bool = False) -> list[Provider]:
    """Entries of one side and mode; globs match a name or its group, case ignored. small: also those for small calls."""
    patterns = [g.lower() for g in globs or ["*"]]
    found = [p for p in REGISTRY if p.side == side and mode in p.modes and (small or not p.small)]
    return [p for p in found if any(fnmatch(n.lower(), g) for n in (p.name, p.group or p.name) for g in patterns)]


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


def list_loss(token_logps: torch.Tensor, problem: Problem) -> Output:
    """The eager list stage on [S, T] (or [S * T]) differentiable token log-probs, 0 where ignored."""
    logps = token_logps.view_as(problem.labels).float().sum(-1)
    scores = BETA * (logps - problem.ref_logps)
    return Output(_contrastive(scores, problem), logps.detach())


def _contrastive(scores: torch.Tensor, problem: Problem) -> torch.Tensor:
    """All lists of one size at once, as anybody would write it; the specification, a list at a time, for others."""
    if len(set(problem.list_sizes)) != 1:
        return lk.reference.listwise_loss(scores, problem.relevance, list_sizes=problem.list_sizes, objective=OBJECTIVE)
    scores = scores.view(-1, problem.list_sizes[0])
    best = problem.relevance.view_as(scores).argmax(-1, keepdim=True)
    return (scores.logsumexp(-1) - scores.gather(-1, best)[:, 0]).mean()


def token_output(token_logps: torch.Tensor, problem: Problem) -> Output:
    """Of a provider that returns log-probs of tokens, [S * T], 0 where ignored."""
    token_logps = token_logps.view_as(problem.labels)
    return Output(token_logps, token_logps.detach().double().sum(-1))


def scored(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, Callable]:
    """hidden of the scored tokens [N, H], their labels [N], and the way back to [S, T], 0 elsewhere."""
    keep = problem.labels != IGNORE

    def back(x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(keep.shape).masked_scatter(keep, x)

    return problem.data[keep], problem.labels[keep], back

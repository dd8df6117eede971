"""Plain PyTorch: eager, compiled, a candidate at a time, and torch's own chunked head."""

from __future__ import annotations

from functools import cache, partial

import torch
import torch.nn.functional as F

from benchmarks.core.problem import IGNORE
from benchmarks.providers.registry import list_loss, provider, scored, token_output

PLAIN_GEMMS = {"score": 1, "frozen": 2, "trainable": 3}  # of a provider that keeps the logits


def log_softmax_logps(logits, labels):
    """float32 log-softmax, then gather. logits [N, V], labels [N] -> [N], 0 where ignored."""
    keep = labels != IGNORE
    logps = logits.float().log_softmax(-1).gather(-1, labels.where(keep, 0)[:, None])[:, 0]
    return logps.where(keep, 0.0)


def cross_entropy_logps(logits, labels):
    """The same through F.cross_entropy."""
    return -F.cross_entropy(logits.float(), labels, reduction="none", ignore_index=IGNORE)


FORMULATIONS = {"log_softmax": log_softmax_logps, "cross_entropy": cross_entropy_logps}


@provider("eager", "logits")
def eager_from_logits(problem):
    return list_loss(log_softmax_logps(problem.rows, problem.labels.flatten()), problem)


@provider("eager", "linear", gemms=PLAIN_GEMMS)
def eager_from_hidden(problem):
    logits = F.linear(problem.rows, problem.weight)
    return list_loss(log_softmax_logps(logits, problem.labels.flatten()), problem)


@cache
def _compiled(formulation: str, head: bool):
    """Made when it is first called: torch.compile takes seconds to import, which every process that measures would wait for."""
    logps = FORMULATIONS[formulation]
    return torch.compile((lambda x, w, labels: logps(F.linear(x, w), labels)) if head else logps, dynamic=False)


def _compiled_from_logits(formulation: str, problem):
    return list_loss(_compiled(formulation, False)(problem.rows, problem.labels.flatten()), problem)


def _compiled_from_hidden(formulation: str, problem):
    return list_loss(_compiled(formulation, True)(problem.rows, problem.weight, problem.labels.flatten()), problem)


_options = {"group": "torch.compile", "leaves_memory": True}
for _name in FORMULATIONS:
    provider(f"torch.compile {_name}", "logits", **_options)(partial(_compiled_from_logits, _name))
    provider(f"torch.compile {_name}", "linear", gemms=PLAIN_GEMMS, **_options)(partial(_compiled_from_hidden, _name))


@provider("torch.compile cross_entropy, scored tokens only", "linear", gemms=PLAIN_GEMMS, **_options)
def _compiled_scored_only(problem):
    hidden, labels, back = scored(problem)
    return list_loss(back(_compiled("cross_entropy", True)(hidden, problem.weight, labels)), problem)


@provider("log_softmax a row", "logits", rounds_tokens=True)
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
    rounds_tokens=True,
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

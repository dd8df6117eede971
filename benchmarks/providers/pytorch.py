"""Plain PyTorch: eager, compiled, a candidate at a time, and torch's own chunked head."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.core.problem import IGNORE
from benchmarks.providers.registry import list_loss, provider, scored, token_output

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


_compiled = {"group": "torch.compile", "leaves_memory": True}
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

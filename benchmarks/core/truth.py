"""Log-probabilities, losses and gradients of a problem in float64, and the errors of a provider against them.

It does not use larpo_kernels: only the list stage, which is a few numbers, comes from its specification.
The vocabulary is walked in blocks, so that no float64 tensor of all logits exists. Where float64 GEMMs would
take minutes, gradients are compared on samples: d hidden of some tokens, d weight of some vocabulary rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

import larpo_kernels as lk
from benchmarks.core.problem import BETA, IGNORE, OBJECTIVE, Problem

BLOCK_ELEMENTS = 2**24  # float64 logits alive at a time: 128 MB
EXACT_MACS = {"cpu": 1.5e11, "cuda": 1e12}  # tokens x H x V above which gradients are compared on samples
SAMPLED_TOKENS, SAMPLED_VOCABULARY = 256, 4096

COMPUTES = {
    "list loss": "tokens to lists, one loss",
    "token logps": "log-probs of tokens, given the list loss's upstream gradient",
    "pair loss": "DPO over consecutive pairs of the same candidates, no reference model",
    "sum of logps": "one sum over all tokens, upstream gradient 1",
    "DPO pairs": "DPO of the best candidate of a list against each of the others, with a reference model",
}


@dataclass
class Target:
    """What a provider should return for what it computes, and the gradient that reaches each token."""

    value: torch.Tensor | None  # scalar; None where the output is one number a token
    upstream: torch.Tensor  # [S, T] float64, d value / d token logp, 0 where ignored


@dataclass
class Truth:
    problem: Problem
    token_logps: torch.Tensor = field(init=False)  # [S, T] float64, 0 where ignored
    logps: torch.Tensor = field(init=False)  # [S] float64
    _targets: dict[str, Target] = field(default_factory=dict, init=False)
    _gradients: dict[tuple, tuple] = field(default_factory=dict, init=False)

    def __post_init__(self):
        labels = self.problem.labels.flatten()
        self._keep = (labels != IGNORE).nonzero()[:, 0]  # [N] scored tokens
        self._y = labels[self._keep]
        self._x = self.problem.rows.detach()[self._keep]  # [N, H], or a copy of the logits [N, V]
        self._lse, target = _logsumexp(self._x, self._weight, self._y)
        logps = torch.zeros(labels.shape, dtype=torch.float64, device=labels.device)
        logps[self._keep] = target - self._lse
        self.token_logps = logps.view_as(self.problem.labels)
        self.logps = self.token_logps.sum(-1)

    @property
    def _weight(self):
        return None if self.problem.weight is None else self.problem.weight.detach()

    def target(self, computes: str) -> Target:
        if computes not in self._targets:
            self._targets[computes] = self._make_target(computes)
        return self._targets[computes]

    def _make_target(self, computes: str) -> Target:
        p, mask = self.problem, self.problem.labels != IGNORE
        if computes == "sum of logps":
            return Target(self.logps.sum(), mask.double())
        scores_of = {"pair loss": (2, "pairwise", 0.0)}
        sizes, objective, ref = scores_of.get(computes, (p.list_sizes, OBJECTIVE, p.ref_logps.double()))
        logps = self.logps.clone().requires_grad_()
        loss = lk.reference.listwise_loss(BETA * (logps - ref), p.relevance.double(), list_sizes=sizes, objective=objective)
        loss.backward()
        return Target(None if computes == "token logps" else loss.detach(), logps.grad[:, None] * mask)

    def errors(self, computes: str, value, logps, gradients: dict[str, torch.Tensor]) -> dict[str, float]:
        """rms error of sequence log-probs (nats), absolute error of the loss, relative error of gradients."""
        found = {}
        target = self.target(computes)
        if target.value is not None:
            found["loss"] = float((value.detach().double() - target.value).abs())
        if logps is not None:
            found["logps"] = float((logps.detach().double() - self.logps).square().mean().sqrt())
        for name, gradient in gradients.items():
            compare = self._logits_error if name == "logits" else self._linear_error
            found[f"d_{name}"] = float("nan") if gradient is None else compare(name, computes, gradient.detach())
        return found

    def limits(self, eager: dict[str, float], computes: str, *, rounds_tokens: bool = False) -> dict[str, float]:
        """Errors above which a provider is wrong, not merely rounded: four times eager's in the same dtype, and an epsilon.

        rounds_tokens: for one that returns its log-probs of tokens in the dtype of the inputs. That costs half a unit in the
        last place of each, which adds up over a candidate as errors do that do not know of each other.
        """
        eps = torch.finfo(self.problem.dtype).eps
        logps = 4 * eager.get("logps", 0.0) + 1e-6 * float(self.logps.square().mean().sqrt())
        if rounds_tokens:
            logps += eps / 2 * float(self.token_logps.square().sum(-1).mean().sqrt())
        loss = {"sum of logps": len(self.logps) * logps}.get(computes, 2 * BETA * logps + 1e-6)
        gradients = {name: 4 * eager.get(name, 0.0) + max(eps, 1e-5) for name in ("d_logits", "d_hidden", "d_weight")}
        return {"logps": logps, "loss": loss, **gradients}

    def _logits_error(self, name, computes, gradient) -> float:
        """Rows in blocks, the true gradient formed anew for each; ignored rows must be exactly zero."""
        gradient, upstream = gradient.flatten(0, 1), self.target(computes).upstream.flatten()[self._keep]
        wrong = right = torch.zeros((), dtype=torch.float64, device=gradient.device)
        step = max(1, BLOCK_ELEMENTS // gradient.shape[1])
        for a in range(0, len(self._y), step):
            part = slice(a, a + step)
            z = self._x[part].double()
            true = _dlogits(z, self._lse[part], self._y[part], upstream[part])
            wrong = wrong + (gradient[self._keep[part]].double() - true).square().sum()
            right = right + true.square().sum()
        return float("inf") if self._touches_ignored(gradient) else float((wrong / right).sqrt())

    def _linear_error(self, name, computes, gradient) -> float:
        if name == "hidden":
            gradient = gradient.flatten(0, 1)
            if self._touches_ignored(gradient):
                return float("inf")
        true, rows = self._linear_gradient(name, computes)
        return float((gradient[rows].double() - true).norm() / true.norm())

    def _touches_ignored(self, gradient) -> bool:
        ignored = torch.ones(len(gradient), dtype=torch.bool, device=gradient.device)
        ignored[self._keep] = False
        return bool(gradient[ignored].any())

    def _linear_gradient(self, name, computes) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of d hidden or d weight in float64, and which rows of the whole gradient they are."""
        kind = "list loss" if computes == "token logps" else computes  # the same upstream gradient
        if (name, kind) not in self._gradients:
            device = self._y.device
            tokens, columns = (
                torch.arange(len(self._y), device=device),
                torch.arange(len(self._weight), device=device),
            )
            if len(tokens) * self._weight.numel() > EXACT_MACS[device.type]:
                pick = torch.Generator().manual_seed(0)
                if name == "hidden":
                    tokens = torch.randperm(len(tokens), generator=pick)[:SAMPLED_TOKENS].to(device)
                else:
                    some = torch.randperm(len(columns), generator=pick)[:SAMPLED_VOCABULARY].to(device)
                    columns = torch.cat([some, self._y]).unique()
            upstream = self.target(kind).upstream.flatten()[self._keep]
            true = self._walk(name, upstream, tokens, columns)
            self._gradients[name, kind] = true, self._keep[tokens] if name == "hidden" else columns
        return self._gradients[name, kind]

    def _walk(self, name, upstream, tokens, columns) -> torch.Tensor:
        """d hidden of some tokens [tokens, H], or d weight of some vocabulary rows [columns, H]."""
        h, lse, y, c = self._x[tokens].double(), self._lse[tokens], self._y[tokens], upstream[tokens]
        found = torch.zeros(len(tokens if name == "hidden" else columns), h.shape[1], dtype=h.dtype, device=h.device)
        step = max(1, BLOCK_ELEMENTS // max(1, len(h)))
        for a in range(0, len(columns), step):
            block = columns[a : a + step]
            w = self._weight[block].double()
            g = (h @ w.T).sub_(lse[:, None]).exp_().mul_(-c[:, None])
            g += (y[:, None] == block) * c[:, None]
            if name == "hidden":
                found.addmm_(g, w)
            else:
                torch.mm(g.T, h, out=found[a : a + step])
        return found


def _logsumexp(x, weight, labels):
    """lse [N] and target logit [N], float64. x: logits [N, V] (weight None) or hidden [N, H]."""
    if weight is None:
        step = max(1, BLOCK_ELEMENTS // x.shape[1])
        lse = torch.cat([block.double().logsumexp(-1) for block in x.split(step)])
        return lse, x.gather(1, labels[:, None])[:, 0].double()
    h = x.double()
    lse = torch.full((len(h),), -torch.inf, dtype=torch.float64, device=h.device)
    for block in weight.split(max(1, BLOCK_ELEMENTS // max(1, len(h)))):
        lse = torch.logaddexp(lse, (h @ block.double().T).logsumexp(-1))
    return lse, (h * weight[labels].double()).sum(-1)


def _dlogits(z, lse, labels, upstream):
    """upstream * (onehot - softmax), overwriting z [N, V]."""
    g = z.sub_(lse[:, None]).exp_().neg_()
    g[torch.arange(len(g), device=g.device), labels] += 1
    return g.mul_(upstream[:, None])

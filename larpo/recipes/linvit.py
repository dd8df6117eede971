"""LINVIT (arXiv 2402.16181): value iteration that stays near what a language model would do.

    V(s) = max_pi E_pi Q(s, a) - lambda KL(pi || pi_LM) = lambda log sum_a pi_LM(a | s) e^(Q(s, a) / lambda)
    pi(a | s) = pi_LM(a | s) e^(Q(s, a) / lambda) / e^(V(s) / lambda)

a log-sum-exp over the list of valid actions, whose gradient in Q is pi. Transitions and rewards are estimated from what was
seen, and each action gets a bonus that falls with how often it was tried. Simplified from the paper: one optimistic estimate
decides, without a lower one beside it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from .actions import Menu
from .harness import report
from .harness.recipe import Arm, Columns, Recipe, Row, commands
from .tasks import lake, toy_lm


def regularised(q: Tensor, log_prior: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """V [...] and pi [..., A] for q and log_prior [..., A]; strength is lambda, in the unit of q."""
    if not strength > 0:
        raise ValueError(f"strength (lambda) must be above 0, got {strength}")
    g = log_prior + q / strength
    return strength * g.logsumexp(-1), g.softmax(-1)


class Model:
    """What was seen of an environment: transitions [S, A, S], rewards [S, A] and how often each action was tried."""

    def __init__(self, states: int, actions: int):
        self.tried = torch.zeros(states, actions, dtype=torch.float64)
        self.moved = torch.zeros(states, actions, states, dtype=torch.float64)
        self.earned = torch.zeros(states, actions, dtype=torch.float64)

    def add(self, state: int, action: int, reward: float, after: int, over: bool) -> None:
        self.tried[state, action] += 1
        self.earned[state, action] += reward
        if not over:
            self.moved[state, action, after] += 1

    def plan(self, log_prior: Tensor | None, strength: float, horizon: int, bonus: float) -> Tensor:
        """The policy [horizon, S, A] of optimistic value iteration; without a prior the greedy one. Returns lie in [0, 1]."""
        tried = self.tried.clamp(min=1)
        optimism = bonus / tried.sqrt() + (self.tried == 0)
        value = torch.zeros(self.tried.shape[0], dtype=torch.float64)
        policy = []
        for _ in range(horizon):
            q = ((self.earned + self.moved @ value) / tried + optimism).clamp(max=1.0)
            if log_prior is None:
                value, act = q.max(1).values, torch.nn.functional.one_hot(q.argmax(1), q.shape[1]).double()
            else:
                value, act = regularised(q, log_prior, strength)
            policy.append(act)
        return torch.stack(policy[::-1])


def leaning(actions: Tensor, trust: float) -> Tensor:
    """log pi [S, A] with probability `trust` for one action of each state, actions [S] int64; the others share the rest."""
    others = len(lake.ACTIONS) - 1
    prior = torch.full((len(actions), others + 1), (1 - trust) / others, dtype=torch.float64)
    return prior.scatter(1, actions[:, None], trust).log()


def guidebook(draw: random.Random) -> tuple[str, str]:
    """A state and a guide's advice: head down or right and avoid holes; the guide does not know that ice is slippery."""
    state = draw.randrange(lake.STATES)
    text = lake.describe(state)
    ahead = [move for move, name in ((1, "down"), (2, "right")) if f"{name} is ice" in text or f"{name} is goal" in text]
    return text, lake.ACTIONS[draw.choice(ahead or [0, 3])]


def lm_prior(seed: int, steps: int) -> Tensor:
    """log pi [S, A] of a tiny LM that has read the guidebook: its likelihoods of the actions' texts, normed over the list."""
    tokenizer, draw = lake.tokenizer(), random.Random(seed)
    book = [guidebook(draw) for _ in range(400)]
    model = toy_lm.fitted(tokenizer, book, seed=seed, steps=steps, end=False, hidden_size=32, batch_size=32)
    with torch.no_grad():
        menu = Menu(tokenizer, [lake.describe(state) for state in range(lake.STATES)], lake.ACTIONS)
        return menu.logps(model).double().log_softmax(-1)


def first_reached(curve: Sequence[float], target: float, every: int) -> int | None:
    """Steps after which the curve never falls below the target again; None if it ends below.

    >>> first_reached([0.0, 0.9, 0.2, 0.8, 0.9], 0.5, every=10)
    30
    """
    below = [i for i, value in enumerate(curve) if value < target]
    first = below[-1] + 1 if below else 0
    return first * every if first < len(curve) else None


GREEDY = "none (greedy)"
PRIORS = ("uniform", "good (70 % on the best action)", "misleading (70 % on its opposite)", "tiny LM that read a guidebook")


@dataclass
class Linvit(Recipe):
    """Slippery FrozenLake with several priors and lambdas: after how many steps the plan earns `share` of the optimal return
    and never less again."""

    name = "linvit"
    heading = "prior, lambda"
    strengths: Sequence[float] = (0.002, 0.005)
    horizon: int = 40
    bonus: float = 0.05
    steps: int = 6000
    every: int = 200
    share: float = 0.8
    fit_steps: int = 200

    def start(self, seed: int) -> tuple[dict[str, Tensor], float]:
        """log pi [S, A] of the priors, and the optimal return."""
        env = lake.make(slippery=True, max_steps=self.horizon)
        truth = Model(lake.STATES, len(lake.ACTIONS))
        truth.moved, truth.earned = lake.true_tables(env)
        truth.tried += 1
        plan = truth.plan(None, 1.0, self.horizon, bonus=0.0)
        best = plan[0].argmax(1)
        priors = (
            leaning(best, 1 / len(lake.ACTIONS)),
            leaning(best, 0.7),
            leaning((best + 2) % 4, 0.7),
            lm_prior(seed, self.fit_steps),
        )
        return dict(zip(PRIORS, priors, strict=True)), lake.exact_return(plan, env)

    def arms(self) -> dict[str, Arm]:
        return {GREEDY: self.learned} | {
            f"{prior}, {strength:g}": partial(self.learned, prior=prior, strength=strength)
            for strength in self.strengths
            for prior in PRIORS
        }

    def learned(self, start: tuple, seed: int, *, prior: str | None = None, strength: float = 1.0) -> Row:
        """curve: the exact return of the plan after every `every` steps in the environment. alone: the return of the prior."""
        log_prior, optimal = start[0].get(prior), start[1]
        env, draw = lake.make(slippery=True, max_steps=self.horizon), np.random.default_rng(seed)
        model, curve, done = Model(lake.STATES, len(lake.ACTIONS)), [], 0
        while len(curve) <= self.steps // self.every:
            while len(curve) * self.every <= done:
                # what would be done without the bonus: the estimate as it is
                curve.append(lake.exact_return(model.plan(log_prior, strength, self.horizon, 0.0), env))
            plan = model.plan(log_prior, strength, self.horizon, self.bonus)
            for step in lake.episode(env, plan.numpy(), draw):
                model.add(*step)
                done += 1
        alone = None if log_prior is None else lake.exact_return(log_prior.exp().expand(self.horizon, -1, -1), env)
        return {"curve": curve[: self.steps // self.every + 1], "alone": alone, "optimal": optimal}

    def columns(self, row: Row) -> Columns:
        reached = first_reached(row["curve"], self.share * row["optimal"], self.every)
        return {
            "return of the prior alone": row["alone"],
            f"steps to {self.share:.0%} of the optimum, per seed": "not reached" if reached is None else str(reached),
            "return at the end": row["curve"][-1],
        }

    def notes(self, rows: Sequence[Row]) -> list[str]:
        return [f"The optimal return within {self.horizon} steps is {rows[0]['optimal']:.3f}."]

    def plot(self, figure, rows: Sequence[Row]) -> None:
        panels = figure.subplots(1, len(self.strengths), sharey=True, squeeze=False)[0]
        for axes, strength in zip(panels, self.strengths, strict=True):
            shown = [row for row in rows if row["arm"] == GREEDY or row["arm"].endswith(f", {strength:g}")]
            report.curves(axes, shown, "curve", range(0, self.steps + 1, self.every))
            axes.axhline(rows[0]["optimal"], color="gray", linestyle=":", linewidth=1)
            axes.set(xlabel="steps in the environment", title=f"lambda = {strength:g}")
        panels[0].set(ylabel="return of the plan")
        panels[-1].legend(fontsize=6)


run, main = commands(Linvit)

if __name__ == "__main__":
    main()

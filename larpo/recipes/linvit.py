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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from larpo.modeling import row_layouts

from .actions import Menu
from .harness import report
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


# --- priors ------------------------------------------------------------------------------------------------------


def leaning(actions: Tensor, trust: float) -> Tensor:
    """log pi [S, A]: `trust` on one action of each state, the rest spread evenly. actions: [S] int64."""
    others = len(lake.ACTIONS) - 1
    prior = torch.full((len(actions), others + 1), (1 - trust) / others, dtype=torch.float64)
    return prior.scatter(1, actions[:, None], trust).log()


def guidebook(draw: random.Random) -> tuple[str, str]:
    """A line of a guide who has seen some lake: head down or right, step around holes, never mind that ice is slippery."""
    state = draw.randrange(lake.STATES)
    text = lake.describe(state)
    ahead = [move for move, name in ((1, "down"), (2, "right")) if f"{name} is ice" in text or f"{name} is goal" in text]
    return text, lake.ACTIONS[draw.choice(ahead or [0, 3])]


def lm_prior(seed: int, steps: int) -> Tensor:
    """log pi [S, A] of a tiny LM that has read the guidebook: its likelihoods of the actions' texts, normed over the list."""
    tokenizer, draw = lake.tokenizer(), random.Random(seed)
    model = toy_lm.causal_lm(tokenizer, seed=seed, hidden_size=32)
    pairs = [guidebook(draw) for _ in range(400)]
    read = [
        row_layouts.TokenizedCandidate(toy_lm.prompt_ids(tokenizer, text), toy_lm.completion_ids(tokenizer, action, end=False))
        for text, action in pairs
    ]
    toy_lm.fit(model, read, steps=steps, batch_size=32, seed=seed)
    with torch.no_grad():
        menu = Menu(tokenizer, [lake.describe(state) for state in range(lake.STATES)], lake.ACTIONS)
        return menu.logps(model).double().log_softmax(-1)


# --- the run -----------------------------------------------------------------------------------------------------


def learn(
    log_prior: Tensor | None, seed: int, *, strength: float, horizon: int, bonus: float, steps: int, every: int
) -> list[float]:
    """The exact return of the plan after every `every` steps in the environment."""
    draw = np.random.default_rng(seed)
    env = lake.make(slippery=True, max_steps=horizon)
    model, curve, done = Model(lake.STATES, len(lake.ACTIONS)), [], 0
    while True:
        policy = model.plan(log_prior, strength, horizon, bonus)
        while len(curve) * every <= done:
            # what would be done without the bonus: the estimate as it is
            curve.append(lake.exact_return(model.plan(log_prior, strength, horizon, 0.0), env))
        if done >= steps:
            return curve[: steps // every + 1]
        state, _ = env.reset(seed=int(draw.integers(2**31)))
        for h in range(horizon):
            action = lake.draw_action(policy[h, state].numpy(), draw)
            after, reward, over, truncated, _ = env.step(action)
            model.add(state, action, float(reward), after, over)
            state, done = after, done + 1
            if over or truncated:
                break


def first_reached(curve: Sequence[float], target: float, every: int) -> int | None:
    """Steps after which the curve is at the target and never below it again; None if it ends below.

    >>> first_reached([0.0, 0.9, 0.2, 0.8, 0.9], 0.5, every=10)
    30
    """
    below = [i for i, value in enumerate(curve) if value < target]
    first = below[-1] + 1 if below else 0
    return first * every if first < len(curve) else None


def run(
    seeds: Sequence[int] = (0, 1, 2),
    *,
    strengths: Sequence[float] = (0.002, 0.005),
    horizon: int = 40,
    bonus: float = 0.05,
    steps: int = 6000,
    every: int = 200,
    share: float = 0.8,
    fit_steps: int = 200,
) -> dict[str, Any]:
    """Slippery FrozenLake with several priors and lambdas: steps until the plan earns `share` of the optimum for good."""
    from tqdm import tqdm

    env = lake.make(slippery=True, max_steps=horizon)
    plan = lake.best_plan(env, horizon)
    optimal = lake.exact_return(plan, env)
    good = plan[0].argmax(1)
    priors = {
        "uniform": lambda seed: leaning(good, 1 / len(lake.ACTIONS)),
        "good (70 % on the best action)": lambda seed: leaning(good, 0.7),
        "misleading (70 % on its opposite)": lambda seed: leaning((good + 2) % 4, 0.7),
        "tiny LM that read a guidebook": lambda seed: lm_prior(seed, fit_steps),
    }
    options = dict(horizon=horizon, bonus=bonus, steps=steps, every=every)
    runs: dict[str, dict[str, list[list[float]]]] = {"": {"none (greedy)": []}}  # lambda -> prior -> a curve per seed
    runs |= {f"{strength:g}": {name: [] for name in priors} for strength in strengths}
    alone: dict[str, list[float]] = {name: [] for name in priors}
    with tqdm(total=len(seeds) * (1 + len(priors) * len(strengths)), desc="linvit", unit="run") as bar:
        for seed in seeds:
            runs[""]["none (greedy)"].append(learn(None, seed, strength=1.0, **options))
            bar.update()
            for name, make in priors.items():
                prior = make(seed)
                alone[name].append(lake.exact_return(prior.exp().expand(horizon, -1, -1), env))
                for strength in strengths:
                    runs[f"{strength:g}"][name].append(learn(prior, seed, strength=strength, **options))
                    bar.update()
    table = []
    for strength, by_prior in runs.items():
        for name, curves in by_prior.items():
            reached = [first_reached(curve, share * optimal, every) for curve in curves]
            table.append(
                {
                    "prior": name,
                    "lambda": strength,
                    "return of the prior alone": report.over_seeds(alone[name]) if name in alone else "",
                    f"steps to {share:.0%} of the optimum, per seed": ", ".join(
                        "not reached" if x is None else str(x) for x in reached
                    ),
                    "return at the end": report.over_seeds([curve[-1] for curve in curves]),
                }
            )
    return {
        "settings": dict(strengths=list(strengths), share=share, **options),
        "optimal": optimal,
        "runs": runs,
        "table": table,
        "notes": [f"The optimal return within {horizon} steps is {optimal:.3f}."],
    }


def plot(figure, result: dict[str, Any]) -> None:
    greedy, *others = result["runs"].items()
    panels = figure.subplots(1, len(others), sharey=True, squeeze=False)[0]
    for axes, (strength, by_prior) in zip(panels, others, strict=True):
        for name, curves in {**greedy[1], **by_prior}.items():
            report.band(axes, [i * result["settings"]["every"] for i in range(len(curves[0]))], curves, name)
        axes.axhline(result["optimal"], color="gray", linestyle=":", linewidth=1)
        axes.set(xlabel="steps in the environment", title=f"lambda = {strength}")
    panels[0].set(ylabel="return of the plan")
    panels[-1].legend(fontsize=6)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    return report.main(argv, name="linvit", doc=__doc__, run=run, plot=plot)


if __name__ == "__main__":
    main()

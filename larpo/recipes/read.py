"""ReAd, reinforced advantage feedback (arXiv 2405.14314): plans of several agents, weighted by a learned advantage.

A plan a = (a^1, a^2) is made agent by agent, each knowing what those before it will do. A critic learns the value of every
beginning of a plan, Q(s, a^1..a^i), from the planner's own episodes, and an agent's advantage is what its action adds:

    A^i(s, a^1..a^i) = Q(s, a^1..a^i) - Q(s, a^1..a^(i-1))
    loss = -E_{a ~ pi_old} e^(A^i / temperature) log pi(a^i | s, a^1..a^(i-1))

The minimum of that advantage-weighted log-likelihood is pi_old e^(A / temperature), normed. The paper gives the advantages to a
large planner as feedback in its prompt, and lets it plan again where they are low; both are here: training on the weights, and
planning again without training.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from larpo.modeling import row_layouts

from .actions import Menu
from .harness import report
from .tasks import corridor, toy_lm
from .tasks.corridor import ACTIONS, STATES

MOST_WEIGHT = 20.0  # a single lucky step does not outweigh a batch


def advantage_weighted(logps: Tensor, advantages: Tensor, temperature: float, most: float = MOST_WEIGHT) -> Tensor:
    """-mean min(e^(A / temperature), most) l, for log-likelihoods and advantages [S] of what was done."""
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    return -((advantages / temperature).exp().clamp(max=most).detach() * logps).mean()


class Step(NamedTuple):
    """One action of one agent: where it stands in the planner's menu, and what it came to."""

    state: int
    ann_does: int | None  # None: this is Ann's own step
    action: int
    returned: float  # discount ** (steps until success), 0 without

    @property
    def line(self) -> int:
        """The prompt's place in `Planner.menu`."""
        return self.state if self.ann_does is None else len(STATES) * (1 + self.ann_does) + self.state


class Planner:
    """A tiny LM that says the next action of either agent."""

    def __init__(self, seed: int, steps: int):
        words, draw = corridor.tokenizer(), random.Random(seed)
        self.model = toy_lm.causal_lm(words, seed=seed, hidden_size=32)
        prompts = [corridor.prompt(s) for s in STATES] + [corridor.prompt(s, a) for a in range(len(ACTIONS)) for s in STATES]
        self.menu = Menu(words, prompts, ACTIONS)
        read = [
            row_layouts.TokenizedCandidate(
                toy_lm.prompt_ids(words, told), toy_lm.completion_ids(words, ACTIONS[action], end=False)
            )
            for told, action in (_selfish(draw) for _ in range(1500))
        ]
        toy_lm.fit(self.model, read, steps=steps, seed=seed)

    @torch.no_grad()
    def policy(self) -> np.ndarray:
        """[prompts, actions] probabilities."""
        return self.menu.logps(self.model).double().softmax(-1).numpy()


def _selfish(draw: random.Random) -> tuple[str, int]:
    """A line to learn from: somebody who heads for the own goal two times out of three, and never thinks of the other."""
    state, ann_does = draw.choice(STATES), draw.choice([None, *range(len(ACTIONS))])
    cell, ahead = (state[0], "east") if ann_does is None else (state[1], "west")
    ahead = "south" if cell == corridor.BAY else ahead
    return corridor.prompt(state, ann_does), ACTIONS.index(ahead) if draw.random() < 2 / 3 else draw.randrange(len(ACTIONS))


def episode(policy: np.ndarray, draw: random.Random, most_steps: int, advantage=None, tries: int = 5) -> tuple[int, list]:
    """Steps taken (most_steps where there is no success) and (state, ann_does, action) of both agents at each.

    advantage(state, ann_does, action): with it, an action below 0 is planned again, `tries` times at most; the best is done.
    """

    def choose(state: int, ann_does: int | None) -> int:
        weights = policy[Step(state, ann_does, 0, 0.0).line]
        if advantage is None:
            return draw.choices(range(len(ACTIONS)), weights)[0]
        best = None
        for action in draw.choices(range(len(ACTIONS)), weights, k=tries):
            found = advantage(state, ann_does, action)
            if best is None or found > best[0]:
                best = found, action
            if found >= 0:
                break
        return best[1]

    ann, ben = corridor.START
    taken = []
    for step in range(1, most_steps + 1):
        state = corridor.PLACE[ann, ben]
        first = choose(state, None)
        second = choose(state, first)
        taken += [(state, None, first), (state, first, second)]
        ann = corridor.move(ann, first, ben)
        ben = corridor.move(ben, second, ann)
        if (ann, ben) == corridor.GOAL:
            return step, taken
    return most_steps + 1, taken


# --- the critic --------------------------------------------------------------------------------------------------


class Critic(torch.nn.Module):
    """Q of every beginning of a plan: the state alone, with Ann's action, with both."""

    def __init__(self, width: int = 64):
        super().__init__()
        blank = len(ACTIONS)  # an action not decided yet
        self.sizes = (len(STATES), blank + 1, blank + 1)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(sum(self.sizes), width), torch.nn.ReLU(), torch.nn.Linear(width, width), torch.nn.ReLU(),
            torch.nn.Linear(width, 1),
        )  # fmt: skip

    def forward(self, plans: Tensor) -> Tensor:
        """[S, 3] int64 (state, Ann's action, Ben's action; len(ACTIONS) where open) -> [S] values."""
        hot = [torch.nn.functional.one_hot(plans[:, i], size) for i, size in enumerate(self.sizes)]
        return self.net(torch.cat(hot, 1).float()).squeeze(1)

    def advantages(self, steps: Sequence[Step]) -> Tensor:
        """[S]: what each action adds to the value of the plan before it."""
        with torch.no_grad():
            return self(_plans(steps, 1)) - self(_plans(steps, 0))

    def fit(self, steps: Sequence[Step], updates: int, seed: int) -> float:
        """Regression of returns on the plans' beginnings; the last batch's mean squared error."""
        generator = torch.Generator().manual_seed(seed)
        plans = torch.cat([_plans(steps, 0), _plans(steps, 1)])
        returned = torch.tensor([step.returned for step in steps]).repeat(2)
        optimizer = torch.optim.Adam(self.parameters(), lr=3e-3)
        for _ in range(updates):
            drawn = torch.randint(len(plans), (512,), generator=generator)
            loss = (self(plans[drawn]) - returned[drawn]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()


def _plans(steps: Sequence[Step], decided: int) -> Tensor:
    """[S, 3]: the plan before (decided 0) or after (1) each step's action."""
    blank = len(ACTIONS)
    found = []
    for step in steps:
        after = step.action if decided else blank
        found.append((step.state, after, blank) if step.ann_does is None else (step.state, step.ann_does, after))
    return torch.tensor(found)


def collect(policy: np.ndarray, draw: random.Random, episodes: int, most_steps: int, discount: float) -> list[Step]:
    """The steps of whole episodes with their discounted returns."""
    steps = []
    for _ in range(episodes):
        length, taken = episode(policy, draw, most_steps)
        for i, (state, ann_does, action) in enumerate(taken):
            steps.append(Step(state, ann_does, action, discount ** (length - 1 - i // 2) if length <= most_steps else 0.0))
    return steps


# --- the run -----------------------------------------------------------------------------------------------------


def run(
    seeds: Sequence[int] = (0, 1, 2),
    *,
    rounds: int = 4,
    episodes: int = 150,
    most_steps: int = 40,
    updates: int = 25,
    critic_updates: int = 400,
    learning_rate: float = 1e-3,
    temperature: float = 0.05,
    discount: float = 0.95,
    fit_steps: int = 150,
    tests: int = 200,
) -> dict[str, Any]:
    """Steps until both agents stand on their goals; most_steps + 1 stands for no success.

    Arms: the planner as it is; the same planner that plans again where the critic sees no advantage; trained on its own
    episodes with weight 1 (imitation); trained with advantage weights.
    """
    import copy

    from tqdm import tqdm

    names = ("no feedback", "plans again", "own plans, weight 1", "advantage-weighted")
    runs: dict[str, list[list[float]]] = {name: [] for name in names}
    successes: dict[str, list[float]] = {name: [] for name in names}

    def test(policy: np.ndarray, seed: int, advantage=None) -> tuple[float, float]:
        draw = random.Random(10_000 + seed)
        lengths = [episode(policy, draw, most_steps, advantage)[0] for _ in range(tests)]
        return float(np.mean(lengths)), float(np.mean([length <= most_steps for length in lengths]))

    with tqdm(total=len(seeds) * 3, desc="read", unit="run") as bar:
        for seed in seeds:
            start = Planner(seed, fit_steps)
            for weighted in (False, True):
                planner, draw = copy.deepcopy(start), random.Random(seed)
                optimizer = torch.optim.Adam(planner.model.parameters(), lr=learning_rate)
                name = "advantage-weighted" if weighted else "own plans, weight 1"
                curve = [test(planner.policy(), seed)]
                for t in range(rounds):
                    steps = collect(planner.policy(), draw, episodes, most_steps, discount)
                    torch.manual_seed(seed)
                    critic = Critic()
                    critic.fit(steps, critic_updates, seed=100 * seed + t)
                    if weighted and t == 0:
                        known = critic  # of the start planner, for planning again
                    advantages = critic.advantages(steps) if weighted else torch.zeros(len(steps))
                    lines, did = torch.tensor([s.line for s in steps]), torch.tensor([s.action for s in steps])
                    for _ in range(updates):
                        loss = advantage_weighted(planner.menu.logps(planner.model)[lines, did], advantages, temperature)
                        optimizer.zero_grad()
                        loss.backward()
                        optimizer.step()
                    curve.append(test(planner.policy(), seed))
                runs[name].append([steps for steps, _ in curve])
                successes[name].append(curve[-1][1])
                bar.update()
            plain = test(start.policy(), seed)
            table = _table_of_advantages(known)
            again = test(start.policy(), seed, lambda s, a, b: table[Step(s, a, 0, 0.0).line][b])  # noqa: B023
            for name, (steps, success) in (("no feedback", plain), ("plans again", again)):
                runs[name].append([steps] * (rounds + 1))
                successes[name].append(success)
            bar.update()
    table = [
        {
            "planner": name,
            "steps to success": report.over_seeds([curve[-1] for curve in curves], 1),
            "success": report.over_seeds(successes[name], 2),
        }
        for name, curves in runs.items()
    ]
    return {
        "settings": dict(
            rounds=rounds, episodes=episodes, most_steps=most_steps, updates=updates, temperature=temperature,
            discount=discount, tests=tests,
        ),
        "runs": runs,
        "success": successes,
        "table": table,
        "notes": [
            f"Episodes end after {most_steps} steps; one without success counts as {most_steps + 1}. "
            f"The shortest way takes {corridor.fewest_steps()}."
        ],
    }  # fmt: skip


def _table_of_advantages(critic: Critic) -> list[list[float]]:
    """[prompts][actions], in the order of the planner's menu."""
    steps = [
        Step(state, ann_does, action, 0.0)
        for ann_does in (None, *range(len(ACTIONS)))
        for state in range(len(STATES))
        for action in range(len(ACTIONS))
    ]
    return critic.advantages(steps).view(-1, len(ACTIONS)).tolist()


def plot(figure, result: dict[str, Any]) -> None:
    axes = figure.subplots()
    for name, curves in result["runs"].items():
        report.band(axes, range(len(curves[0])), curves, name)
    axes.set(xlabel="rounds of training", ylabel="steps to success", xticks=range(len(curves[0])))
    axes.legend(fontsize=8)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    return report.main(argv, name="read", doc=__doc__, run=run, plot=plot)


if __name__ == "__main__":
    main()

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

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .actions import Menu
from .harness.recipe import Arm, Columns, Recipe, Row, commands
from .tasks import corridor, toy_lm
from .tasks.corridor import ACTIONS, STATES

OPEN = len(ACTIONS)  # in a plan: an action that is not decided yet
MOST_WEIGHT = 20.0  # a single lucky step does not outweigh a batch


def advantage_weighted(logps: Tensor, advantages: Tensor, temperature: float, most: float = MOST_WEIGHT) -> Tensor:
    """-mean min(e^(A / temperature), most) l, for log-likelihoods and advantages [S] of what was done."""
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    return -((advantages / temperature).exp().clamp(max=most).detach() * logps).mean()


# --- the planner -------------------------------------------------------------------------------------------------


def line(state: int, ann_does: int | None) -> int:
    """The place among the planner's prompts: Ann's in each state, then Ben's for each action of hers."""
    return state if ann_does is None else len(STATES) * (1 + ann_does) + state


PROMPTS = [corridor.prompt(state, ann_does) for ann_does in (None, *range(len(ACTIONS))) for state in STATES]


class Step(NamedTuple):
    """One action of one agent, and what it came to."""

    state: int
    ann_does: int | None  # None: this is Ann's own step
    action: int
    returned: float = 0.0  # discount ** (steps until success), 0 without

    @property
    def plan(self) -> tuple[int, int, int]:
        """The state, Ann's action and Ben's."""
        return (self.state, self.action, OPEN) if self.ann_does is None else (self.state, self.ann_does, self.action)


class Planner:
    """A tiny LM that says the next action of either agent."""

    def __init__(self, seed: int, steps: int):
        words, draw = corridor.tokenizer(), random.Random(seed)
        examples = [_selfish(draw) for _ in range(1500)]
        self.model = toy_lm.fitted(words, examples, seed=seed, steps=steps, end=False, hidden_size=32)
        self.menu = Menu(words, PROMPTS, ACTIONS)

    @torch.no_grad()
    def policy(self) -> np.ndarray:
        """[prompts, actions] probabilities."""
        return self.menu.logps(self.model).double().softmax(-1).numpy()


def _selfish(draw: random.Random) -> tuple[str, str]:
    """A line to learn from: somebody who heads for the own goal two times out of three, and never thinks of the other."""
    state, ann_does = draw.choice(STATES), draw.choice([None, *range(len(ACTIONS))])
    cell, ahead = (state[0], "east") if ann_does is None else (state[1], "west")
    ahead = "south" if cell == corridor.BAY else ahead
    return corridor.prompt(state, ann_does), ahead if draw.random() < 2 / 3 else ACTIONS[draw.randrange(len(ACTIONS))]


def choose(weights: Sequence[float], draw: random.Random, advantages: Sequence[float] | None, tries: int = 5) -> int:
    """An action, drawn; with advantages drawn again, `tries` times at most, while its own is below 0; the best one stays."""
    if advantages is None:
        return draw.choices(range(len(ACTIONS)), weights)[0]
    drawn = draw.choices(range(len(ACTIONS)), weights, k=tries)
    wanted = next((i for i, action in enumerate(drawn) if advantages[action] >= 0), tries)
    return max(drawn[: wanted + 1], key=lambda action: advantages[action])


def episode(policy: np.ndarray, draw: random.Random, most_steps: int, advantages=None) -> tuple[int, list[Step]]:
    """Steps taken (most_steps + 1 where there is no success), and both agents' actions at each.

    advantages: [prompts][actions], by which agents plan again, see `choose`.
    """
    ann, ben = corridor.START
    taken = []

    def act(state: int, ann_does: int | None) -> int:
        place = line(state, ann_does)
        action = choose(policy[place], draw, None if advantages is None else advantages[place])
        taken.append(Step(state, ann_does, action))
        return action

    for step in range(1, most_steps + 1):
        state = corridor.PLACE[ann, ben]
        first = act(state, None)
        second = act(state, first)
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
        self.sizes = (len(STATES), len(ACTIONS) + 1, len(ACTIONS) + 1)
        layers = [torch.nn.Linear(sum(self.sizes), width), torch.nn.ReLU(), torch.nn.Linear(width, width), torch.nn.ReLU()]
        self.net = torch.nn.Sequential(*layers, torch.nn.Linear(width, 1))

    def forward(self, plans: Tensor) -> Tensor:
        """Plans [S, 3] int64 -> [S] values."""
        hot = [torch.nn.functional.one_hot(plans[:, i], size) for i, size in enumerate(self.sizes)]
        return self.net(torch.cat(hot, 1).float()).squeeze(1)

    def advantages(self, steps: Sequence[Step]) -> Tensor:
        """[S]: what each action adds to the value of the plan before it."""
        with torch.no_grad():
            before, after = _plans(steps)
            return self(after) - self(before)

    def table(self) -> list[list[float]]:
        """[prompts][actions]: the advantages of all actions there are."""
        whom, places = (None, *range(len(ACTIONS))), range(len(STATES))
        steps = [Step(state, ann_does, action) for ann_does in whom for state in places for action in range(len(ACTIONS))]
        return self.advantages(steps).view(-1, len(ACTIONS)).tolist()

    def fit(self, steps: Sequence[Step], updates: int, seed: int) -> None:
        """Regression of returns on the plans' beginnings."""
        generator = torch.Generator().manual_seed(seed)
        plans = torch.cat(_plans(steps))
        returned = torch.tensor([step.returned for step in steps]).repeat(2)
        optimizer = torch.optim.Adam(self.parameters(), lr=3e-3)
        for _ in range(updates):
            drawn = torch.randint(len(plans), (512,), generator=generator)
            loss = (self(plans[drawn]) - returned[drawn]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def _plans(steps: Sequence[Step]) -> tuple[Tensor, Tensor]:
    """[S, 3] each: the plans before and after each step's action."""
    before = [step._replace(action=OPEN).plan for step in steps]
    return torch.tensor(before), torch.tensor([step.plan for step in steps])


# --- the run -----------------------------------------------------------------------------------------------------


@dataclass
class Read(Recipe):
    """Steps until both agents stand on their goals; most_steps + 1 stands for no success.

    The planner as it is; the same that plans again where the critic sees no advantage; trained on its own episodes with
    weight 1 (imitation); trained with advantage weights.
    """

    name = "read"
    heading = "planner"
    panels: ClassVar[dict[str, str]] = {"steps": "steps to success"}
    x_label = "rounds of training"
    digits: ClassVar[dict[str, int]] = {"steps to success": 1, "success": 2}
    rounds: int = 4
    episodes: int = 150
    most_steps: int = 40
    updates: int = 25
    critic_updates: int = 400
    learning_rate: float = 1e-3
    temperature: float = 0.05
    discount: float = 0.95
    fit_steps: int = 150
    tests: int = 200

    def start(self, seed: int) -> Planner:
        return Planner(seed, self.fit_steps)

    def arms(self) -> dict[str, Arm]:
        return {
            "no feedback": self.untrained,
            "plans again": self.planning_again,
            "own plans, weight 1": partial(self.trained, weighted=False),
            "advantage-weighted": partial(self.trained, weighted=True),
        }

    def untrained(self, start: Planner, seed: int, advantages=None) -> Row:
        length, success = self.test(start.policy(), seed, advantages)
        return {"steps": [length] * (self.rounds + 1), "success": success}

    def planning_again(self, start: Planner, seed: int) -> Row:
        """By the critic that the first round of training has too."""
        critic = self.critic(self.collect(start.policy(), random.Random(seed)), seed, t=0)
        return self.untrained(start, seed, critic.table())

    def trained(self, start: Planner, seed: int, *, weighted: bool) -> Row:
        planner, draw = copy.deepcopy(start), random.Random(seed)
        optimizer = torch.optim.Adam(planner.model.parameters(), lr=self.learning_rate)
        tests = [self.test(planner.policy(), seed)]
        for t in range(self.rounds):
            steps = self.collect(planner.policy(), draw)
            advantages = self.critic(steps, seed, t).advantages(steps) if weighted else torch.zeros(len(steps))
            lines = torch.tensor([line(step.state, step.ann_does) for step in steps])
            did = torch.tensor([step.action for step in steps])
            for _ in range(self.updates):
                logps = planner.menu.logps(planner.model)[lines, did]
                loss = advantage_weighted(logps, advantages, self.temperature)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            tests.append(self.test(planner.policy(), seed))
        return {"steps": [length for length, _ in tests], "success": tests[-1][1]}

    def collect(self, policy: np.ndarray, draw: random.Random) -> list[Step]:
        """The steps of whole episodes with their discounted returns."""
        steps = []
        for _ in range(self.episodes):
            length, taken = episode(policy, draw, self.most_steps)
            for i, step in enumerate(taken):
                steps.append(
                    step._replace(returned=self.discount ** (length - 1 - i // 2) if length <= self.most_steps else 0.0)
                )
        return steps

    def critic(self, steps: Sequence[Step], seed: int, t: int) -> Critic:
        torch.manual_seed(seed)
        critic = Critic()
        critic.fit(steps, self.critic_updates, seed=100 * seed + t)
        return critic

    def test(self, policy: np.ndarray, seed: int, advantages=None) -> tuple[float, float]:
        """Mean steps of new episodes, and the share of them that succeed."""
        draw = random.Random(10_000 + seed)
        lengths = [episode(policy, draw, self.most_steps, advantages)[0] for _ in range(self.tests)]
        return float(np.mean(lengths)), float(np.mean([length <= self.most_steps for length in lengths]))

    def columns(self, row: Row) -> Columns:
        return {"steps to success": row["steps"][-1], "success": row["success"]}

    def notes(self, rows: Sequence[Row]) -> list[str]:
        return [
            f"Episodes end after {self.most_steps} steps; one without success counts as {self.most_steps + 1}. "
            f"The shortest way takes {corridor.fewest_steps()}."
        ]


run, main = commands(Read)

if __name__ == "__main__":
    main()

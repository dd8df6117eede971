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
from .tasks.corridor import ACTIONS, PROMPTS, STATES

OPEN = len(ACTIONS)  # in a plan: an action that is not decided yet
MOST_WEIGHT = 20.0  # a single lucky step does not outweigh a batch


def advantage_weighted(logps: Tensor, advantages: Tensor, temperature: float, most: float = MOST_WEIGHT) -> Tensor:
    """-mean min(e^(A / temperature), most) l, for log-likelihoods and advantages [S] of what was done."""
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    return -((advantages / temperature).exp().clamp(max=most).detach() * logps).mean()


class Planner:
    """A tiny LM that says the next action of either agent."""

    def __init__(self, seed: int, steps: int):
        words, draw = corridor.tokenizer(), random.Random(seed)
        examples = [corridor.selfish(draw) for _ in range(1500)]
        self.model = toy_lm.fitted(words, examples, seed=seed, steps=steps, end=False, hidden_size=32)
        self.menu = Menu(words, PROMPTS, ACTIONS)

    @torch.no_grad()
    def policy(self) -> np.ndarray:
        """[prompts, actions] probabilities."""
        return self.menu.logps(self.model).double().softmax(-1).numpy()


def choose(weights: Sequence[float], draw: random.Random, advantages: Sequence[float] | None, tries: int = 5) -> int:
    """Draws an action; with advantages, up to `tries` actions until one has an advantage that is not below 0, else the best."""
    if advantages is None:
        return draw.choices(range(len(ACTIONS)), weights)[0]
    drawn = draw.choices(range(len(ACTIONS)), weights, k=tries)
    wanted = next((i for i, action in enumerate(drawn) if advantages[action] >= 0), tries)
    return max(drawn[: wanted + 1], key=lambda action: advantages[action])


class Steps(NamedTuple):
    """What the agents did, all [S]."""

    places: Tensor  # of their prompts
    actions: Tensor
    returned: Tensor  # discount ** (steps until success), 0 without


def plans(places: Tensor, actions: Tensor) -> Tensor:
    """[S, 3] plans once the prompts at these places are answered: the state, Ann's action and Ben's."""
    turn, state = places // len(STATES), places % len(STATES)
    is_ann = turn == 0  # else the prompt says that she does action turn - 1
    return torch.stack([state, torch.where(is_ann, actions, turn - 1), torch.where(is_ann, OPEN, actions)], 1)


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

    @torch.no_grad()
    def advantages(self, places: Tensor, actions: Tensor) -> Tensor:
        """[S]: what each action adds to the value of the plan before it."""
        return self(plans(places, actions)) - self(plans(places, torch.full_like(actions, OPEN)))

    def table(self) -> list[list[float]]:
        """[prompts][actions]: the advantages of all actions there are."""
        places = torch.arange(len(PROMPTS)).repeat_interleave(len(ACTIONS))
        return self.advantages(places, torch.arange(len(ACTIONS)).repeat(len(PROMPTS))).view(-1, len(ACTIONS)).tolist()

    def fit(self, steps: Steps, updates: int, seed: int) -> None:
        """Regression of returns on the plans' beginnings."""
        generator = torch.Generator().manual_seed(seed)
        before, after = plans(steps.places, torch.full_like(steps.actions, OPEN)), plans(steps.places, steps.actions)
        inputs, returned = torch.cat([before, after]), steps.returned.repeat(2)
        optimizer = torch.optim.Adam(self.parameters(), lr=3e-3)
        for _ in range(updates):
            drawn = torch.randint(len(inputs), (512,), generator=generator)
            loss = (self(inputs[drawn]) - returned[drawn]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@dataclass
class Read(Recipe):
    """Steps until both agents stand on their goals; most_steps + 1 where they do not get there.

    Arms: the planner before training; the same, which plans again where the critic sees no advantage; trained on its own
    episodes with weight 1 (imitation); trained with advantage weights.
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
        """With the critic of the first round of training."""
        critic = self.critic(self.collect(start.policy(), random.Random(seed)), seed, t=0)
        return self.untrained(start, seed, critic.table())

    def trained(self, start: Planner, seed: int, *, weighted: bool) -> Row:
        planner, draw = copy.deepcopy(start), random.Random(seed)
        optimizer = torch.optim.Adam(planner.model.parameters(), lr=self.learning_rate)
        tests = [self.test(planner.policy(), seed)]
        for t in range(self.rounds):
            steps = self.collect(planner.policy(), draw)
            places, did, _ = steps
            advantages = self.critic(steps, seed, t).advantages(places, did) if weighted else torch.zeros(len(did))
            for _ in range(self.updates):
                logps = planner.menu.logps(planner.model)[places, did]
                loss = advantage_weighted(logps, advantages, self.temperature)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            tests.append(self.test(planner.policy(), seed))
        return {"steps": [length for length, _ in tests], "success": tests[-1][1]}

    def episode(self, policy: np.ndarray, draw: random.Random, advantages=None) -> tuple[int, list[tuple[int, int]]]:
        """As `corridor.episode`. advantages: [prompts][actions], by which agents plan again, see `choose`."""

        def act(place: int) -> int:
            return choose(policy[place], draw, None if advantages is None else advantages[place])

        return corridor.episode(act, self.most_steps)

    def collect(self, policy: np.ndarray, draw: random.Random) -> Steps:
        """The steps of whole episodes."""
        taken, returned = [], []
        for _ in range(self.episodes):
            length, actions = self.episode(policy, draw)
            taken += actions
            won = length <= self.most_steps
            returned += [self.discount ** (length - 1 - i // 2) * won for i in range(len(actions))]  # two actions are a step
        return Steps(*torch.tensor(taken).T, torch.tensor(returned))

    def critic(self, steps: Steps, seed: int, t: int) -> Critic:
        torch.manual_seed(seed)
        critic = Critic()
        critic.fit(steps, self.critic_updates, seed=100 * seed + t)
        return critic

    def test(self, policy: np.ndarray, seed: int, advantages=None) -> tuple[float, float]:
        """Mean steps of new episodes, and the share of them that succeed."""
        draw = random.Random(10_000 + seed)
        lengths = [self.episode(policy, draw, advantages)[0] for _ in range(self.tests)]
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

"""gymnasium's FrozenLake-v1 in words: cross a 4 x 4 lake from one corner to the other without falling into a hole."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ..optional import need
from . import toy_lm

# In gymnasium's order (left, down, right, up). Lengths differ on purpose: 1, 4, 3 and 2 words; 1, 5, 3 and 3 tokens.
ACTIONS = ("retreat", "step carefully downwards now", "walk along right", "climb upwards")
ENDINGS = ("wards",)
NUMBERS = ("one", "two", "three", "four")
SIDE = len(NUMBERS)
STATES = SIDE * SIDE
MAP = ("SFFF", "FHFH", "FFFH", "HFFG")  # gymnasium's 4x4
MOST_STEPS = 40
KINDS = {"S": "ice", "F": "ice", "H": "hole", "G": "goal"}
MOVES = {"left": (0, -1), "down": (1, 0), "right": (0, 1), "up": (-1, 0)}  # rows, columns


def make(*, slippery: bool, max_steps: int = MOST_STEPS):
    """The environment; ImportError naming the extra where gymnasium is not installed."""
    gymnasium = need("gymnasium", "recipes")
    return gymnasium.make("FrozenLake-v1", desc=list(MAP), is_slippery=slippery, max_episode_steps=max_steps)


def describe(state: int) -> str:
    """What a player sees there.

    >>> describe(0)
    'you stand at row one column one : left is edge down is ice right is ice up is edge'
    """
    row, column = divmod(state, SIDE)
    around = [f"{name} is {_kind(row + y, column + x)}" for name, (y, x) in MOVES.items()]
    return f"you stand at row {NUMBERS[row]} column {NUMBERS[column]} : {' '.join(around)}"


def tokenizer() -> PreTrainedTokenizerFast:
    words = [*(word for state in range(STATES) for word in describe(state).split()), *" ".join(ACTIONS).split()]
    whole = [word for word in words if not word.endswith(ENDINGS)]
    stems = [word.removesuffix(ENDINGS[0]) for word in words if word.endswith(ENDINGS)]
    return toy_lm.tokenizer([*whole, *stems], ENDINGS)


class Step(NamedTuple):
    state: int
    action: int
    reward: float
    after: int
    over: bool


def episode(env, policy: np.ndarray, draw: np.random.Generator) -> list[Step]:
    """One episode under policy [horizon, S, A]."""
    state, _ = env.reset(seed=int(draw.integers(2**31)))
    taken = []
    for chances in policy.cumsum(-1):
        action = min(int(np.searchsorted(chances[state], draw.random())), len(ACTIONS) - 1)  # sums may round to below 1
        after, reward, over, truncated, _ = env.step(action)
        taken.append(Step(state, action, float(reward), after, over))
        if over or truncated:
            break
        state = after
    return taken


def returns(episodes: Sequence[Sequence[float]], discount: float) -> list[np.ndarray]:
    """Discounted sums of what was still to come, per episode and step.

    >>> returns([[0.0, 0.0, 1.0]], 0.5)
    [array([0.25, 0.5 , 1.  ])]
    """
    sums = ([*accumulate(reversed(rewards), lambda total, reward: reward + discount * total)] for rewards in episodes)
    return [np.array(one[::-1]) for one in sums]


def _kind(row: int, column: int) -> str:
    return KINDS[MAP[row][column]] if 0 <= row < SIDE and 0 <= column < SIDE else "edge"


# --- what is known of the lake exactly ---------------------------------------------------------------------------


def exact_return(policy: Tensor, env) -> float:
    """The expected return of policy [horizon, S, A] in gymnasium's table of transitions."""
    moves, rewards = true_tables(env)
    value = torch.zeros(len(rewards), dtype=torch.float64)
    for act in policy.flip(0):
        value = (act * (rewards + moves @ value)).sum(1)
    return float(value[0])


def true_tables(env) -> tuple[Tensor, Tensor]:
    """Transitions [S, A, S], 0 where the episode ends, and expected rewards [S, A]."""
    table = env.unwrapped.P
    moves = torch.zeros(len(table), len(table[0]), len(table), dtype=torch.float64)
    rewards = torch.zeros(len(table), len(table[0]), dtype=torch.float64)
    for state, actions in table.items():
        for action, outcomes in actions.items():
            for probability, after, reward, over in outcomes:
                rewards[state, action] += probability * reward
                if not over:
                    moves[state, action, after] += probability
    return moves, rewards

"""TWOSOME (arXiv 2401.14151): a language model acts, by the likelihood it gives to the text of each valid action.

    pi(a_i | s) = e^(l_i / N_i) / sum_j e^(l_j / N_j),        l_i = log p(text of a_i | text of s)

With N_i = 1 long texts are hardly ever chosen, since every further token costs likelihood; N_i counts the action's tokens or
its words instead. PPO's clipped loss trains the model through that softmax. The paper's critic is a head on the model; here,
with 16 states, the baseline is the mean return seen from a state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .actions import NORMALISATIONS, Menu, Normalisation, action_logits
from .harness.recipe import Arm, Columns, Recipe, Row, commands
from .tasks import lake, toy_lm


def ppo_loss(
    logps: Tensor, lengths: Tensor, actions: Tensor, advantages: Tensor, old_log_pi: Tensor, clip: float = 0.2
) -> Tensor:
    """-mean min(ratio A, clip(ratio) A) with ratio = pi(a) / pi_old(a) (PPO, arXiv 1707.06347, eq. 7).

    Args:
        logps: [B, A] log-likelihoods of the valid actions' texts; lengths: [A], their N.
        actions: [B] int64, what was done; advantages: [B]; old_log_pi: [B], log pi of it when it was done.
    """
    log_pi = action_logits(logps, lengths).log_softmax(-1).gather(-1, actions[:, None]).squeeze(-1)
    ratio = (log_pi - old_log_pi).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


def rollouts(env, policy: np.ndarray, steps: int, draw: np.random.Generator) -> list[list[lake.Step]]:
    """Whole episodes under policy [states, actions] until `steps` steps are done."""
    episodes: list[list[lake.Step]] = []
    while sum(map(len, episodes)) < steps:
        episodes.append(lake.episode(env, np.broadcast_to(policy, (lake.MOST_STEPS, *policy.shape)), draw))
    return episodes


@dataclass
class Twosome(Recipe):
    """A tiny LM from scratch on FrozenLake without slipping, for each normalisation. A return is 1 at the goal, else 0."""

    name = "twosome"
    heading = "N"
    panels: ClassVar[dict[str, str]] = {"curve": "return"}
    x_label = "update"
    updates: int = 80
    steps: int = 256
    epochs: int = 4
    learning_rate: float = 3e-3
    discount: float = 0.95

    def arms(self) -> dict[str, Arm]:
        return {normalisation: partial(self.trained, normalisation=normalisation) for normalisation in NORMALISATIONS}

    def trained(self, start: None, seed: int, *, normalisation: Normalisation) -> Row:
        """The mean return of each update's episodes."""
        draw = np.random.default_rng(seed)
        env = lake.make(slippery=False)
        tokenizer = lake.tokenizer()
        model = toy_lm.causal_lm(tokenizer, seed=seed, hidden_size=32)
        menu = Menu(tokenizer, [lake.describe(state) for state in range(lake.STATES)], lake.ACTIONS)
        lengths = menu.lengths(normalisation)
        optimizer = torch.optim.Adam(model.parameters(), lr=self.learning_rate)
        baseline, curve = Baseline(), []
        for _ in range(self.updates):
            with torch.no_grad():
                log_pi = action_logits(menu.logps(model), lengths).log_softmax(-1)
            episodes = rollouts(env, log_pi.exp().double().numpy(), self.steps, draw)
            rewards = [[step.reward for step in one] for one in episodes]
            curve.append(float(np.mean([sum(one) for one in rewards])))
            at, did = np.array([step[:2] for one in episodes for step in one]).T
            advantages = baseline.advantages(at, np.concatenate(lake.returns(rewards, self.discount)))
            at, did = torch.from_numpy(at), torch.from_numpy(did)
            old = log_pi[at, did]
            for _ in range(self.epochs):
                loss = ppo_loss(menu.logps(model)[at], lengths, did, advantages, old)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return {"curve": curve}

    def columns(self, row: Row) -> Columns:
        curve = row["curve"]
        return {
            "return, first update": curve[0],
            "return, mean over training": float(np.mean(curve)),
            "return, last tenth": float(np.mean(curve[-max(1, len(curve) // 10) :])),
        }

    def notes(self, rows: Sequence[Row]) -> list[str]:
        return ["N: none = 1, the words or the tokens of an action's text."]


class Baseline:
    """The mean return seen from each state, in which older returns count less."""

    def __init__(self):
        self.value, self.visits = np.zeros(lake.STATES), np.zeros(lake.STATES)

    def advantages(self, states: np.ndarray, returned: np.ndarray) -> Tensor:
        """[B] float32: returns less the means so far, scaled to a standard deviation of 1; then updates the means."""
        above = returned - self.value[states]
        np.add.at(self.visits, states, 1.0)
        np.add.at(self.value, states, above / self.visits[states].clip(1))
        self.visits *= 0.7  # the policy moves
        spread = above.std()
        return torch.from_numpy(above / (spread if spread > 0 else 1.0)).float()


run, main = commands(Twosome)

if __name__ == "__main__":
    main()

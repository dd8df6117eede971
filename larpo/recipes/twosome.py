"""TWOSOME (arXiv 2401.14151): a language model acts, by the likelihood it gives to the text of each valid action.

    pi(a_i | s) = e^(l_i / N_i) / sum_j e^(l_j / N_j),        l_i = log p(text of a_i | text of s)

With N_i = 1 long texts are hardly ever chosen, since every further token costs likelihood; N_i counts the action's tokens or
its words instead. PPO's clipped loss trains the model through that softmax. The paper's critic is a head on the model; here,
with 16 states, the baseline is the mean return seen from a state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .actions import NORMALISATIONS, Menu, Normalisation, action_logits
from .harness import report
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


# --- the run -----------------------------------------------------------------------------------------------------


def rollouts(env, policy: np.ndarray, steps: int, draw: np.random.Generator) -> tuple[list, list, list]:
    """Whole episodes under policy [states, actions] until `steps` steps are done: states, actions, rewards of each."""
    states, actions, rewards, done = [], [], [], 0
    while done < steps:
        state, _ = env.reset(seed=int(draw.integers(2**31)))
        path: tuple[list, list, list] = ([], [], [])
        over = False
        while not over:
            action = lake.draw_action(policy[state], draw)
            after, reward, terminated, truncated, _ = env.step(action)
            for values, value in zip(path, (state, action, float(reward)), strict=True):
                values.append(value)
            state, over = after, terminated or truncated
        done += len(path[0])
        for episodes, values in zip((states, actions, rewards), path, strict=True):
            episodes.append(values)
    return states, actions, rewards


def train(
    normalisation: Normalisation, seed: int, *, updates: int, steps: int, epochs: int, learning_rate: float, discount: float
) -> list[float]:
    """The mean return of each update's episodes."""
    draw = np.random.default_rng(seed)
    env = lake.make(slippery=False)
    tokenizer = lake.tokenizer()
    model = toy_lm.causal_lm(tokenizer, seed=seed, hidden_size=32)
    menu = Menu(tokenizer, [lake.describe(state) for state in range(lake.STATES)], lake.ACTIONS)
    lengths = menu.lengths(normalisation)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    value, visits = np.zeros(lake.STATES), np.zeros(lake.STATES)
    curve = []
    for _ in range(updates):
        with torch.no_grad():
            log_pi = action_logits(menu.logps(model), lengths).log_softmax(-1)
        states, actions, rewards = rollouts(env, log_pi.exp().double().numpy(), steps, draw)
        curve.append(float(np.mean([sum(one) for one in rewards])))
        at, did = np.concatenate(states).astype(int), np.concatenate(actions).astype(int)
        returned = np.concatenate(lake.returns(rewards, discount))
        advantages = returned - value[at]
        np.add.at(visits, at, 1.0)
        np.add.at(value, at, advantages / visits[at].clip(1))
        visits *= 0.7  # the policy moves: old returns are forgotten
        spread = advantages.std()
        at, did = torch.from_numpy(at), torch.from_numpy(did)
        scaled = torch.from_numpy(advantages / (spread if spread > 0 else 1.0)).float()
        old = log_pi[at, did]
        for _ in range(epochs):
            loss = ppo_loss(menu.logps(model)[at], lengths, did, scaled, old)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return curve


def run(
    seeds: Sequence[int] = (0, 1, 2),
    *,
    updates: int = 80,
    steps: int = 256,
    epochs: int = 4,
    learning_rate: float = 3e-3,
    discount: float = 0.95,
) -> dict[str, Any]:
    """A tiny LM from scratch on FrozenLake without slipping, for each normalisation. A return is 1 at the goal, else 0."""
    from tqdm import tqdm

    runs: dict[str, list[list[float]]] = {normalisation: [] for normalisation in NORMALISATIONS}
    with tqdm(total=len(seeds) * len(runs), desc="twosome", unit="run") as bar:
        for seed in seeds:
            for normalisation, curves in runs.items():
                curves.append(
                    train(
                        normalisation, seed, updates=updates, steps=steps, epochs=epochs, learning_rate=learning_rate,
                        discount=discount,
                    )
                )  # fmt: skip
                bar.update()
    table = [
        {
            "N": normalisation,
            "return, first update": report.over_seeds([curve[0] for curve in curves]),
            "return, mean over training": report.over_seeds([float(np.mean(curve)) for curve in curves]),
            "return, last tenth": report.over_seeds([float(np.mean(curve[-max(1, updates // 10) :])) for curve in curves]),
        }
        for normalisation, curves in runs.items()
    ]
    return {
        "settings": dict(updates=updates, steps=steps, epochs=epochs, learning_rate=learning_rate, discount=discount),
        "runs": runs,
        "table": table,
        "notes": ["N: none = 1, the words or the tokens of an action's text."],
    }


def plot(figure, result: dict[str, Any]) -> None:
    axes = figure.subplots()
    for normalisation, curves in result["runs"].items():
        x = [(i + 1) * result["settings"]["steps"] for i in range(len(curves[0]))]
        report.band(axes, x, curves, f"N = {'1' if normalisation == 'none' else normalisation}")
    axes.set(xlabel="steps in the environment", ylabel="return")
    axes.legend()


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    return report.main(argv, name="twosome", doc=__doc__, run=run, plot=plot)


if __name__ == "__main__":
    main()

"""An objective that the library does not have, from differentiable log-likelihoods of whole answers.

    python examples/own_objective.py

Here: a list costs as much as its expected reward falls short of the best, under softmax of the implicit rewards. The head's
logits are still never formed: `linear_sequence_logps` gives one number an answer, and takes any gradient back.
"""

import torch

from larpo_kernels import linear_sequence_logps


def expected_regret(logps: torch.Tensor, ref_logps: torch.Tensor, rewards: torch.Tensor, beta: float = 0.1) -> torch.Tensor:
    """Scalar; all arguments [lists, answers]."""
    chance = (beta * (logps - ref_logps)).softmax(-1)
    return (rewards.amax(-1) - (chance * rewards).sum(-1)).mean()


def main(steps: int = 30) -> list[float]:
    """Two lists of four answers of eight tokens; hidden states stand for a model."""
    torch.manual_seed(0)
    hidden = torch.randn(8, 8, 32).requires_grad_()
    weight = torch.randn(500, 32)  # the lm_head, not trained here
    labels, rewards = torch.randint(500, (8, 8)), torch.rand(2, 4)
    ref_logps = linear_sequence_logps(hidden.detach(), weight, labels).view(2, 4)
    optimizer = torch.optim.Adam([hidden], lr=0.1)
    losses = []
    for _ in range(steps):
        loss = expected_regret(linear_sequence_logps(hidden, weight, labels).view(2, 4), ref_logps, rewards)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"expected regret: {losses[0]:.3f} before, {losses[-1]:.3f} after {steps} steps")
    return losses


if __name__ == "__main__":
    main()

"""The README's example runs as it stands."""

import re
from pathlib import Path

import torch

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_example_runs_and_trains():
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    scope = {}
    exec(example, scope)
    hidden, weight, labels = scope["hidden"], scope["weight"], scope["labels"]
    assert scope["out"].scores.shape == (8,)
    assert hidden.grad[labels != -100].abs().sum() > 0 and weight.grad.abs().sum() > 0
    assert torch.equal(hidden.grad[labels == -100], torch.zeros_like(hidden.grad[labels == -100]))

"""The examples of the README and of the guides run as they stand, but for the name of the model."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
HUB_NAME = '"HuggingFaceTB/SmolLM2-135M-Instruct"'


def examples(file):
    return re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(encoding="utf-8"), re.S)


def test_the_kernels_example_runs_and_trains():
    (example,) = (e for e in examples("README.md") if "larpo_kernels" in e)
    scope = {}
    exec(example, scope)
    hidden, weight, labels = scope["hidden"], scope["weight"], scope["labels"]
    assert scope["out"].scores.shape == (8,)
    assert hidden.grad[labels != -100].abs().sum() > 0 and weight.grad.abs().sum() > 0
    assert torch.equal(hidden.grad[labels == -100], torch.zeros_like(hidden.grad[labels == -100]))


@pytest.mark.parametrize("file", ["README.md", "docs/training.md"])
def test_the_trainer_example_runs(file, tmp_path, monkeypatch):
    for package in ("transformers", "accelerate", "datasets"):
        pytest.importorskip(package)
    from tests.helpers import tiny

    tiny.save(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (example,) = (e for e in examples(file) if "LarPOTrainer" in e)
    assert HUB_NAME in example
    exec(example.replace(HUB_NAME, repr(str(tmp_path / "model"))), {})
    assert list(tmp_path.glob("*/checkpoint-*/model.safetensors"))

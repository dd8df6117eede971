"""`python -m larpo.align.demo`: SmolLM2-135M learns to continue film reviews kindly, in three to five minutes on two CPU cores.

Model, reviews and reward come out of Python packages (see `larpo.offline`): no hub, no GPU.
"""

from __future__ import annotations

import argparse
from typing import Any

from . import AlignConfig, run

SETTINGS: dict[str, Any] = {
    "model": "smollm2",
    "prompts": "imdb",
    "reward": "imdb_sentiment",  # a sum over words: easy to please, so watch KL and the completions
    "iterations": 3,
    "prompts_per_iteration": 24,
    "k": 8,
    "max_new_tokens": 16,
    "memory": "none",  # on-policy: every iteration trains on what the policy says now
    "subset": "all",
    "eval_prompts": 32,
    "eval_k": 4,
    "solved_above": 1.0,
    "sample_batch_size": 96,
    "chunk_size": 64,
    "trained_layers": 4,
    "model_init_kwargs": {"dtype": "float32"},
    "keep_models": "last",
    "training": {
        "objective": "contrastive",
        "beta": 0.1,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "share_prefix": True,
        "logging_steps": 1,
        "save_strategy": "no",  # an iteration trains for less than a minute: not worth a file of half a gigabyte
    },
}


def config(output_dir: str, **changes: Any) -> AlignConfig:
    """The demo's settings; `changes` win, those in `training` one by one."""
    training = SETTINGS["training"] | changes.pop("training", {})
    return AlignConfig(**{**SETTINGS, **changes, "training": training, "output_dir": output_dir})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", default="runs/align-demo")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    run(config(asked.output_dir, seed=asked.seed))


if __name__ == "__main__":
    main()

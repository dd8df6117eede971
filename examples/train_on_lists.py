"""Ranked lists in a file, a model, LoRA: train with LarPOTrainer, and look at what was learned.

    python examples/train_on_lists.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data lists.jsonl

A line of the file: {"prompt": "...", "completions": ["...", "..."], "scores": [1.0, 0.0]}; other forms are read too
(docs/data.md). Without --data three lists are made up.
"""

import argparse

from datasets import Dataset
from peft import LoraConfig

from larpo import LarPOConfig, LarPOTrainer, load_lists

MADE_UP = [
    {"prompt": "the dog ran to", "completions": [" the house", " a film", " bad"], "scores": [1.0, 0.2, 0.0]},
    {"prompt": "one two", "completions": [" three four", " cat", " three"], "scores": [1.0, 0.0, 0.5]},
    {"prompt": "the film was", "completions": [" bad", " good", " fine"], "scores": [0.0, 1.0, 0.8]},
]


def main(arguments: list[str] | None = None) -> LarPOTrainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", help="a file, a saved dataset, or a name on the hub")
    parser.add_argument("--out", default="out")
    parser.add_argument("--steps", type=int, default=20)
    asked = parser.parse_args(arguments)
    args = LarPOConfig(
        output_dir=asked.out,
        objective="lambdarank",
        beta=0.1,
        max_steps=asked.steps,
        per_device_train_batch_size=1,  # lists, not candidates
        learning_rate=1e-3,
        logging_steps=5,
        report_to="none",
    )
    trainer = LarPOTrainer(
        asked.model,  # the reference policy is the same model with its adapter off: nothing is held twice
        args=args,
        train_dataset=load_lists(asked.data) if asked.data else Dataset.from_list(MADE_UP),
        peft_config=LoraConfig(r=8, target_modules="all-linear"),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()

"""Where the time of a training step goes beside the model, on a model so small that it shows: a Llama of 2 layers x 32.

python benchmarks/studies/trainer_step.py [--steps 200] [--logging-steps 1]

Every millisecond of CPU time the interpreter is asked where it is; the innermost frame of a package that is told apart counts.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from types import FrameType

import torch

ROOT = Path(__file__).resolve().parents[2]
if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(ROOT))

WORDS = ("the", "a", "cat", "dog", "film", "house", "sat", "ran", "is", "was", "good", "bad", "fine", "red", "one", "two")
WHERE = {  # the longest beginning of a module's name counts
    "larpo_kernels": "head and list loss",
    "transformers.models": "model",
    "transformers.masking_utils": "model",
    "transformers": "transformers",
    "accelerate": "transformers",
    "peft": "transformers",
    "larpo": "larpo",
}
KINDS = ("model", "head and list loss", "transformers", "larpo")
PERIOD_S = 1e-3
SETTINGS = {
    "no reference": dict(reference_free=True),
    "reference model": {},
    "LoRA": {},
    "shared prompts": dict(reference_free=True, share_prefix=True),
}
OPTIONS = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-6,
    "lr_scheduler_type": "constant",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def party(frame: FrameType | None) -> str:
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name == "torch.autograd.graph" and frame.f_code.co_name == "_engine_run_backward":
            return "model"  # and what is under way in it of the loss
        found = max((w for w in WHERE if name == w or name.startswith(f"{w}.")), key=len, default=None)
        if found is not None:
            return WHERE[found]
        frame = frame.f_back
    return "transformers"


@contextmanager
def sampled():
    """Counts of samples by party, while it lasts."""
    counts: Counter[str] = Counter()
    before = signal.signal(signal.SIGPROF, lambda _, frame: counts.update([party(frame)]))
    signal.setitimer(signal.ITIMER_PROF, PERIOD_S, PERIOD_S)
    try:
        yield counts
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2))


def lists(n: int, m: int = 4):
    from datasets import Dataset

    draw = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    return Dataset.from_list(
        [
            {"prompt": text(2, 6), "completions": [text(1, 6) for _ in range(m)], "scores": [draw.random() for _ in range(m)]}
            for _ in range(n)
        ]
    )


def ours(name: str, folder: str, options: dict):
    from larpo.config import LarPOConfig
    from larpo.trainer import LarPOTrainer

    peft_config = None
    if name == "LoRA":
        import peft

        peft_config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    args = LarPOConfig(output_dir=folder, **SETTINGS[name], **options)
    return LarPOTrainer(model(), None, args, train_dataset=lists(64), processing_class=tokenizer(), peft_config=peft_config)


def bare(folder: str, options: dict):
    """transformers.Trainer with the model's own loss, on as many rows of as many tokens."""
    from transformers import Trainer, TrainingArguments

    rows = [torch.randint(3, 20, (16, 16)) for _ in range(16)]
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in rows]
    args = TrainingArguments(output_dir=folder, remove_unused_columns=False, **options)
    return Trainer(model(), args, train_dataset=list(range(64)), data_collator=lambda places: batches[places[0] % 16])


def profiled(trainer, steps: int) -> tuple[float, Counter[str]]:
    """CPU seconds of a step, and samples by party."""
    trainer.args.max_steps = 5
    trainer.train()  # a first batch is checked, and libraries warm up
    trainer.args.max_steps = steps
    start = time.process_time()
    with sampled() as counts:
        trainer.train()
    return (time.process_time() - start) / steps, counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--logging-steps", type=int, default=1)
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    options = {**OPTIONS, "max_steps": asked.steps, "logging_steps": asked.logging_steps}
    print(f"| setting | CPU time of a step | {' | '.join(KINDS)} |\n|{'---|' * (2 + len(KINDS))}")
    for name in ["transformers.Trainer", *SETTINGS]:
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
            trainer = bare(folder, options) if name not in SETTINGS else ours(name, folder, options)
            seconds, counts = profiled(trainer, asked.steps)
        shares = " | ".join(f"{counts[kind] / counts.total():.0%}" for kind in KINDS)
        print(f"| {name} | {seconds * 1e3:.1f} ms | {shares} |", flush=True)


if __name__ == "__main__":
    main()

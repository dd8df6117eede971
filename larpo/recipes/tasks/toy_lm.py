"""Causal LMs over a handful of words, made on the spot: a recipe needs no download and runs in minutes on a CPU."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from larpo.modeling import row_layouts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PAD, BEGIN, END = "<pad>", "<s>", "</s>"


def tokenizer(words: Iterable[str], endings: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """A token per word, behind a <s>; a word that is another one and an ending has two.

    >>> toy = tokenizer(["go", "down"], endings=["wards"])
    >>> toy.convert_ids_to_tokens(toy("go downwards").input_ids)
    ['<s>', 'go', 'down', '##wards']
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = [PAD, BEGIN, END, "<unk>", *dict.fromkeys(words), *(f"##{ending}" for ending in dict.fromkeys(endings))]
    pieces = Tokenizer(models.WordPiece(vocab={token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pieces.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokens.index(BEGIN))])
    pieces.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token=PAD, bos_token=BEGIN, eos_token=END, unk_token="<unk>")


def prompt_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """A prompt's tokens, from <s> on."""
    return tokenizer(text).input_ids


def completion_ids(tokenizer: PreTrainedTokenizerFast, text: str, *, end: bool) -> list[int]:
    """A completion's tokens, ended with </s> or left open."""
    return tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] * end


def causal_lm(tokenizer: PreTrainedTokenizerFast, *, seed: int, hidden_size: int = 48, layers: int = 2) -> PreTrainedModel:
    """A random Llama of this size, with the forward model(rows=batch) of `larpo.modeling.policy`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from larpo.modeling.policy import Policy, attach

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.1,  # 0.02 is for models that are many times as wide
    )
    model = LlamaForCausalLM(config)
    return attach(model, Policy(model))


def fit(
    model: PreTrainedModel,
    candidates: Sequence[row_layouts.TokenizedCandidate],
    *,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    seed: int,
) -> float:
    """Maximum likelihood of the completions behind their prompts, drawn with replacement; the last batch's loss, nats."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
    model.train()
    for _ in range(steps):
        drawn = torch.randint(len(candidates), (batch_size,), generator=generator).tolist()
        loss = -model(rows=row_layouts.padded_rows([candidates[i] for i in drawn], model.config.pad_token_id)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    return loss.item()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of data sets, since a recipe has one of its own, and no warning of empty completions: a policy may
    sample them, and recipes count them."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*completions? empty", category=UserWarning)
            yield
    finally:
        if shown:
            datasets.enable_progress_bars()

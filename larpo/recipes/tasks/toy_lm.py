"""Causal LMs over a handful of words, made on the spot: a recipe needs no download and runs in minutes on a CPU."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from larpo.modeling import row_layouts
from larpo.modeling.policy import Policy, attach

PAD, BEGIN, END = "<pad>", "<s>", "</s>"


def tokenizer(words: Iterable[str], endings: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """A token per word, and <s> in front; a word that is another word with one of the endings has two.

    >>> toy = tokenizer(["go", "down"], endings=["wards"])
    >>> toy.convert_ids_to_tokens(toy("go downwards").input_ids)
    ['<s>', 'go', 'down', '##wards']
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

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


def fitted(
    tokenizer: PreTrainedTokenizerFast,
    texts: Iterable[tuple[str, str]],
    *,
    seed: int,
    steps: int,
    end: bool = True,
    hidden_size: int = 48,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
) -> PreTrainedModel:
    """A tiny LM fitted to (prompt, completion) texts, drawn with replacement; end: completions end with </s>."""
    prompts, completions = map(list, zip(*texts, strict=True))
    asked, said = tokenizer(prompts).input_ids, tokenizer(completions, add_special_tokens=False).input_ids
    ending = [tokenizer.eos_token_id] * end
    spoken = [row_layouts.TokenizedCandidate(a, b + ending) for a, b in zip(asked, said, strict=True)]
    model = causal_lm(tokenizer, seed=seed, hidden_size=hidden_size)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
    model.train()
    for _ in range(steps):
        drawn = torch.randint(len(spoken), (batch_size,), generator=generator).tolist()
        loss = -model(rows=row_layouts.padded_rows([spoken[i] for i in drawn], tokenizer.pad_token_id)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()

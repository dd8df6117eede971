"""Tiny causal LMs and a tokenizer, made on the spot: no downloads."""

from __future__ import annotations

import functools

import torch

VOCAB = 96
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GPT = dict(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2)


def causal_lm(
    model_type: str = "llama", *, seed: int = 0, spread: float = 6.0, dtype=torch.float32, attn_implementation=None, **config
):
    """A random model of this type, in eval mode; `spread` widens the head so that logits are far from uniform."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    sizes = GPT if model_type in ("gpt2", "gptj") else SIZES
    if model_type == "gptj":
        sizes = {**sizes, "rotary_dim": 8}
    config = AutoConfig.for_model(model_type, **{**sizes, **config})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    head = model.get_output_embeddings()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and name.endswith("bias"):
                parameter.normal_(std=0.5)
        head.weight.mul_(spread)
    return model.to(dtype).eval()


@functools.cache
def tokenizer(chat_template=None):
    """Byte-level BPE over a handful of words, with <pad> 0, <s> 1, </s> 2; VOCAB entries at most."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    text = ["the cat sat on the mat", "a dog ran to the red house", "good bad fine film is was", "one two three four"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted({c for line in text for c in line.replace(" ", "Ġ")})
    bpe.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=VOCAB, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=chat_template, **special)


def save(folder, *, model=None, chat_template=None, **options) -> str:
    """Writes a model, by default `causal_lm(**options)`, and its tokenizer into a folder, whose name is returned."""
    (causal_lm(**options) if model is None else model).save_pretrained(folder)
    tokenizer(chat_template).save_pretrained(folder)
    return str(folder)


SOME_WORDS = "the cat sat on mat a dog ran to red house good bad fine film is was one two three four"
WORDS = SOME_WORDS.split()


def lists(n: int, m: int | None = 4, *, seed: int = 0) -> list[dict]:
    """n rows of prompt, completions, scores; m candidates each, or 1 to 5 of them for m=None. A completion's score is how
    many of its words are `good`, less those that are `bad`, with a little noise: something that can be learned."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high, size=()):
        return torch.randint(high, size, generator=generator).tolist()

    rows = []
    for _ in range(n):
        size = m or 1 + draw(5)
        completions = [" " + " ".join(WORDS[i] for i in draw(len(WORDS), (1 + draw(6),))) for _ in range(size)]
        noise = torch.rand(size, generator=generator).tolist()
        scores = [c.count("good") - c.count("bad") + 0.1 * x for c, x in zip(completions, noise, strict=True)]
        rows.append(
            {
                "prompt": " ".join(WORDS[i] for i in draw(len(WORDS), (2 + draw(5),))),
                "completions": completions,
                "scores": scores,
            }
        )
    return rows

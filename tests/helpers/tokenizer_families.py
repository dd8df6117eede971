"""Real tokenizers of a few hundred tokens, trained in the test: the families that differ at the border of two texts."""

from copy import deepcopy
from functools import cache

CORPUS = [
    "Question: what is the answer?\nAnswer: yes it is\n\n",
    "the rain in Spain stays mainly in the plain, they say. 12 + 34 = 46\n\n\n",
    "user: hello there\nassistant: hello  world, I can't say\n",
    "caf\u00e9 na\u00efve \u65e5\u672c\u8a9e \U0001f600 x=1;\ty=2",
] * 20
SPECIAL = ["<unk>", "<s>", "</s>", "<|end|>"]
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
FAMILIES = (
    "byte-level",
    "byte-level, prefix space",
    "metaspace first",
    "metaspace always",
    "metaspace never",
    "unigram first",
    "unigram always",
    "llama, normalizer",
)
LOSSY = "unigram, always, newlines and spaces become one space"  # as T5 and ALBERT; a newline alone is no token


@cache
def tiny_tokenizer(family, *, bos=True):
    """A PreTrainedTokenizerFast with <s>, </s> and <|end|>; it puts <s> in front of a text if bos."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    kind, _, option = ("unigram always" if family == LOSSY else family).partition(" ")
    special = dict(special_tokens=SPECIAL, show_progress=False)
    if kind == "byte-level" or kind == "byte-level,":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(option))
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **special)
    elif kind == "llama,":  # the space in front is put there by the normalizer, no words: a token may hold spaces
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        special["special_tokens"] = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=480, **special)
    else:
        space = dict(replacement="▁", prepend_scheme=option)
        unigram = kind == "unigram"
        tokenizer = Tokenizer(models.Unigram() if unigram else models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(**space, split=False)
        tokenizer.decoder = decoders.Metaspace(**space)
        if unigram:
            trainer = trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", **special)
        else:
            trainer = trainers.BpeTrainer(vocab_size=300, **special)
    if family == LOSSY:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()])
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHATML
    return fast


def with_template(template, family="byte-level"):
    """A tokenizer of one's own with this chat template."""
    tokenizer = deepcopy(tiny_tokenizer(family))
    tokenizer.chat_template = template
    return tokenizer

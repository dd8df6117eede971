"""A word-level tokenizer of a dozen words, and a Llama that reads them, made in memory."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = ["<pad>", "<bos>", "<eos>", "<user>", "<assistant>", "<unk>", "a", "b", "c", "d", "e", "f", "good", "bad", "film", "."]


def tiny_tokenizer(bos=False, pad="<pad>"):
    """bos: puts <bos> in front of a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token=pad
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_llama(kind="LlamaForCausalLM", *, seed=0, **config):
    """A random model of this class of transformers, in eval mode."""
    import torch
    import transformers

    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    tokens = dict(vocab_size=len(WORDS), bos_token_id=1, eos_token_id=WORDS.index("<eos>"), pad_token_id=0)
    return getattr(transformers, kind)(transformers.LlamaConfig(**sizes, **tokens, **config)).eval()

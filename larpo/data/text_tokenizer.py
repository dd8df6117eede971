"""The tokenizer of what is handed over as `processing_class`: a tokenizer, or a processor of text and images or sound."""

from __future__ import annotations

import copy
from typing import Any


def text_tokenizer(processing_class: Any) -> Any:
    """The tokenizer itself, or the one in a processor of transformers, with the processor's chat template where it has none.

    Raises TypeError for anything else: a name, an image processor.
    """
    if _is_tokenizer(processing_class):
        return processing_class
    tokenizer = getattr(processing_class, "tokenizer", None)
    if not _is_tokenizer(tokenizer):
        kind = type(processing_class).__name__
        raise TypeError(f"the tokenizer must be one of transformers, or a processor that holds one as .tokenizer, got {kind}")
    if getattr(tokenizer, "chat_template", None) is None and getattr(processing_class, "chat_template", None) is not None:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = processing_class.chat_template
    return tokenizer


def padding_id(tokenizer: Any) -> int:
    """The token that fills rows up. It is masked out, so any will do where the tokenizer names none."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(id for id in ids if id is not None)


def _is_tokenizer(value: Any) -> bool:
    return callable(value) and hasattr(value, "convert_tokens_to_ids")

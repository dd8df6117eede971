"""What ends a completion: the same for every sampler, and what training data ends in.

Training ends text in the tokenizer's EOS and an answer of the assistant in the special token that closes the turn in the chat
template. Sampling ends at each of these, and at what the model's generation settings name: a policy writes what it was trained
to write, and what its settings forget would run on.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import prompt_boundary
from .turns import end_of_turn


@dataclass(frozen=True)
class Ending:
    """What ends a completion, whichever comes first."""

    token_ids: tuple[int, ...]  # one of these; it is the completion's last token
    strings: tuple[str, ...] = ()  # or the token that completes one of these in the text

    @property
    def window(self) -> int:
        """How many tokens at the end of a text are enough to see whether the last of them completes a string."""
        return 4 + max((len(one.encode()) for one in self.strings), default=0)

    def string_starts(self, before: str, text: str) -> int | None:
        """Where in `text` the first string begins that is complete there and was not in `before`, the text without its last
        token; None for no such string.

        >>> ending = Ending((), ("END", "\\n\\n"))
        >>> ending.string_starts("it is. EN", "it is. ENDED"), ending.string_starts("\\n\\na", "\\n\\nab")
        (7, None)
        """
        known = len(os.path.commonprefix([before, text]))  # noqa: RUF071  of characters, which is meant here
        starts = (text.find(one, max(0, known - len(one) + 1)) for one in self.strings)
        return min((start for start in starts if start >= 0), default=None)


def ending_of(tokenizer: Any, generation_config: Any = None, stop: Sequence[str] = ()) -> Ending:
    """By what the model's settings, the tokenizer and its chat template say; `stop` are its strings."""
    ids = getattr(generation_config, "eos_token_id", None)
    found = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    found += [id for id in (tokenizer.eos_token_id, end_of_turn_id(tokenizer)) if id is not None]
    return Ending(tuple(dict.fromkeys(found)), tuple(stop))


def end_of_turn_id(tokenizer: Any) -> int | None:
    """The token that closes an answer of the assistant in the chat template; None where no token does, or where the template
    does not write the shortest of conversations."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    from jinja2.exceptions import TemplateError

    try:
        closing = end_of_turn(tokenizer)
    except (TemplateError, TypeError, ValueError):
        return None
    return None if closing is None else prompt_boundary.encode(tokenizer, closing)[-1]


def token_ids_of(tokenizer: Any, tokens: str | Sequence[str]) -> tuple[int, ...]:
    """The ids of tokens by name. Raises ValueError for one that the tokenizer does not have."""
    vocabulary = tokenizer.get_vocab()
    names = [tokens] if isinstance(tokens, str) else list(tokens)
    for name in names:
        if name not in vocabulary:
            raise ValueError(f"eos_token: the tokenizer has no token {name!r}; for text that is several tokens use stop")
    return tuple(vocabulary[name] for name in names)

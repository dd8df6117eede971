"""Which characters of a conversation the policy wrote: where each answer of a completion begins, and where it ends.

An answer begins where sampling would: behind the text of the messages before it with the generation prompt. What the
template writes by itself in front of every answer (`<think>\\n\\n</think>`, a header) is read, not written, by the policy, and
is not its own. An answer ends in the special token that closes the turn, which the policy must write to stop; white space
behind that is the template's. Messages of others (user, tool) are never the policy's own.

Two ways to settle it:

1. A template with {% generation %} blocks says it: what stands in them is the assistant's.
2. Otherwise each answer is replaced by words that occur nowhere else. What stays the same before and behind them is the
   template's and the others'; the rest of the real text is the answer. Where the template refuses such a word, or writes it
   in another way, it must write the conversation up to the answer, and up to its end, as it does in the whole.

A completion of several turns for which neither works is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from .chat_template import Message, conversation, prompt_text, render, written

Span = tuple[int, int]  # of characters, from and up to

WORDS = ("Jxq0", "wZk7")  # they differ in their first and in their last character


class Reply(NamedTuple):
    """A conversation of prompt and completion, up to the last character that the policy wrote."""

    text: str
    own: tuple[Span, ...]  # what the policy wrote
    ended: bool  # whether nothing has to be added to end it: a special token closes it, or others had the last word


class _Frame(NamedTuple):
    """What a template writes around an answer."""

    before: str
    after: str


def special_tokens(tokenizer: Any) -> list[str]:
    """The texts of the special tokens, whatever they are called, but BOS where it is not EOS too: it ends no text."""
    found = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    found |= {str(token) for token in tokenizer.all_special_tokens}
    return sorted(found - ({tokenizer.bos_token} - {tokenizer.eos_token}), key=lambda token: (-len(token), token))


def end_of_turn(tokenizer: Any, keywords: Mapping[str, Any] | None = None) -> str | None:
    """What the chat template writes behind an answer up to the special token that closes the turn, such as "<|im_end|>"; None
    for a template that leaves the turn open, or writes answers in a way that does not tell."""
    return Turns(tokenizer, [{"role": "user", "content": "a"}], keywords or {}).closing


class Turns:
    """The completions of one prompt of messages, as `Reply` objects.

    Args:
        tokenizer: with a chat template.
        prompt: messages.
        keywords: for the template, see `larpo.data.chat_template.template_keywords`.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[Message], keywords: Mapping[str, Any]):
        self.tokenizer, self.prompt, self.keywords = tokenizer, prompt, keywords
        self.start = prompt_text(tokenizer, prompt, keywords)  # where the first answer begins
        self.special = "|".join(map(re.escape, special_tokens(tokenizer))) or r"(?!)"

    def reply(self, answer: str | Sequence[Message], name: str = "completion") -> Reply:
        """Raises ValueError where the conversation does not begin with the prompt, holds no answer of the assistant's, or does
        not tell which part of it is the assistant's. name: what the completion is called there."""
        messages, first = conversation(self.prompt, answer)
        turns = [i for i, message in enumerate(messages) if i >= first and message["role"] == "assistant"]
        if not turns:
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages[first:]))
            raise ValueError(f"{name} holds no message of the assistant to train on, only of: {roles}")
        text = render(self.tokenizer, messages, self.keywords)
        self._check_start(text, name)
        spans = self._marked(messages, text)
        if spans is None:
            alone = turns == [first] and len(messages) == first + 1
            spans = [self._turn(messages, i, text, self._alone if alone else None) for i in turns]
            if None in spans:
                raise ValueError(
                    f"the chat template does not tell which part of {name} is the assistant's: what it writes before "
                    f"message {turns[spans.index(None)] - first} changes with what follows. Use a template with "
                    "{% generation %} blocks or one that only appends, or give prompt_ids, completion_ids and completion_mask"
                )
        last_word = turns[-1] == len(messages) - 1
        own = [(a, self._end(text, a, b, last_word and (a, b) == spans[-1])) for a, b in spans]
        own = _joined([(a, b) for a, b in own if a < b])
        if not own:
            return Reply(self.start, (), not last_word)
        a, b = own[-1]
        ended = re.compile(rf"(?:{self.special})\s*\Z").search(text, a, b) is not None
        return Reply(text[:b], tuple(own), ended or not last_word)

    def _check_start(self, text: str, name: str) -> None:
        start = self.start
        if not text.startswith(start):
            at = len(os.path.commonprefix([start, text]))  # noqa: RUF071  of characters, which is meant here
            raise ValueError(
                f"the chat template's text of prompt + {name} does not begin with its text of the prompt: "
                f"{start[at : at + 40]!r} became {text[at : at + 40]!r}. Use a template that only appends, or give the row as "
                "prompt_ids and completion_ids"
            )

    # --- by {% generation %} -------------------------------------------------------------------------------

    def _marked(self, messages: Sequence[Message], text: str) -> list[Span] | None:
        """What stands in {% generation %} blocks behind the prompt; None for a template without them."""
        template = getattr(self.tokenizer, "chat_template", None)
        if template is None or not re.search(r"\{%-?\s*generation\s*-?%\}", str(template)):
            return None
        from transformers.utils.chat_template_utils import render_jinja_template

        tools = self.keywords.get("tools")
        texts, blocks = render_jinja_template(
            [written(self.tokenizer, messages, self.keywords)],
            chat_template=self.tokenizer.get_chat_template(None, tools),
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **self.keywords},
        )
        if texts != [text]:
            return None
        begin = len(self.start)
        return [(max(a, begin), b) for a, b in blocks[0] if b > begin]

    # --- turn by turn --------------------------------------------------------------------------------------

    def _turn(self, messages: Sequence[Message], i: int, text: str, frame: _Frame | None) -> Span | None:
        """Where the i-th message, an answer, stands in the text, with the end of its turn or without it; None if that can't be
        told. frame: what stands around it, if that is known."""
        begin = self._sampled_from(messages[:i], text)
        frame = frame or self._frame(messages[:i], messages[i + 1 :])
        if frame is not None and text.startswith(frame.before) and text.endswith(frame.after):
            a, b = len(frame.before), len(text) - len(frame.after)
            a = len(text[:a].rstrip(" "))  # a space is the start of the answer's first token
            if begin is not None and (a < begin or _begins_with(messages[i], text[begin:a])):
                a = begin  # the generation prompt says more, or the answer itself holds what the template would write for it
            if a <= b:
                return a, b
        whole = self._render(messages[: i + 1])
        if begin is not None and whole is not None and text.startswith(whole) and begin <= len(whole):
            return begin, self._before_end(text, begin, len(whole))
        return None

    def _sampled_from(self, before: Sequence[Message], text: str) -> int | None:
        """Where sampling would begin behind these messages, if the text begins as they do."""
        if len(before) <= len(self.prompt):
            return len(self.start)
        start = self._render(before, add_generation_prompt=True)
        return len(start) if start is not None and text.startswith(start) else None

    @cached_property
    def _alone(self) -> _Frame | None:
        """Around an answer that ends the conversation."""
        messages, first = conversation(self.prompt, "")
        return self._frame(messages[:first], [])

    @cached_property
    def closing(self) -> str | None:
        """What ends the turn of an answer that ends the conversation: up to the first special token, and those at once behind
        it. None where no such token follows."""
        found = re.search(rf"(?:{self.special})+", self._alone.after) if self._alone else None
        return self._alone.after[: found.end()] if found else None

    def _frame(self, before: Sequence[Message], after: Sequence[Message]) -> _Frame | None:
        """What stays the same around an answer between these messages, whatever it says; None if that can't be told."""
        answers = [{"role": "assistant", "content": word} for word in WORDS]
        texts = [self._render([*before, answer, *after]) for answer in answers]
        if None in texts:
            return None
        frame = _Frame(os.path.commonprefix(texts), os.path.commonprefix([text[::-1] for text in texts])[::-1])  # noqa: RUF071
        return frame if texts == [frame.before + word + frame.after for word in WORDS] else None

    def _render(self, messages: Sequence[Message], **how: bool) -> str | None:
        """The text of messages, or None where the template refuses them: some raise for conversations they do not foresee."""
        from jinja2.exceptions import TemplateError

        try:
            return render(self.tokenizer, messages, self.keywords, **how)
        except (TemplateError, TypeError, ValueError):
            return None

    # --- the end of a turn ---------------------------------------------------------------------------------

    def _end(self, text: str, a: int, b: int, last: bool) -> int:
        """Where the turn of the answer text[a:b] ends: behind the special token that closes it.

        last: nothing follows the turn, so all there is belongs to it where no token closes it.
        """
        closing = self.closing
        if closing is not None and text[a:b].rstrip().endswith(closing.strip()):  # the answer holds its end
            return a + len(text[a:b].rstrip())
        if closing is not None and text.startswith(closing, b):
            return b + len(closing)
        if last:
            found = re.compile(rf"(?:{self.special})+").search(text, b)
            return found.end() if found else len(text)
        if closing is None and self._alone is not None:  # the template closes no turn by a token of its own
            return b
        other = re.compile(rf"\s*(?:{self.special})").match(text, b)
        return other.end() if other else b

    def _before_end(self, text: str, a: int, b: int) -> int:
        """Where an answer ends that stands with the end of its turn in text[a:b]."""
        closing = re.escape(self.closing) if self.closing is not None else r"(?!)"
        found = re.compile(rf"(?:{closing})(?=(?:\s|{self.special})*\Z)").search(text, a, b)
        found = found or re.compile(rf"(?:{self.special})(?=\s*\Z)").search(text, a, b)
        return found.start() if found else b


def _begins_with(message: Message, header: str) -> bool:
    content = message.get("content")
    return bool(header.strip()) and isinstance(content, str) and content.lstrip().startswith(header.strip())


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Spans that touch as one."""
    found: list[Span] = []
    for a, b in spans:
        if found and found[-1][1] == a:
            a = found.pop()[0]
        found.append((a, b))
    return found

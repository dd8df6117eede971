"""Where the prompt ends in answers that repeat it, as text or as messages."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from ..validation import bad_field, present

# Where an answer begins in the text of a dialogue, with the line breaks before it; spaces are the answer's.
ANSWER = re.compile(
    r"(?:\b(?:Assistant|ASSISTANT):|<\|im_start\|>assistant|<\|assistant\|>|\[/INST\]"
    r"|<\|start_header_id\|>assistant<\|end_header_id\|>|<start_of_turn>model)\n*"
)


def split_text(texts: list[str]) -> tuple[str, list[str], bool]:
    """The prompt that texts share at their start, what is left of each, and whether where it ends is a guess.

    Texts of a dialogue are cut where the last answer begins that is not the same in all (`ANSWER`). In other texts nothing
    tells the prompt from first words that answers share: all that is shared is taken, in whole words, and the completions
    begin with the space before their first word, as every completion does if one of them would be empty. Words that go to
    the prompt change no loss of log-likelihoods that are sums, since what all candidates share adds the same to each; they do
    change means over tokens, so `length_normalized` refuses such lists.

    >>> split_text(["\\n\\nHuman: a fruit\\n\\nAssistant: a peach", "\\n\\nHuman: a fruit\\n\\nAssistant: a pear"])
    ('\\n\\nHuman: a fruit\\n\\nAssistant:', [' a peach', ' a pear'], False)
    >>> split_text(["The best fruit is a peach", "The best fruit is a pear"])
    ('The best fruit is a', [' peach', ' pear'], True)
    """
    prompt = os.path.commonprefix(texts)  # noqa: RUF071  of characters, which is meant here
    answers = list(ANSWER.finditer(prompt))
    if answers:
        prompt = prompt[: answers[-1].end()]
    else:
        following = [text[len(prompt) :] for text in texts]
        if not all(following):
            prompt = prompt.rstrip()
        if not all(text[:1].isspace() for text in following):
            prompt = re.sub(r"\S*\Z", "", prompt).removesuffix(" ")
    return prompt, [text[len(prompt) :] for text in texts], bool(prompt) and not answers


def split_messages(conversations: list[list], names: list[str], where: str) -> tuple[list, list[list]]:
    """The messages that conversations share at their start, and what is left of each.

    The prompt ends before an answer: it is the longest common start whose last message is not the assistant's.
    """
    first, *others = conversations
    n = 0
    while n < min(map(len, conversations)) - 1 and all(_same(first[n], other[n]) for other in others):
        n += 1
    while n and first[n - 1]["role"] == "assistant":
        n -= 1
    if n == 0:
        bad_field(names[0], first, f"messages that start as those of {names[1]!r} do, or a 'prompt' column", where)
    return list(first[:n]), [list(messages[n:]) for messages in conversations]


def without_prompt(prompt: Any, conversations: list[list], name: str, where: str) -> tuple[list, list[list]]:
    """Prompt and completions as messages, where the conversations repeat the prompt or start after it.

    A prompt that is a string stands for the user's message with that content, which a system message may precede.
    """
    if isinstance(prompt, str):
        prompts = [_up_to_user(prompt, messages) for messages in conversations]
        if all(prompts):
            pairs = zip(prompts, conversations, strict=True)
            if any(not _starts(prompts[0], messages) or len(other) != len(prompts[0]) for other, messages in pairs):
                bad_field(name, conversations, "the same messages before the answer in every candidate", where)
            if all(len(messages) > len(prompts[0]) for messages in conversations):
                messages, _ = split_messages(conversations, [name, name], where)  # a dialogue whose last turn alone differs
                prompt = messages if len(messages) > len(prompts[0]) else prompts[0]
            else:
                prompt = prompts[0]
        elif any(messages[0]["role"] != "assistant" for messages in conversations):
            bad_field(name, conversations, "messages that repeat 'prompt', or only those after it", where)
        else:
            prompt = [{"role": "user", "content": prompt}]
    repeated = [_starts(prompt, messages) for messages in conversations]
    if any(repeated) and not all(repeated):
        bad_field(name, conversations, "messages that repeat 'prompt' in all candidates or in none", where)
    completions = [list(messages[len(prompt) :]) if all(repeated) else list(messages) for messages in conversations]
    if not all(completions):
        bad_field(name, conversations, "an answer after the prompt's messages", where)
    return list(prompt), completions


def _up_to_user(prompt: str, messages: list) -> list:
    """The messages up to the user's one with this content; none if it is not before the first answer."""
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            break
        if message["role"] == "user" and message.get("content") == prompt:
            return list(messages[: i + 1])
    return []


def _starts(prompt: list, messages: list) -> bool:
    return len(messages) >= len(prompt) and all(map(_same, prompt, messages))


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Equal messages; a key that is None, as Arrow fills it in, counts as absent."""
    return present(a) == present(b)

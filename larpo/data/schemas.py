"""The forms in which candidate lists are published, told apart by their columns and turned into lists.

| form | columns |
|---|---|
| lists | prompt, completions, scores |
| rated candidates | prompt, all_generated_responses, all_rm_scores |
| rewarded candidates | prompt, responses, rewards |
| pairs | chosen, rejected; optional prompt, and score_chosen, score_rejected or chosen_score, rejected_score |
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .validation import OPTIONAL, REQUIRED, bad_field, check_completions, check_number, check_text, present

Row = dict[str, Any]
IMPLICIT = "implicit_prompt"  # column of bools: the prompt is what the candidates' texts share, cut by words and not at a turn

# Where an answer begins in the text of a dialogue, with the line breaks before it; spaces are the answer's.
ANSWER = re.compile(
    r"(?:\b(?:Assistant|ASSISTANT):|<\|im_start\|>assistant|<\|assistant\|>|\[/INST\]"
    r"|<\|start_header_id\|>assistant<\|end_header_id\|>|<start_of_turn>model)\n*"
)


@dataclass(frozen=True)
class Schema:
    """`convert(row, where)` gives a row of lists; `consumed` are the columns that it replaces."""

    consumed: tuple[str, ...]
    candidates: tuple[str, str] | None = None  # the columns of completions and of scores; None for pairs
    pair_scores: tuple[str, str] | None = None
    required: tuple[str, ...] = field(default=())

    @property
    def native(self) -> bool:
        return self.candidates == ("completions", "scores")

    def convert(self, row: Mapping[str, Any], where: str) -> Row:
        """A row of lists with the columns that the schema does not know; raises ValueError on a missing field."""
        for name in self.required:
            if name not in row:
                raise ValueError(f"{where}: field {name!r} is missing; found {sorted(row)}")
        if self.native:
            return _with_source_of_each(dict(row))
        extra = {name: value for name, value in row.items() if name not in self.consumed}
        prompt, completions, *implicit = self._texts(row, where)
        if implicit:
            (extra[IMPLICIT],) = implicit
        scores = self._scores(row, where)
        return _with_source_of_each({"prompt": prompt, "completions": completions, "scores": scores, **extra})

    def _texts(self, row: Mapping[str, Any], where: str) -> tuple[Any, list] | tuple[str, list[str], bool]:
        """Prompt and completions; of texts that have no prompt, also whether where it ends is a guess."""
        if self.candidates:
            name = self.candidates[0]
            completions = row[name]
            check_completions(name, completions, where)
        else:
            name = "chosen"
            completions = [row["chosen"], row["rejected"]]
            for side, completion in zip(("chosen", "rejected"), completions, strict=True):
                check_text(side, completion, where)
            if isinstance(completions[0], str) != isinstance(completions[1], str):
                bad_field("rejected", completions[1], "the kind of 'chosen' (string or messages)", where)
        prompt = row.get("prompt")
        if prompt is None and self.candidates is None:
            return split_text(completions) if isinstance(completions[0], str) else split_messages(completions, where)
        check_text("prompt", prompt, where)
        if isinstance(completions[0], str):
            return prompt, list(completions)
        return without_prompt(prompt, completions, name, where)

    def _scores(self, row: Mapping[str, Any], where: str) -> Any:
        if self.candidates:
            values = row[self.candidates[1]]
            if isinstance(values, list | tuple):
                for i, value in enumerate(values):
                    check_number(f"{self.candidates[1]}[{i}]", value, where)
            return values
        if self.pair_scores is None:
            return [1.0, 0.0]
        for name in self.pair_scores:
            check_number(name, row[name], where)
        return [float(row[name]) for name in self.pair_scores]


def _with_source_of_each(row: Row) -> Row:
    """One name of origin for the whole row is that of every candidate."""
    if isinstance(row.get("source"), str) and isinstance(row.get("completions"), list | tuple):
        row["source"] = [row["source"]] * len(row["completions"])
    return row


def recognise(columns: Iterable[str]) -> Schema:
    """The schema of these columns; the first row of the module's table that they hold. Raises ValueError if none does."""
    found = set(columns)
    for candidates in (("completions", "scores"), ("all_generated_responses", "all_rm_scores"), ("responses", "rewards")):
        if {"prompt", *candidates} <= found:
            schema = Schema(("prompt", *candidates), candidates, required=("prompt", *candidates))
            break
    else:
        if not {"chosen", "rejected"} <= found:
            raise ValueError(
                f"no known form of candidate lists in columns {sorted(found)}; expected one of "
                "{prompt, completions, scores}, {prompt, responses, rewards}, "
                "{prompt, all_generated_responses, all_rm_scores}, or {chosen, rejected} with or without prompt and "
                "score_chosen, score_rejected (or chosen_score, rejected_score)"
            )
        pairs = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))
        scores = next((pair for pair in pairs if set(pair) <= found), None)
        columns = ("chosen", "rejected", *(scores or ()))
        schema = Schema(("prompt", *columns), pair_scores=scores, required=columns)
    taken = sorted(found.intersection(REQUIRED) - set(schema.consumed))
    if not schema.native and taken:
        raise ValueError(
            f"columns {taken} are in the way: {list(schema.required)} become {list(REQUIRED)}; rename or remove {taken}"
        )
    return schema


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


def split_messages(conversations: list[list], where: str) -> tuple[list, list[list]]:
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
        bad_field("chosen", first, "messages that start as those of 'rejected' do, or a 'prompt' column", where)
    return list(first[:n]), [list(messages[n:]) for messages in conversations]


def without_prompt(prompt: Any, conversations: list[list], name: str, where: str) -> tuple[list, list[list]]:
    """Prompt and completions as messages, where the conversations repeat the prompt or start after it.

    A prompt that is a string stands for the user's message with that content, which a system message may precede.
    """
    if isinstance(prompt, str):
        prompts = [_up_to_user(prompt, messages) for messages in conversations]
        if all(prompts):
            if any(not _starts(prompts[0], messages) or len(other) != len(prompts[0])
                   for other, messages in zip(prompts, conversations, strict=True)):  # fmt: skip
                bad_field(name, conversations, "the same messages before the answer in every candidate", where)
            if all(len(messages) > len(prompts[0]) for messages in conversations):
                messages, _ = split_messages(conversations, where)  # a dialogue whose last turn alone differs
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


KNOWN = (*REQUIRED, *OPTIONAL)

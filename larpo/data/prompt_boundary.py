"""Where the prompt ends in tokens: a prompt is tokenised alone, so that its tokens do not depend on what follows it.

These are the tokens that a policy has read when it starts to sample, and that all candidates of a list share. Where the tokens
of the whole text begin with the prompt's, the completion has the others. Where a token would reach across the border
("Answer: " + "yes" has the token " yes"), the completion is tokenised apart, so that the two decode to the whole text.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

# What to tokenise a completion behind, so that no space is put in front of it. They are many because a completion's
# first characters may merge with one of them.
ANCHORS = ("\n", "a", ".", "0", "=", "|", "é", "\t")


def encode(tokenizer: Any, text: str) -> list[int]:
    """The tokens of `text`, none added; special tokens written in the text are recognised."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def leading_special_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text by itself, such as BOS. What it puts behind a text is not for a prompt."""
    bare = encode(tokenizer, "a")
    whole = list(tokenizer("a", verbose=False)["input_ids"])
    for n in range(len(whole) - len(bare) + 1):
        if whole[n : n + len(bare)] == bare:
            return whole[:n]
    return []


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def split(tokenizer: Any, prompt: str, texts: Sequence[str], leading: Sequence[int] = ()) -> tuple[list[int], list[list[int]]]:
    """Tokens of the prompt alone, and for each text (each begins with the prompt) the tokens of what follows it.

    Args:
        prompt: may be empty.
        texts: prompt + completion, as text.
        leading: tokens to put in front, unless the prompt's text brings them.

    Returns:
        prompt_ids, completion_ids. decode(prompt_ids + completion_ids[i]) is what decoding the tokens of texts[i] gives,
        except where the tokenizer changes characters by what stands beside them (Unicode composition across the border).
    """
    prompt_ids, *whole = tokenizer([prompt, *texts], add_special_tokens=False, verbose=False)["input_ids"]
    n = len(prompt_ids)
    completions = []
    for text, ids in zip(texts, whole, strict=True):
        if ids[:n] == prompt_ids:
            completions.append(ids[n:])
        else:
            completions.append(_apart(tokenizer, prompt_ids, text[len(prompt) :], ids))
    if list(prompt_ids[: len(leading)]) != list(leading):
        prompt_ids = [*leading, *prompt_ids]
    return prompt_ids, completions


def pieces(tokenizer: Any, prompt_ids: Sequence[int], text: str, borders: Sequence[int]) -> list[list[int]]:
    """Tokens of text[a:b] for neighbours a, b of `borders`; of the first border on, the text follows `prompt_ids`.

    Each piece has the tokens of the text that is read with it, as a prompt has: no token reaches across a border.
    """
    ids, found = list(prompt_ids), []
    for a, b in pairwise(borders):
        whole = encode(tokenizer, text[:b])
        piece = whole[len(ids) :] if whole[: len(ids)] == ids else _apart(tokenizer, ids, text[a:b], whole)
        ids += piece
        found.append(piece)
    return found


def _apart(tokenizer: Any, prompt_ids: list[int], completion: str, whole: list[int]) -> list[int]:
    """Tokens of the completion that, after the prompt's, decode as the whole text's tokens do.

    First as it stands. A SentencePiece-like tokenizer puts a space in front of a text; behind an anchor it does not.
    Decoders drop the spaces of a first token, which hides one too many or too few: so another token is put first.
    """
    first = encode(tokenizer, "a")
    aim = decode(tokenizer, first + whole)
    alone = encode(tokenizer, completion)
    if decode(tokenizer, first + prompt_ids + alone) == aim:
        return alone
    behind = [ids for anchor in ANCHORS if (ids := _behind(tokenizer, anchor, completion)) is not None]
    for ids in behind:
        if decode(tokenizer, first + prompt_ids + ids) == aim:
            return ids
    return behind[0] if behind else alone


def _behind(tokenizer: Any, anchor: str, text: str) -> list[int] | None:
    start, ids = encode(tokenizer, anchor), encode(tokenizer, anchor + text)
    return ids[len(start) :] if ids[: len(start)] == start else None

"""Candidate lists to tokens: what the prompt's tokens are, what each candidate's, which of them count, and what is cut.

The order of things, for each row:

1. Tokens. `prompt_ids` and `completion_ids` of the row are taken as they are. Otherwise the text is tokenised, with the
   prompt's tokens those of the prompt alone (see `larpo.data.prompt_boundary`). Text gets what the tokenizer puts in front
   (BOS); messages go through the chat template, which writes its own special tokens (see `larpo.data.chat_template`).
2. What counts. Of messages, the tokens that the policy writes when it is sampled: what the template writes in front of every
   answer, and turns of users and tools, are read by the policy and do not count (see `larpo.data.turns`). All else counts.
3. EOS ends a completion that is text, unless it is there already, and one from a chat template that left the turn open.
4. A prompt above `max_prompt_length` is cut: "keep_end" keeps its last tokens (and a BOS at its start), "keep_start" its
   first ones. An empty prompt becomes BOS, or EOS where there is no BOS: the first token needs one to be predicted from.
5. Completions are cut on the right to what the prompt leaves of `max_length`; a cut completion has no EOS.

No candidate is dropped; what was cut or is empty is counted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import warnings
from collections.abc import Hashable, Iterable, Mapping
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from . import chat_template, prompt_boundary
from .limits import PROMPT_LENGTH, TokenLimits, Truncation
from .scored_tokens import SCORED_WITH, check_scored_tokens
from .text_tokenizer import text_tokenizer
from .tokenization_report import EACH, TokenizationReport
from .turns import Reply, Turns
from .validation import check_row

if TYPE_CHECKING:
    import numpy as np
    import pyarrow
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

NO_TEMPLATE = (
    "messages need a chat template, and the tokenizer has none: set its chat_template, or read single turns as text "
    "(as_messages=False, see docs/data.md)"
)
# How a user's turn begins in the text of a dialogue.
USER_TURN = re.compile(
    r"\n\s*(?:Human|HUMAN|User|USER):|<\|im_start\|>user|<\|user\|>|\[INST\]|<\|start_header_id\|>user|<start_of_turn>user"
)


def tokenize_row(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 1024,
    max_prompt_length: int | None = PROMPT_LENGTH,
    truncation: Truncation = "keep_end",
    append_eos: bool = True,
    where: str = "row",
) -> dict[str, Any]:
    """Tokens of one list, by the rules at the top of this module.

    Args:
        row: as `larpo.data.check_row` wants it; `tools` and `chat_template_kwargs` go to the chat template.
        tokenizer: of transformers, or a processor that holds one. Messages need its chat template.
        max_length: tokens of prompt and completion together; None for no limit.
        max_prompt_length: tokens of the prompt, below max_length; None for no limit but to leave a token of max_length;
            not given: half of max_length, 512 at most.
        truncation: which part of a long prompt is kept.
        append_eos: end completions with EOS where step 3 above says so. Tokens given in the row never get one.
        where: starts the message of what is refused.

    Returns:
        {"prompt_ids": [P] ints, "completion_ids": m lists of ints, "scores": m floats}, "completion_mask" (m lists of bools)
        where some tokens of completions do not count, and "ref_logps", "source" where the row has them. An empty completion is
        EOS alone, or no tokens without append_eos.

    Raises:
        ValueError: a bad row, option or tokenizer; a chat template whose text for prompt and completion does not begin
            with its text for the prompt, or does not tell which part of a completion is the assistant's.
    """
    tokenizer = text_tokenizer(tokenizer)
    limits = TokenLimits(max_length, max_prompt_length, truncation, append_eos)
    tokens, report = _tokenize(row, tokenizer, limits, where)
    if not report.tokens_read:
        del tokens["completion_mask"]
    return tokens


def tokenize_lists(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 1024,
    max_prompt_length: int | None = PROMPT_LENGTH,
    truncation: Truncation = "keep_end",
    append_eos: bool = True,
    num_proc: int | None = None,
) -> tuple[Dataset, TokenizationReport]:
    """Tokens of every list, as `tokenize_row` makes them, and a count of what was cut; warns if anything was.

    Args:
        dataset: as `larpo.as_lists` makes it.
        tokenizer: of transformers, or a processor that holds one. Messages need its chat template.
        max_length: most tokens of prompt and completion together; None for no limit.
        max_prompt_length: most tokens of the prompt, below max_length; None for no limit; not given: half of max_length,
            512 at most.
        truncation: which end of a long prompt is kept: keep_end or keep_start.
        append_eos: end completions that are plain strings with EOS.
        num_proc: processes, as in `Dataset.map`.

    Returns:
        A Dataset with the columns that `tokenize_row` returns, and the report of what was cut, empty or equal.

    Raises:
        TypeError: lists that are not a Dataset.
        ValueError: a bad row, option or tokenizer.
    """
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(f"lists must be a datasets.Dataset, as larpo.as_lists makes it, got {type(dataset).__name__}")
    tokenizer = text_tokenizer(tokenizer)
    limits = TokenLimits(max_length, max_prompt_length, truncation, append_eos)
    optional = [name for name in ("ref_logps", SCORED_WITH, "source") if name in dataset.column_names]
    counts = [one.name for one in dataclasses.fields(TokenizationReport) if isinstance(one.default, int)]

    def tokenize(row: dict[str, Any], i: int) -> dict[str, Any]:
        tokens, report = _tokenize(row, tokenizer, limits, f"row {i}")
        # Arrow wants every row to have every column
        return tokens | {name: row[name] for name in optional} | {name: getattr(report, name) for name in (*counts, *EACH)}

    # A cached file is named after the whole tokenizer, which takes longer to read than a few lists. Data in memory has none.
    fingerprint = None if dataset.cache_files else datasets.fingerprint.generate_random_fingerprint()
    mapped = dataset.with_format(None).map(
        tokenize,
        with_indices=True,
        remove_columns=dataset.column_names,
        num_proc=num_proc,
        new_fingerprint=fingerprint,
        desc="tokens",
    )
    columns = mapped.select_columns([*counts, *EACH]).with_format("arrow")[:]
    report = TokenizationReport(
        **{name: int(_flat(columns[name]).sum()) for name in counts},
        **{name: _flat(columns[name]) for name in EACH},
        example=marked(tokenizer, mapped[0]) if len(mapped) else "",
    )
    if report.lossy:
        warnings.warn(f"{report} Limits: max_length={max_length}, max_prompt_length={limits.max_prompt_length}.", stacklevel=2)
    masks = ["completion_mask"] if report.tokens_read else []
    return mapped.select_columns(["prompt_ids", "completion_ids", *masks, "scores", *optional]), report


def tokens_of_lists(tokenised: Dataset) -> list[int]:
    """Tokens that the model runs for each list: of every candidate with its prompt."""
    rows = zip(tokenised["prompt_ids"], tokenised["completion_ids"], strict=True)
    return [len(prompt) * len(completions) + sum(map(len, completions)) for prompt, completions in rows]


def marked(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], most: int = 1000) -> str:
    """The best candidate of a tokenised row behind its prompt as text, with [[ ]] around what counts.

    most: characters of the prompt (its end) and of the completion (its start) that are shown.
    """
    best = max(range(len(row["scores"])), key=row["scores"].__getitem__)
    prompt = prompt_boundary.decode(tokenizer, row["prompt_ids"])
    text = "".join(f"[[{piece}]]" if counted else piece for counted, piece in parts_of(tokenizer, row, best))
    return ("..." if len(prompt) > most else "") + prompt[-most:] + text[:most] + ("..." if len(text) > most else "")


def parts_of(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], i: int) -> list[tuple[bool, str]]:
    """The i-th completion of a tokenised row as text, in parts of which all tokens count or none."""
    ids = row["completion_ids"][i]
    mask = row["completion_mask"][i] if row.get("completion_mask") else [True] * len(ids)
    runs = groupby(zip(mask, ids, strict=True), key=itemgetter(0))
    return [(bool(counted), prompt_boundary.decode(tokenizer, [id for _, id in run])) for counted, run in runs]


# --- one row -----------------------------------------------------------------------------------------------


class _Tokens(NamedTuple):
    """One row as tokens, before anything is cut."""

    prompt: list[int]
    completions: list[list[int]]
    masks: list[list[bool]]  # which tokens of each completion count
    empty: list[bool]  # whether a completion says nothing


def _tokenize(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, limits: TokenLimits, where: str
) -> tuple[dict[str, Any], TokenizationReport]:
    check_row(row, where)
    whole = _tokens_of(row, tokenizer, limits.append_eos, where)
    prompt = _cut_prompt(whole.prompt, limits, tokenizer.bos_token_id)
    room = limits.completion(len(prompt))
    completions, masks = ([one[:room] for one in each] for each in (whole.completions, whole.masks))
    scores = [float(score) for score in row["scores"]]
    tokens = {"prompt_ids": prompt, "completion_ids": completions, "completion_mask": masks, "scores": scores}
    check_scored_tokens(row, tokens, tokenizer, limits.as_dict(), where)
    tokens |= {name: list(row[name]) for name in ("ref_logps", "source") if row.get(name) is not None}
    return tokens, _report(row, whole, tokens)


def _tokens_of(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, append_eos: bool, where: str) -> _Tokens:
    if row.get("completion_ids") is not None:
        found = _from_ids(row, tokenizer)
    elif isinstance(row["prompt"], str):
        found = _from_text(row["prompt"], row["completions"], tokenizer, append_eos)
    else:
        found = _from_messages(row, tokenizer, append_eos, where)
    return found if found.prompt else found._replace(prompt=[_first_token(tokenizer, where)])


def _report(row: Mapping[str, Any], whole: _Tokens, tokens: Mapping[str, Any]) -> TokenizationReport:
    """What was cut, is empty or teaches nothing. tokens: what is left of `whole`."""
    kept, masks, scores = tokens["completion_ids"], tokens["completion_mask"], tokens["scores"]
    prompt, completions = row["prompt"], row["completions"]
    strings = row.get("completion_ids") is None and isinstance(prompt, str)
    return TokenizationReport(
        lists=1,
        candidates=len(kept),
        prompts_truncated=int(len(tokens["prompt_ids"]) < len(whole.prompt)),
        completions_truncated=sum(len(a) < len(b) for a, b in zip(kept, whole.completions, strict=True)),
        completions_empty=sum(none or not any(mask) for none, mask in zip(whole.empty, masks, strict=True)),
        completions_with_turns=sum(strings and USER_TURN.search(one) is not None for one in completions),
        lists_of_one=int(len(scores) == 1),
        lists_all_tied=int(len(scores) > 1 and len(set(scores)) == 1),
        lists_all_equal=int(len(scores) > 1 and _all_equal(kept, masks)),
        tokens_read=sum(map(len, kept)) - sum(map(sum, masks)),
        completions_repeated=_repeats(completions if strings else map(_as_json, completions)),
        completions_equal=_repeats(zip(map(tuple, kept), map(tuple, masks), strict=True)),
        prompt_lengths=[len(whole.prompt)],
        completion_lengths=[*map(len, whole.completions)],
        prompt_hashes=[_hash(prompt if isinstance(prompt, str) else _as_json(prompt))],
    )


def _repeats(values: Iterable[Hashable]) -> int:
    """How many values are equal to an earlier one."""
    values = list(values)
    return len(values) - len(set(values))


def _as_json(messages: Any) -> str:
    return json.dumps(messages, sort_keys=True, default=str)


def _hash(text: str) -> int:
    """A number that Arrow holds in 8 bytes."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big", signed=True)


def values_of(dataset: Dataset, column: str) -> np.ndarray:
    """A column of numbers as one array; of lists of numbers, one list after the other."""
    return _flat(dataset.select_columns(column).with_format("arrow")[:][column])


def _flat(values: pyarrow.ChunkedArray) -> np.ndarray:
    import pyarrow
    import pyarrow.compute

    while pyarrow.types.is_list(values.type) or pyarrow.types.is_large_list(values.type):
        values = pyarrow.compute.list_flatten(values)
    return values.to_numpy()


def _all_equal(completions: list[list[int]], masks: list[list[bool]]) -> bool:
    """Whether candidates have one and the same log-likelihood, whatever the policy is."""
    candidates = list(zip(completions, masks, strict=True))
    return not any(map(any, masks)) or all(one == candidates[0] for one in candidates)


def _from_ids(row: Mapping[str, Any], tokenizer: Any) -> _Tokens:
    completions = [list(ids) for ids in row["completion_ids"]]
    masks = row.get("completion_mask")
    masks = [[True] * len(ids) for ids in completions] if masks is None else [list(map(bool, mask)) for mask in masks]
    empty = [not ids or ids == [tokenizer.eos_token_id] for ids in completions]
    return _Tokens(list(row["prompt_ids"]), completions, masks, empty)


def _from_text(prompt: str, completions: list[str], tokenizer: Any, append_eos: bool) -> _Tokens:
    leading = prompt_boundary.leading_special_tokens(tokenizer)
    prompt_ids, ids = prompt_boundary.split(tokenizer, prompt, [prompt + completion for completion in completions], leading)
    ids = [_ended(one, tokenizer, append_eos) for one in ids]
    return _Tokens(prompt_ids, ids, [[True] * len(one) for one in ids], [not text for text in completions])


def _from_messages(row: Mapping[str, Any], tokenizer: Any, append_eos: bool, where: str) -> _Tokens:
    """The template writes BOS itself where the model wants one, so nothing is put in front."""
    try:
        turns = Turns(tokenizer, row["prompt"], chat_template.template_keywords(row))
        replies = [turns.reply(answer, f"completions[{i}]") for i, answer in enumerate(row["completions"])]
    except ValueError as error:
        none = getattr(tokenizer, "chat_template", None) is None
        raise ValueError(f"{where}: {NO_TEMPLATE if none else error}") from None
    prompt, whole = prompt_boundary.split(tokenizer, turns.start, [reply.text for reply in replies])
    completions, masks = [], []
    for reply, ids in zip(replies, whole, strict=True):
        parts = _parts(reply, len(turns.start))
        if len(parts) > 1:
            borders = [len(turns.start), *(end for end, _ in parts)]
            pieces = prompt_boundary.pieces(tokenizer, prompt, reply.text, borders)
        else:
            pieces = [ids]
        if not reply.ended and append_eos:
            pieces, parts = [*pieces, [_eos(tokenizer)]], [*parts, (-1, True)]
        completions.append([id for piece in pieces for id in piece])
        masks.append([own for piece, (_, own) in zip(pieces, parts, strict=True) for _ in piece])
    answers = row["completions"]
    empty = [not answer if isinstance(answer, str) else not any(map(_says_something, answer)) for answer in answers]
    return _Tokens(prompt, completions, masks, empty)


def _parts(reply: Reply, start: int) -> list[tuple[int, bool]]:
    """The text behind the prompt as parts that count as a whole or not at all: (its end, whether it counts)."""
    parts, at = [], start
    for a, b in reply.own:
        parts += [(a, False)] * (at < a) + [(b, True)]
        at = b
    return parts or [(len(reply.text), True)]


def _says_something(message: Mapping[str, Any]) -> bool:
    return bool(message.get("content") or message.get("tool_calls"))


def _ended(ids: list[int], tokenizer: Any, append_eos: bool) -> list[int]:
    return ids if not append_eos or ids[-1:] == [_eos(tokenizer)] else [*ids, _eos(tokenizer)]


def _eos(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError("append_eos=True, but the tokenizer has no eos_token: set one, or pass append_eos=False")
    return tokenizer.eos_token_id


def _first_token(tokenizer: Any, where: str) -> int:
    for id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if id is not None:
            return id
    raise ValueError(f"{where}: the prompt is empty, and the tokenizer has neither bos_token nor eos_token to stand for it")


def _cut_prompt(ids: list[int], limits: TokenLimits, bos: int | None) -> list[int]:
    limit = limits.prompt
    if limit is None or len(ids) <= limit:
        return ids
    if limits.truncation_mode == "keep_start":
        return ids[:limit]
    kept = [bos] if ids[0] == bos and limit > 1 else []
    return kept + ids[len(ids) - (limit - len(kept)) :]

"""Candidate lists to tokens: what the prompt's tokens are, what each candidate's, where EOS goes, and what is cut.

The order of things, for each row:

1. Tokens. `prompt_ids` and `completion_ids` of the row are taken as they are. Otherwise the text is tokenised, with the
   prompt's tokens those of the prompt alone (see `larpo.data.prompt_boundary`). Text gets what the tokenizer puts in front
   (BOS); messages go through the chat template, which writes its own special tokens (see `larpo.data.chat_template`).
2. EOS ends a completion that is text, unless it is there already, and one from a chat template that left the turn open.
3. A prompt above `max_prompt_length` is cut: "keep_end" keeps its last tokens (and a BOS at its start), "keep_start" its
   first ones. An empty prompt becomes BOS, or EOS where there is no BOS: the first token needs one to be predicted from.
4. Completions are cut on the right to what the prompt leaves of `max_length`; a cut completion has no EOS.

No candidate is dropped; what was cut or is empty is counted.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from . import chat_template, prompt_boundary
from .text_tokenizer import text_tokenizer
from .validation import check_row

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Truncation = Literal["keep_end", "keep_start"]


class _Default(int):
    """A number that nobody gave: unlike the same number given, it makes room for another setting."""


PROMPT_LENGTH = _Default(512)  # what max_prompt_length is where it is not given; see prompt_limit


def prompt_limit(max_length: int | None, max_prompt_length: int | None) -> int | None:
    """The most tokens of a prompt: max_prompt_length as given; where it was not, half of max_length, 512 at most.

    >>> prompt_limit(64, PROMPT_LENGTH), prompt_limit(4096, PROMPT_LENGTH), prompt_limit(64, 48), prompt_limit(64, None)
    (32, 512, 48, None)
    """
    if not isinstance(max_prompt_length, _Default):
        return max_prompt_length
    return int(max_prompt_length) if not isinstance(max_length, int) else max(1, min(int(max_prompt_length), max_length // 2))


@dataclass(frozen=True)
class TokenizationReport:
    """Counts over a dataset; `str(report)` says them in a sentence.

    >>> print(TokenizationReport(lists=2, candidates=7, prompts_truncated=1, lists_all_tied=1))
    2 lists of 7 candidates: 1 prompt cut, 1 list with all scores equal.
    """

    lists: int = 0
    candidates: int = 0
    prompts_truncated: int = 0  # prompts, each counted once for its list
    completions_truncated: int = 0
    completions_empty: int = 0  # no text, or no tokens but EOS
    lists_of_one: int = 0  # their loss is 0
    lists_all_tied: int = 0  # two candidates or more, all with one score

    @property
    def lossy(self) -> bool:
        """Whether anything was cut or is empty."""
        return bool(self.prompts_truncated or self.completions_truncated or self.completions_empty)

    def __str__(self) -> str:
        notes = (
            (self.prompts_truncated, "prompt", "cut"),
            (self.completions_truncated, "completion", "cut"),
            (self.completions_empty, "completion", "empty"),
            (self.lists_of_one, "list", "of one candidate"),
            (self.lists_all_tied, "list", "with all scores equal"),
        )
        said = ", ".join(f"{_count(n, what)} {how}" for n, what, how in notes if n) or "nothing cut, none empty"
        return f"{_count(self.lists, 'list')} of {_count(self.candidates, 'candidate')}: {said}."


def tokenize_row(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 1024,
    max_prompt_length: int | None = PROMPT_LENGTH,
    truncation: Truncation = "keep_end",
    append_eos: bool = True,
) -> dict[str, Any]:
    """Tokens of one list, by the rules at the top of this module.

    Args:
        row: as `larpo.data.check_row` wants it; `tools` and `chat_template_kwargs` go to the chat template.
        tokenizer: of transformers, or a processor that holds one. Messages need its chat template.
        max_length: tokens of prompt and completion together; None for no limit.
        max_prompt_length: tokens of the prompt, below max_length; None for no limit but to leave a token of max_length;
            not given: half of max_length, 512 at most.
        truncation: which part of a long prompt is kept.
        append_eos: end completions with EOS where step 2 above says so. Tokens given in the row never get one.

    Returns:
        {"prompt_ids": [P] ints, "completion_ids": m lists of ints, "scores": m floats}, and "ref_logps", "source" where
        the row has them. An empty completion is EOS alone, or no tokens without append_eos.

    Raises:
        ValueError: a bad row, option or tokenizer; a chat template whose text for prompt and completion does not begin
            with its text for the prompt.
    """
    tokenizer = text_tokenizer(tokenizer)
    max_prompt_length = prompt_limit(max_length, max_prompt_length)
    _check_options(max_length, max_prompt_length, truncation)
    tokens, _ = _tokenize(row, tokenizer, max_length, max_prompt_length, truncation, append_eos, "row")
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
    """`tokenize_row` on every row of `larpo.data.as_lists`, with a count of what was cut; warns if anything was.

    num_proc: processes, as in `Dataset.map`. Columns that `tokenize_row` does not return are left out.
    """
    tokenizer = text_tokenizer(tokenizer)
    max_prompt_length = prompt_limit(max_length, max_prompt_length)
    _check_options(max_length, max_prompt_length, truncation)
    optional = [name for name in ("ref_logps", "source") if name in dataset.column_names]
    counts = [field.name for field in dataclasses.fields(TokenizationReport)]

    def tokenize(row: dict[str, Any], i: int) -> dict[str, Any]:
        tokens, report = _tokenize(row, tokenizer, max_length, max_prompt_length, truncation, append_eos, f"row {i}")
        # Arrow wants every row to have every column
        return tokens | {name: row[name] for name in optional} | dataclasses.asdict(report)

    mapped = dataset.with_format(None).map(
        tokenize, with_indices=True, remove_columns=dataset.column_names, num_proc=num_proc, desc="tokens"
    )
    report = TokenizationReport(**{name: sum(mapped[name]) for name in counts})
    if report.lossy:
        warnings.warn(f"{report} Limits: max_length={max_length}, max_prompt_length={max_prompt_length}.", stacklevel=2)
    return mapped.select_columns(["prompt_ids", "completion_ids", "scores", *optional]), report


# --- one row -----------------------------------------------------------------------------------------------


def _tokenize(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    max_prompt_length: int | None,
    truncation: Truncation,
    append_eos: bool,
    where: str,
) -> tuple[dict[str, Any], TokenizationReport]:
    check_row(row, where)
    if row.get("completion_ids") is not None:
        prompt = list(row["prompt_ids"])
        completions = [list(ids) for ids in row["completion_ids"]]
        empty = [not ids or ids == [tokenizer.eos_token_id] for ids in completions]
    elif isinstance(row["prompt"], str):
        prompt, completions = _from_text(row["prompt"], row["completions"], tokenizer)
        empty = [not text for text in row["completions"]]
        completions = [_ended(ids, tokenizer, append_eos) for ids in completions]
    else:
        answers = row["completions"]
        prompt, completions = _from_messages(row, tokenizer, where)
        empty = [not answer if isinstance(answer, str) else not any(map(_says_something, answer)) for answer in answers]
        special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)
        completions = [
            ids if _turn_is_over(ids, tokenizer, special) else _ended(ids, tokenizer, append_eos) for ids in completions
        ]
    if not prompt:
        prompt = [_first_token(tokenizer, where)]

    limits = [limit for limit in (max_prompt_length, max_length and max_length - 1) if limit is not None]
    kept_prompt = _cut_prompt(prompt, min(limits), truncation, tokenizer.bos_token_id) if limits else prompt
    room = None if max_length is None else max_length - len(kept_prompt)
    kept = [ids[:room] for ids in completions]
    _check_scored_tokens(row, kept, where)

    scores = [float(score) for score in row["scores"]]
    tokens = {"prompt_ids": kept_prompt, "completion_ids": kept, "scores": scores}
    tokens |= {name: list(row[name]) for name in ("ref_logps", "source") if row.get(name) is not None}
    report = TokenizationReport(
        lists=1,
        candidates=len(kept),
        prompts_truncated=int(len(kept_prompt) < len(prompt)),
        completions_truncated=sum(len(a) < len(b) for a, b in zip(kept, completions, strict=True)),
        completions_empty=sum(empty),
        lists_of_one=int(len(scores) == 1),
        lists_all_tied=int(len(scores) > 1 and len(set(scores)) == 1),
    )
    return tokens, report


def _from_text(prompt: str, completions: list[str], tokenizer: Any) -> tuple[list[int], list[list[int]]]:
    leading = prompt_boundary.leading_special_tokens(tokenizer)
    return prompt_boundary.split(tokenizer, prompt, [prompt + completion for completion in completions], leading)


def _from_messages(row: Mapping[str, Any], tokenizer: Any, where: str) -> tuple[list[int], list[list[int]]]:
    """The template writes BOS itself where the model wants one, so nothing is put in front."""
    try:
        keywords = chat_template.template_keywords(row)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    start = chat_template.prompt_text(tokenizer, row["prompt"], keywords)
    texts = [chat_template.whole_text(tokenizer, row["prompt"], answer, keywords) for answer in row["completions"]]
    for i, text in enumerate(texts):
        if not text.startswith(start):
            at = next((k for k, (a, b) in enumerate(zip(start, text, strict=False)) if a != b), min(len(start), len(text)))
            raise ValueError(
                f"{where}: the chat template's text of prompt + completions[{i}] does not begin with its text of the "
                f"prompt: {start[at : at + 40]!r} became {text[at : at + 40]!r}. Use a template that only appends, or give "
                "the row as prompt_ids and completion_ids"
            )
    return prompt_boundary.split(tokenizer, start, texts)


def _says_something(message: Mapping[str, Any]) -> bool:
    return bool(message.get("content") or message.get("tool_calls"))


def _ended(ids: list[int], tokenizer: Any, append_eos: bool) -> list[int]:
    if not append_eos:
        return ids
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("append_eos=True, but the tokenizer has no eos_token: set one, or pass append_eos=False")
    return ids if ids[-1:] == [eos] else [*ids, eos]


def _turn_is_over(ids: list[int], tokenizer: Any, special: set[int]) -> bool:
    """Whether the text of a template ends in a special token (of any name: EOS, end of turn) and perhaps white space."""
    last = next((id for id in reversed(ids) if id in special or prompt_boundary.decode(tokenizer, [id]).strip()), None)
    return last in special


def _check_scored_tokens(row: Mapping[str, Any], kept: list[list[int]], where: str) -> None:
    """Refuses ref_logps of other tokens than these, where `larpo.score_lists` wrote beside them how many they were."""
    scored = row.get("num_tokens")
    if row.get("ref_logps") is None or not isinstance(scored, list) or len(scored) != len(kept):
        return
    for i, (before, ids) in enumerate(zip(scored, kept, strict=True)):
        if before != len(ids):
            raise ValueError(
                f"{where}: ref_logps is of {before} tokens for completions[{i}], which has {len(ids)} now: score the lists "
                "with the max_length, max_prompt_length, truncation_mode and append_eos that they are trained with"
            )


def _first_token(tokenizer: Any, where: str) -> int:
    for id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if id is not None:
            return id
    raise ValueError(f"{where}: the prompt is empty, and the tokenizer has neither bos_token nor eos_token to stand for it")


def _cut_prompt(ids: list[int], limit: int, truncation: Truncation, bos: int | None) -> list[int]:
    if len(ids) <= limit:
        return ids
    if truncation == "keep_start":
        return ids[:limit]
    kept = [bos] if ids[0] == bos and limit > 1 else []
    return kept + ids[len(ids) - (limit - len(kept)) :]


def _check_options(max_length: int | None, max_prompt_length: int | None, truncation: str) -> None:
    for name, value, least in (("max_length", max_length, 2), ("max_prompt_length", max_prompt_length, 1)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ValueError(f"{name} must be None or an int >= {least}, got {value!r}")
    if max_length is not None and max_prompt_length is not None and max_prompt_length >= max_length:
        raise ValueError(
            f"max_prompt_length={max_prompt_length} must be below max_length={max_length}, to leave room for completions"
        )
    if truncation not in ("keep_end", "keep_start"):
        raise ValueError(f"truncation must be 'keep_end' or 'keep_start', got {truncation!r}")


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"

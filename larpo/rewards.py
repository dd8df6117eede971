"""Rerankers: what scores a completion. A reward is any callable with TRL's reward-function signature.

    reward(prompts=[...], completions=[...], **columns) -> list[float | None]      one value per completion, higher is better

Prompts and completions are strings or lists of messages; columns are the data set's other columns, a value per completion,
and in the loop `completion_ids`, the tokens of each. A reward may change what it is given: it has copies.
`score` sums several rewards, `sequence_classifier` makes one of a Hugging Face reward model, `from_name` finds one by name.
"""

from __future__ import annotations

import copy
import logging
import math
import pkgutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import chat_template
from .runs.secrets import masked

logger = logging.getLogger(__name__)

Text = str | list[dict[str, Any]]  # a string, or messages {"role": ..., "content": ...}

TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
BUILT_IN = {"imdb_sentiment": "larpo.sentiment:ImdbSentiment"}


class RewardError(RuntimeError):
    """A reward raised; its exception is the cause."""


class Reward(Protocol):
    def __call__(self, *, prompts: Sequence[Text], completions: Sequence[Text], **columns) -> Sequence[float | None]: ...


def text_of(completion: Text) -> str:
    """The text of a completion: itself, or the contents of its messages, a line each.

    >>> text_of([{"role": "assistant", "content": "Paris."}])
    'Paris.'
    """
    if isinstance(completion, str):
        return completion
    contents = (message.get("content") or "" for message in completion)
    return "\n".join(
        content if isinstance(content, str) else "".join(part.get("text", "") for part in content) for content in contents
    )


def name_of(reward: Reward) -> str:
    """The name that errors and logs use: the function's, or the class's."""
    return getattr(reward, "__name__", type(reward).__name__)


# --- the weighted sum --------------------------------------------------------------------------------------


def score(
    rewards: Reward | Sequence[Reward],
    weights: Sequence[float] | None,
    prompts: Sequence[Text],
    completions: Sequence[Text],
    *,
    on_error: Literal["raise", "skip"] = "raise",
    **columns,
) -> list[float | None]:
    """The weighted sum of the rewards of every completion.

    A reward that gives None, NaN or an infinity for a completion has no opinion on it: its sum is over the other rewards,
    and is None where no reward has one. (Such a sum misses a term, so it is comparable within a list only if the reward
    has no opinion on the whole list. Drop the candidate if that matters.)

    Args:
        rewards: one reward or several.
        weights: one per reward; None for 1 each.
        prompts, completions: one prompt per completion.
        on_error: "raise", or "skip": a reward that fails has no opinion on any completion of this call; the failure
            and the number of completions go to the log as a warning.
        columns: handed to every reward; a list must have one value per completion.

    Raises:
        RewardError: a reward raised; it is named, and its exception is the cause. A RuntimeError.
        ValueError: a reward gave another number of values, or something else than numbers; lengths that don't fit.
    """
    rewards = list(rewards) if isinstance(rewards, Sequence) else [rewards]
    weights = [1.0] * len(rewards) if weights is None else list(weights)
    if not rewards:
        raise ValueError("rewards is empty; expected at least one reward")
    if len(weights) != len(rewards):
        raise ValueError(f"weights has {len(weights)} values; expected one for each of the {len(rewards)} rewards")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
    for name, column in {"prompts": prompts, **columns}.items():
        if isinstance(column, list) and len(column) != len(completions):
            raise ValueError(f"{name} has {len(column)} values; expected one for each of the {len(completions)} completions")
    if not completions:
        return []

    sums: list[float | None] = [None] * len(completions)
    for reward, weight in zip(rewards, weights, strict=True):
        try:
            values = _values(reward, prompts, completions, columns)
        except (RewardError, ValueError) as error:
            if on_error == "raise":
                raise
            logger.warning("%s; skipped for %d completions", error, len(completions))
            continue
        for i, value in enumerate(values):
            if value is not None:
                sums[i] = (sums[i] or 0.0) + weight * value
    return sums


def _values(reward: Reward, prompts, completions, columns) -> list[float | None]:
    """What one reward gives, checked: finite floats or None, one per completion. It works on copies: whatever it does to its
    arguments, the next one is given what this one was."""
    try:
        values = reward(prompts=_own(prompts), completions=_own(completions), **_own(columns))
    except Exception as error:
        said = masked(str(error))  # a judge behind an address may show its key
        raise RewardError(f"reward {name_of(reward)!r} raised {type(error).__name__}: {said}") from error
    numbers = _one_per_completion(f"reward {name_of(reward)!r}", values, len(completions))
    return [number if number is not None and math.isfinite(number) else None for number in numbers]


def _own(value: Any) -> Any:
    """A copy down to what can't be changed in place: of lists, dicts, sets, arrays and tensors. Other objects are handed on."""
    if isinstance(value, dict):
        return {key: _own(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_own(item) for item in value]
    if type(value) in (tuple, set):
        return type(value)(map(_own, value))
    if type(value).__module__.partition(".")[0] in ("numpy", "torch") and hasattr(value, "__array__"):
        return copy.deepcopy(value)
    return value


def _one_per_completion(said_by: str, values: Any, n: int) -> list[float | None]:
    """The values as floats, None where one is None. What has no order (a set) or is ordered by keys (a dict) is refused: which
    value belongs to which completion would be a guess."""
    shape = getattr(values, "shape", None)
    is_array = shape is not None and hasattr(values, "__array__") and len(shape) == 1
    if not is_array and (isinstance(values, str | bytes) or not isinstance(values, Sequence)):
        returned = type(values).__name__ if shape is None else f"{type(values).__name__} of shape {tuple(shape)}"
        raise ValueError(
            f"{said_by} returned {returned}; expected a list of floats or None, or an array or tensor of one dimension"
        )
    if len(values) != n:
        raise ValueError(f"{said_by} returned {len(values)} values; expected one for each of the {n} completions")
    try:
        return [None if value is None else _number(value) for value in values]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{said_by} returned a value that is no number: {error}") from error


def _number(value: Any) -> float:
    if isinstance(value, str | bytes):  # float() reads them
        raise TypeError(f"got {value!r}")
    return float(value)


# --- finding a reward --------------------------------------------------------------------------------------


def from_name(name: str) -> Reward:
    """A built-in reward ("imdb_sentiment") or the user's own as "package.module:function".

    A class is instantiated without arguments, so a reward may load its model there.

    >>> from_name("math:hypot") is math.hypot
    True
    """
    target = BUILT_IN.get(name, name)
    if ":" not in target:
        raise ValueError(f"reward {name!r} is neither one of {sorted(BUILT_IN)} nor of the form 'package.module:function'")
    try:
        found = pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"reward {name!r} can't be loaded: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ValueError(f"reward {name!r} is of type {type(found).__name__}; expected a function or a class")
    return found() if isinstance(found, type) else found


# --- a reward model ----------------------------------------------------------------------------------------


class SequenceClassifier:
    """A Hugging Face sequence-classification model as a reward. Made by `sequence_classifier`."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        label: int,
        batch_size: int,
        max_length: int | None,
        progress: bool,
    ):
        self.model = model.eval()
        self.tokenizer = copy.deepcopy(tokenizer)  # the caller's keeps its padding and truncation
        self.tokenizer.padding_side = "right"
        self.tokenizer.truncation_side = "left"  # of a long text the completion stays
        self.label, self.batch_size, self.max_length, self.progress = label, batch_size, max_length, progress
        self.__name__ = f"{type(model).__name__}({getattr(model, 'name_or_path', '') or 'unnamed'})"

    def __call__(self, *, prompts: Sequence[Text], completions: Sequence[Text], **columns) -> list[float]:
        """The label's logit for each prompt with its completion."""
        import torch
        from tqdm import tqdm

        encoded = [
            self._encode(prompt, completion, {name: columns[name][i] for name in TEMPLATE_COLUMNS if columns.get(name)})
            for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        scores = [0.0] * len(encoded)
        with torch.no_grad(), tqdm(total=len(encoded), desc="scoring", unit="text", disable=not self.progress) as bar:
            # Longest first: a batch that does not fit in memory fails at once.
            for start in reversed(range(0, len(by_length), self.batch_size)):
                chosen = by_length[start : start + self.batch_size]
                batch = self.tokenizer.pad({"input_ids": [encoded[i] for i in chosen]}, return_tensors="pt")
                logits = self.model(**batch.to(self.model.device)).logits[:, self.label].float().tolist()
                for i, logit in zip(chosen, logits, strict=True):
                    scores[i] = logit
                bar.update(len(chosen))
        return scores

    def _encode(self, prompt: Text, completion: Text, columns: dict[str, Any]) -> list[int]:
        if isinstance(prompt, str):
            text, special = prompt + text_of(completion), True
        else:
            text = chat_template.whole_text(self.tokenizer, prompt, completion, chat_template.template_keywords(columns))
            special = False  # the template writes them
        ids = self.tokenizer(
            text, add_special_tokens=special, truncation=self.max_length is not None, max_length=self.max_length
        ).input_ids
        if not ids:
            raise ValueError("a prompt with its completion has no tokens")
        return ids


def sequence_classifier(
    model_or_name: PreTrainedModel | str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    label: int | str | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    progress: bool = False,
    **load,
) -> SequenceClassifier:
    """A reward from a sequence-classification model: the logit of one label for prompt + completion.

    Args:
        model_or_name: the model, or what `AutoModelForSequenceClassification.from_pretrained` takes, with `load` as
            its keywords (dtype, device_map, revision, ...). It runs where it is, without gradients, in eval mode.
        tokenizer: None loads the one of the same name. Prompts that are messages go through its chat template.
        label: index or name of the logit that is the reward; may be left out for a model with one label.
        batch_size: texts per forward; texts are sorted by length first.
        max_length: tokens; a longer text loses its beginning. None never truncates.
        progress: shows a bar.

    Raises ValueError for an unknown label, or a tokenizer that can't pad. A model whose config has no pad token
    is given the tokenizer's: decoder models need it to find a padded text's last token.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = model_or_name
    if isinstance(model, str):
        model = AutoModelForSequenceClassification.from_pretrained(model_or_name, **load)
    elif load:
        raise ValueError(f"{sorted(load)} only apply to a model given by name")
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    if tokenizer.pad_token_id is None:
        raise ValueError("tokenizer has no pad token; set tokenizer.pad_token, for example to tokenizer.eos_token")
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    index = _label_index(model.config, label)
    return SequenceClassifier(model, tokenizer, label=index, batch_size=batch_size, max_length=max_length, progress=progress)


def _label_index(config, label: int | str | None) -> int:
    names = dict(config.label2id)
    if label is None:
        if config.num_labels != 1:
            raise ValueError(f"the model has {config.num_labels} labels; label must be one of {names}")
        return 0
    index = names.get(label) if isinstance(label, str) else label
    if index is None or not 0 <= index < config.num_labels:
        raise ValueError(f"label must be one of {names}, got {label!r}")
    return index

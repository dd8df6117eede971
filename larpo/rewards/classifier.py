"""A Hugging Face sequence-classification model as a reward."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..data import chat_template
from .text import Text, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")


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

    @property
    def identity(self) -> dict[str, Any] | None:
        """The name of a folder says little: other weights may have been written into it. None where they are elsewhere."""
        from ..data.scored_tokens import model_name, weights

        found = weights(self.model)
        if found is None:
            return None
        what = {"model": model_name(self.model), "weights": found, "template": self.tokenizer.chat_template}
        return what | {"label": self.label, "max_length": self.max_length}

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
        tokenizer: the model's; None loads the one of the same name. Prompts that are messages go through its chat template.
        label: index or name of the logit that is the reward; may be left out for a model with one label.
        batch_size: texts per forward; texts are sorted by length first.
        max_length: most tokens of a text; a longer one loses its beginning. None never truncates.
        progress: shows a bar.

    Returns:
        A reward, which is called as `Reward` says. A model whose config has no pad token gets the tokenizer's, because
            decoder models need it to find the last token of a padded text.

    Raises:
        ValueError: an unknown label, or a tokenizer that can't pad.
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

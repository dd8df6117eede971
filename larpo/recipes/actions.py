"""A language model as a policy over a few texts: the log-likelihood of each, its prompt run once for all (prefix sharing)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from larpo.modeling import row_layouts

from .tasks import toy_lm

Normalisation = Literal["none", "words", "tokens"]
NORMALISATIONS: tuple[Normalisation, ...] = ("none", "words", "tokens")


def action_logits(logps: Tensor, lengths: Tensor) -> Tensor:
    """l_i / N_i, what TWOSOME's policy is the softmax of. logps: [..., A] nats; lengths: [A] of tokens, words, or ones."""
    return logps / lengths


class Menu:
    """The same m actions behind every prompt, ready to be scored as one batch.

    Args:
        prompts: texts; each becomes a list.
        actions: texts, one word or more.

    `logps(model)` is [prompts, actions], differentiable; `tokens` and `words` are lengths [actions].
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], actions: Sequence[str]):
        if not prompts or not actions:
            raise ValueError(f"expected at least one prompt and one action, got {len(prompts)} and {len(actions)}")
        ids = [toy_lm.completion_ids(tokenizer, action, end=False) for action in actions]
        for action, tokens in zip(actions, ids, strict=True):
            if not tokens:
                raise ValueError(f"actions: {action!r} has no tokens, so its log-likelihood would be 0 whatever the policy")
        self.shape = (len(prompts), len(actions))
        self.tokens = torch.tensor([float(len(tokens)) for tokens in ids])
        self.words = torch.tensor([float(len(action.split())) for action in actions])
        candidates = [
            row_layouts.TokenizedCandidate(toy_lm.prompt_ids(tokenizer, prompt), tokens, i)
            for i, prompt in enumerate(prompts)
            for tokens in ids
        ]
        self.rows = row_layouts.shared_rows(candidates, tokenizer.pad_token_id, multiple=1)

    def logps(self, model: PreTrainedModel) -> Tensor:
        """[prompts, actions] sums over tokens, nats."""
        return model(rows=self.rows).view(self.shape)

    def lengths(self, normalisation: Normalisation) -> Tensor:
        """N of each action, [actions]."""
        if normalisation not in NORMALISATIONS:
            raise ValueError(f"normalisation must be one of {NORMALISATIONS}, got {normalisation!r}")
        return {"none": torch.ones_like(self.tokens), "words": self.words, "tokens": self.tokens}[normalisation]

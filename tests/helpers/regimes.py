"""Logits as they come: every numerical test runs over all of these.

Each function draws [..., V] float64 logits for the labels it is given; ignored labels are negative.
"""

import math

import torch


def noise(labels, vocabulary, generator):
    return torch.randn(*labels.shape, vocabulary, dtype=torch.float64, generator=generator)


def with_targets(logits, labels, values):
    """`logits` with the entry of each label replaced by `values` [...]."""
    return logits.scatter(-1, labels.clamp(min=0).unsqueeze(-1), values.unsqueeze(-1))


def rest(logits, labels):
    """logsumexp of everything but the label: [...]; 0 where the label is alone in the vocabulary."""
    others = with_targets(logits, labels, torch.full(labels.shape, -math.inf, dtype=logits.dtype)).logsumexp(-1)
    return others.where(others.isfinite(), torch.zeros_like(others))


def initialisation(labels, vocabulary, generator):
    return noise(labels, vocabulary, generator)


def peaked(labels, vocabulary, generator):
    """1 - p of the label is about 1e-6."""
    logits = noise(labels, vocabulary, generator)
    return with_targets(logits, labels, rest(logits, labels) + math.log(1e6))


def unlikely(labels, vocabulary, generator):
    """The label lies 150 nats below the rest: exp(max - target) is no float32."""
    logits = noise(labels, vocabulary, generator)
    return with_targets(logits, labels, rest(logits, labels) - 150)


def far_below_zero(labels, vocabulary, generator):
    """A column of zeros taken for part of the row would win it."""
    return 2 * noise(labels, vocabulary, generator) - 200


def shifted_up(labels, vocabulary, generator):
    return noise(labels, vocabulary, generator) + 300


def shifted_down(labels, vocabulary, generator):
    return noise(labels, vocabulary, generator) - 300


def minus_infinity_columns(labels, vocabulary, generator):
    """Every third column is -inf, as after a vocabulary mask; the labels' own entries stay."""
    logits = noise(labels, vocabulary, generator)
    own = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    logits[..., ::3] = -math.inf
    return with_targets(logits, labels, own)


REGIMES = {
    draw.__name__: draw
    for draw in (initialisation, peaked, unlikely, far_below_zero, shifted_up, shifted_down, minus_infinity_columns)
}

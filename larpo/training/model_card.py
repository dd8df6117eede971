"""What the model card of a trained model says beside what transformers writes there: tags, and the paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

PAPER = """
## The method

Trained with LarPO{objective} on ranked lists of candidates:
[LLM Alignment as Retriever Optimization: An Information Retrieval Perspective](https://arxiv.org/abs/2502.03699),
arXiv:2502.03699.
"""


def tags(objective: str | None, given: str | Sequence[str] | None) -> list[str]:
    """Those given, then larpo and the objective; None where the loss is another one.

    >>> tags("listmle", "chat")
    ['chat', 'larpo', 'listmle']
    """
    given = [given] if isinstance(given, str) else list(given or ())
    return list(dict.fromkeys([*given, "larpo", *([objective] if objective else [])]))


def name_the_paper(card: Path, objective: str | None) -> None:
    """Puts the method before the section on training of a card that transformers has just written."""
    text = card.read_text(encoding="utf-8")
    before, heading, after = text.partition("\n## Training procedure\n")
    paper = PAPER.format(objective=f" (objective: {objective})" if objective else "")
    card.write_text(before + paper + heading + after, encoding="utf-8")

"""What a server has answered, on disk as it arrives."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from ..runs.journal import Journal
from .asking import Answer, Choice, SamplingLimits, Wanted


def key_of(weights: str, wanted: Wanted, limits: SamplingLimits) -> str:
    asked = {"weights": weights} | dataclasses.asdict(wanted) | dataclasses.asdict(limits)
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:32]


class Answers(Journal[Answer]):
    """Answers of a server by `key_of` of the request."""

    def fields(self, answer: Answer) -> dict[str, Any]:
        return dataclasses.asdict(answer)

    def parse(self, fields: dict[str, Any]) -> Answer:
        return Answer([Choice(**one) for one in fields.pop("choices")], **fields)

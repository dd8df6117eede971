"""The limits that decide which tokens of a list count: how long prompts and completions may be, and what ends them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..runs.checks import check_count

Truncation = Literal["keep_end", "keep_start"]


class _Default(int):
    """The default of a setting, told apart from the same number given by a user: it gives way to another setting."""


PROMPT_LENGTH = _Default(512)  # max_prompt_length where it is not given; see prompt_limit


def prompt_limit(max_length: int | None, max_prompt_length: int | None) -> int | None:
    """The most tokens of a prompt: max_prompt_length as given; where it was not, half of max_length, 512 at most.

    >>> prompt_limit(64, PROMPT_LENGTH), prompt_limit(4096, PROMPT_LENGTH), prompt_limit(64, 48), prompt_limit(64, None)
    (32, 512, 48, None)
    """
    if not isinstance(max_prompt_length, _Default):
        return max_prompt_length
    return int(max_prompt_length) if not isinstance(max_length, int) else max(1, min(int(max_prompt_length), max_length // 2))


@dataclass(frozen=True)
class TokenLimits:
    """As the arguments of `tokenize_row`; a max_prompt_length that is not given is settled here.

    Raises ValueError for limits that leave no room.
    """

    max_length: int | None = 1024
    max_prompt_length: int | None = PROMPT_LENGTH
    truncation_mode: Truncation = "keep_end"
    append_eos: bool = True

    def __post_init__(self):
        object.__setattr__(self, "max_prompt_length", prompt_limit(self.max_length, self.max_prompt_length))
        check_count("max_length", self.max_length, 2)
        check_count("max_prompt_length", self.max_prompt_length, 1)
        if None not in (self.max_length, self.max_prompt_length) and self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length={self.max_prompt_length} must be below max_length={self.max_length}, to leave room for "
                "completions"
            )
        if self.truncation_mode not in ("keep_end", "keep_start"):
            raise ValueError(f"truncation must be 'keep_end' or 'keep_start', got {self.truncation_mode!r}")

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def arguments(self) -> dict[str, Any]:
        """Keywords of `tokenize_row` and `tokenize_lists`."""
        settings = self.as_dict()
        return {"truncation": settings.pop("truncation_mode"), **settings}

    @property
    def prompt(self) -> int | None:
        """The most tokens that are kept of a prompt: one of max_length is left to a completion. None for no limit."""
        limits = [limit for limit in (self.max_prompt_length, self.max_length and self.max_length - 1) if limit is not None]
        return min(limits, default=None)

    def completion(self, prompt_tokens: int) -> int | None:
        """The most tokens that are kept of a completion behind a prompt of so many; None for no limit."""
        return None if self.max_length is None else self.max_length - prompt_tokens

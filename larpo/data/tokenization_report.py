"""What tokenization cut, found empty, or found to teach nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

EACH = ("prompt_lengths", "completion_lengths", "prompt_hashes")  # fields of the report that are not sums


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
    completions_empty: int = 0  # no text, no tokens but EOS, or none that counts
    completions_with_turns: int = 0  # strings in which a user speaks: all of a string counts as the policy's
    lists_of_one: int = 0  # their loss is 0
    lists_all_tied: int = 0  # two candidates or more, all with one score
    lists_all_equal: int = 0  # two candidates or more, all with the same tokens, or none with any that counts: no gradient
    tokens_read: int = 0  # of completions, written by the template, a user or a tool: they do not count
    completions_repeated: int = field(default=0, compare=False)  # their text stood before in the list
    completions_equal: int = field(default=0, compare=False)  # their tokens did, as they are trained on: cut
    example: str = field(default="", compare=False)  # a completion behind its prompt, what counts in [[ ]]
    # one for each list, or for each completion, in the order of the data
    prompt_lengths: Sequence[int] = field(default=(), compare=False, repr=False)  # tokens before anything is cut
    completion_lengths: Sequence[int] = field(default=(), compare=False, repr=False)
    prompt_hashes: Sequence[int] = field(default=(), compare=False, repr=False)  # of what it says: equal for equal prompts

    @property
    def lossy(self) -> bool:
        """Whether anything was cut, is empty, teaches nothing or may be somebody else's."""
        found = (self.prompts_truncated, self.completions_truncated, self.completions_empty, self.completions_with_turns)
        return any(found) or bool(self.lists_all_equal)

    def __str__(self) -> str:
        notes = (
            (self.prompts_truncated, "prompt", "cut"),
            (self.completions_truncated, "completion", "cut"),
            (self.completions_empty, "completion", "empty"),
            (self.completions_with_turns, "completion", "with a user's turn in its text, which counts too (give messages)"),
            (self.lists_of_one, "list", "of one candidate"),
            (self.lists_all_tied, "list", "with all scores equal"),
            (self.lists_all_equal, "list", "with all candidates equal, which teaches nothing"),
            (self.tokens_read, "token", "of completions not counted: the policy reads them, it does not write them"),
        )
        found = ", ".join(f"{_count(n, what)} {how}" for n, what, how in notes if n) or "nothing cut, none empty"
        return f"{_count(self.lists, 'list')} of {_count(self.candidates, 'candidate')}: {found}."


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"

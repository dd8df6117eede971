"""Judge: a reward, and how it is asked."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from ..runs.checks import is_number, is_whole
from ..runs.secrets import masked
from .answers import one_per_completion
from .asked import Asked, Call
from .background import for_each, wait_for
from .identity import digest, identity_of
from .memory import Memory, Remembered, Values
from .text import Text

logger = logging.getLogger(__name__)

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before the second try; each further one waits twice as long
AT_A_TIME = 8  # calls of a coroutine


class RewardError(RuntimeError):
    """A reward raised; its exception is the cause."""


class Later(Exception):
    """Raised by a reward that may well answer if it is asked again, after `wait` seconds at least."""

    def __init__(self, why: str, wait: float = 0.0):
        super().__init__(why)
        self.wait = wait


class Reward(Protocol):
    """What scores completions: a function, or an object that is called. It may be a coroutine function.

    It is called with keywords: `prompts` and `completions` (strings, or lists of messages), and the other columns of the data,
    each a list with one value per completion; in the loop also `completion_ids`, the tokens of each. They are copies, which it
    may change. It returns one value per completion, higher is better: a finite number, or None for no opinion.
    """

    def __call__(self, *, prompts: Sequence[Text], completions: Sequence[Text], **columns) -> Sequence[float | None]: ...


def name_of(reward: Reward) -> str:
    """The name that errors and logs use: the function's, or the class's."""
    return getattr(reward, "__name__", type(reward).__name__)


@dataclass(kw_only=True)
class Judge:
    """A reward, and how it is called. Without a Judge around it, a function is called once with all completions, and a
    coroutine function once for each completion, 8 at a time.

    Args:
        reward: a function, a coroutine function, or an object that is called (see `Reward`).
        batch_size: most completions of one call.
        groupwise: each call has all completions of one prompt, and no others, so that their values may depend on each other.
        max_in_flight: most calls at a time. An ordinary function is then called in as many threads.
        timeout: seconds after which a call of a coroutine function is given up, and repeated if retries are left. None: wait
            for however long it takes.
        retries: further tries if a call raises, 1, 2, 4, ... seconds later (a minute at most). An ordinary function is then
            called in a thread.
        remember: keep the values on disk, so that the same prompt and completion are judged once (see `identity_of`). By
            default, if there is more than one call.
        version: what the code does not show, such as a model's name. Another version is another judge, which is asked again.

    Raises:
        ValueError: a setting out of range, or two that exclude each other.
    """

    reward: Reward
    batch_size: int | None = None
    groupwise: bool = False
    max_in_flight: int | None = None
    timeout: float | None = None
    retries: int | None = None
    remember: bool | None = None
    version: str | None = None

    def __post_init__(self):
        for name, least in (("batch_size", 1), ("max_in_flight", 1), ("retries", 0)):
            value = getattr(self, name)
            if value is not None and not is_whole(value, least):
                raise ValueError(f"{name} of a judge must be a whole number of at least {least}, got {value!r}")
        if self.groupwise and self.batch_size is not None:
            raise ValueError("batch_size and groupwise exclude each other: a groupwise judge is asked once for each prompt")
        usual = getattr(self.reward, "asked", {})  # an endpoint's
        self.is_coroutine = _is_coroutine(self.reward)
        if self.batch_size is None and not self.groupwise:
            self.batch_size = usual.get("batch_size", 1 if self.is_coroutine else None)
        if self.max_in_flight not in (None, 1) and self.batch_size is None and not self.groupwise:
            said = f"{name_of(self.reward)!r} is asked once for all completions that are there"
            raise ValueError(f"max_in_flight needs batch_size or groupwise: {said}")
        if self.timeout is not None:
            self._check_timeout(self.timeout)
        if self.max_in_flight is None:
            self.max_in_flight = AT_A_TIME if self.is_coroutine else 1
        if self.retries is None:
            self.retries = usual.get("retries", 0)
        if self.remember is None:
            self.remember = self.groupwise or self.batch_size is not None

    def _check_timeout(self, timeout: Any) -> None:
        if not (is_number(timeout) and timeout > 0):
            raise ValueError(f"timeout of a judge must be a number of seconds above 0, got {timeout!r}")
        if not self.is_coroutine:
            raise ValueError(f"timeout of a judge is for coroutine functions: nothing ends a call of {name_of(self.reward)!r}")

    @classmethod
    def of(cls, reward: Reward) -> Judge:
        return reward if isinstance(reward, Judge) else cls(reward=reward)

    @property
    def __name__(self) -> str:
        return name_of(self.reward)

    @functools.cached_property
    def identity(self) -> dict[str, Any] | None:
        """What tells this judge from others: the reward, whether it sees whole lists, and the version, but not how it is asked.
        Taken before the first question, since some rewards count their questions."""
        reward = identity_of(self.reward)
        return None if reward is None else {"reward": reward, "groupwise": self.groupwise, "version": self.version}

    def __call__(self, *, prompts: Sequence[Text], completions: Sequence[Text], **columns) -> Values:
        """A judge is a reward."""
        return self.values(Asked(prompts, completions, columns))

    def values(self, asked: Asked, memory: Memory | None = None) -> Values:
        """The checked answer for every completion: a finite float, or None for no opinion.

        Answers are remembered before an error of another call is raised.
        """
        questions = asked.lists() if self.groupwise else [[i] for i in range(len(asked.completions))]
        known = self._remembered(memory)
        keys = range(len(questions)) if known is None else [self._key(asked.at(rows)) for rows in questions]
        said = {} if known is None else {key: known[key] for key in keys if key in known}
        missing: dict[Any, list[int]] = {}  # equal questions are asked once
        for key, rows in zip(keys, questions, strict=True):
            if key not in said:
                missing.setdefault(key, rows)

        def keep(call: Call, values: Values) -> None:
            rest = iter(values)
            found = {key: [next(rest) for _ in rows] for key, rows in call.items()}
            said.update(found)
            if known is not None:
                known.put(found)

        self._ask(asked, self._calls(missing, asked), keep)
        return [value for key in keys for value in said[key]]

    def _calls(self, missing: Call, asked: Asked) -> list[Call]:
        takes_one_of = getattr(self.reward, "takes_one_of", None)  # an endpoint's
        one_each = self.groupwise or (takes_one_of is not None and takes_one_of(asked.prompts))
        size = 1 if one_each else self.batch_size or max(1, len(missing))
        questions = list(missing.items())
        return [dict(questions[a : a + size]) for a in range(0, len(questions), size)]

    def _ask(self, asked: Asked, calls: list[Call], keep: Callable[[Call, Values], None]) -> None:
        if not (self.is_coroutine or self.retries or self.max_in_flight > 1):
            for call in calls:
                keep(call, self._now(asked.of(call)))
            return

        async def one(call: Call) -> None:
            keep(call, await self._patiently(asked.of(call)))

        wait_for(for_each(calls, one, self.max_in_flight))

    def _now(self, asked: Asked) -> Values:
        try:
            values = self._called(asked)
        except Exception as error:
            raise self._raised(error) from error
        return self._checked(values, asked)

    async def _patiently(self, asked: Asked) -> Values:
        """The reward's answer; after an error it is asked again, `retries` times at most."""
        only = getattr(self.reward, "again_after", Exception)
        for wait in _waits(self.retries):
            try:
                if self.is_coroutine:
                    values = await self._in_time(self._called(asked))
                else:
                    values = await asyncio.get_running_loop().run_in_executor(self._threads, self._called, asked)
                break
            except Exception as error:
                if wait is None or not isinstance(error, only):
                    raise self._raised(error) from error
                logger.info("reward %r is asked again: %s", name_of(self), masked(str(error)))
                await asyncio.sleep(max(wait, getattr(error, "wait", 0.0)))
        return self._checked(values, asked)

    async def _in_time(self, call: Awaitable[Any]) -> Any:
        if self.timeout is None:
            return await call
        try:
            return await asyncio.wait_for(call, self.timeout)
        except asyncio.TimeoutError as error:  # of wait_for, without a word, or of the reward
            raise TimeoutError(str(error) or f"no answer within {self.timeout:g} seconds") from error

    @functools.cached_property
    def _threads(self) -> ThreadPoolExecutor:
        """As many as there may be calls: the loop's own are few on a machine with few cores."""
        return ThreadPoolExecutor(self.max_in_flight, thread_name_prefix="judge")

    def _called(self, asked: Asked) -> Any:
        """It works on copies: whatever it does to its arguments, the next one is given what this one was."""
        own = asked.copied()
        return self.reward(prompts=own.prompts, completions=own.completions, **own.columns)

    def _raised(self, error: Exception) -> RewardError:
        said = masked(str(error))  # a message of a server may hold the key
        if isinstance(error, Later):
            return RewardError(f"reward {name_of(self)!r} was asked {self.retries + 1} times: {said}")
        return RewardError(f"reward {name_of(self)!r} raised {type(error).__name__}: {said}")

    def _checked(self, values: Any, asked: Asked) -> Values:
        return one_per_completion(f"reward {name_of(self)!r}", values, len(asked.completions))

    def _remembered(self, memory: Memory | None) -> Remembered | None:
        if memory is None or not self.remember:
            return None
        identity = self.identity
        if identity is None:
            logger.warning("the source of reward %r can't be read: what it says is not remembered", name_of(self))
            return None
        return memory.of(name_of(self), identity)

    def _key(self, asked: Asked) -> str:
        """A digest of everything that the reward is given."""
        return digest([list(asked.prompts), list(asked.completions), asked.columns])


def _is_coroutine(reward: Any) -> bool:
    while isinstance(reward, functools.partial):
        reward = reward.func
    return inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(getattr(reward, "__call__", None))  # noqa: B004


def _waits(retries: int) -> Iterator[float | None]:
    """Seconds after each failed try; None after the last."""
    yield from (min(FIRST_WAIT * 2**i, LONGEST_WAIT) for i in range(retries))
    yield None

"""A reward by its name, or by its settings."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from ..runs.yaml_config import nearest
from .endpoint import Endpoint
from .judge import Judge, Reward

BUILT_IN = {"imdb_sentiment": "larpo.sentiment:ImdbSentiment"}
ASKING = {one.name for one in fields(Judge)} - {"reward"}
HOW = ("batch_size", "max_in_flight", "retries", "remember", "timeout", "api_key_env")  # settings that change no score


def from_name(name: str) -> Reward:
    """A built-in reward ("imdb_sentiment") or your own as "package.module:function".

    A class is instantiated without arguments, so it may load a model when it is made.

    Raises:
        ValueError: no such name, or something that cannot be called.

    >>> import math
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


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises ValueError for settings of a judge that are none: see `from_settings`."""
    from_settings(settings, find=_Unasked)


def from_settings(settings: Mapping[str, Any], find: Callable[[str], Reward] = from_name) -> Judge:
    """A judge of settings by name: `reward` (a name that `find` knows) or `url` with the settings of `Endpoint`, and beside it
    those of `Judge`, how it is asked.

    >>> from_settings({"reward": "imdb_sentiment", "groupwise": True}, find=lambda name: name.upper).groupwise
    True
    """
    if ("url" in settings) == ("reward" in settings):
        raise ValueError(f"settings of a reward must hold either `reward`, a name, or `url`, an address; got {list(settings)}")
    name = settings.get("url", settings.get("reward"))
    if not isinstance(name, str):
        raise ValueError(f"reward and url in settings must be texts, got {type(name).__name__}; a function goes into a Judge")
    own = {one.name for one in fields(Endpoint)} if "url" in settings else {"reward"}
    for name in settings:
        if name not in own | ASKING:
            raise ValueError(f"unknown setting of a reward {name!r}{nearest(name, own | ASKING)}")
    asking = {name: value for name, value in settings.items() if name in ASKING - own}
    if "url" not in settings:
        return Judge(reward=find(settings["reward"]), **asking)
    return Judge(reward=Endpoint(**{name: value for name, value in settings.items() if name in own}), **asking)


def settings_that_count(settings: Any) -> Any:
    """Settings of a reward, or of several, without those that change no score. A reward with a `model` or `version` may also
    move to another address."""
    if isinstance(settings, list):
        return [settings_that_count(one) for one in settings]
    if not isinstance(settings, Mapping):
        return settings
    moves = ("url",) if settings.get("model") or settings.get("version") else ()
    return {name: value for name, value in settings.items() if name not in (*HOW, *moves)}


class _Unasked:
    """Takes the place of a reward while its settings are checked: a coroutine, since only these take all settings."""

    def __init__(self, name: str):
        self.name = name

    async def __call__(self, **columns: Any) -> list[None]:
        raise NotImplementedError

"""What tells a judge from others, so that its earlier answers can be used again."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import sys
from collections.abc import Mapping
from typing import Any

PLAIN = (str, int, float, bool, type(None))


def identity_of(reward: Any) -> dict[str, Any] | None:
    """What tells a reward from others: its name and line, the source of its module, and the plain values that it holds
    (defaults, what a closure or a `functools.partial` has bound, attributes of an object). For a decorated reward, the same of
    the decorator. An object may define its identity itself, by an attribute or a method `identity`.

    The source is that of the whole module, because a function calls others beside it: an edit anywhere in the file makes
    another reward. What the module imports, and values that are not plain (a model, a client), are not looked into: a judge's
    `version` stands for them. None if the source can't be read, as for code typed into a prompt, or if an object's own
    `identity` is None: then no change would be noticed.
    """
    own = getattr(reward, "identity", None)
    if own is not None or hasattr(type(reward), "identity"):
        said = own() if callable(own) else own
        return None if said is None else {"is": _name(type(reward)), "says": plain(said)}
    if isinstance(reward, functools.partial):
        return _around(reward.func, {"with": plain([reward.args, reward.keywords])})
    of = reward if inspect.isroutine(reward) else type(reward)
    source = _source_of_module(of)
    if source is None:
        return None
    found = {"is": _name(of), "line": _line(of), "source": source, "holds": plain(_held(reward))}
    wrapped = getattr(reward, "__wrapped__", None)  # what functools.wraps leaves of a decorated function
    return found if wrapped is None else _around(wrapped, found)


def _around(inner: Any, found: dict[str, Any]) -> dict[str, Any] | None:
    identity = identity_of(inner)
    return None if identity is None else found | {"of": identity}


def _held(reward: Any) -> dict[str, Any]:
    """The values that a function or an object holds."""
    if not inspect.isroutine(reward):
        return _attributes(reward)
    defaults = [getattr(reward, name, None) for name in ("__defaults__", "__kwdefaults__")]
    closure = getattr(reward, "__closure__", None) and dict(inspect.getclosurevars(reward).nonlocals)
    values = {"defaults": defaults, "closure": closure or {}}
    bound = getattr(reward, "__self__", None)
    return values if bound is None or inspect.ismodule(bound) else values | {"object": _attributes(bound)}


def _attributes(thing: Any) -> dict[str, Any]:
    return dict(getattr(thing, "__dict__", {}))


def digest(value: Any) -> str:
    """A digest of a value of JSON, which may hold arrays. Any other object counts by its repr: at worst, equal values are taken
    for different ones."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_content).encode()).hexdigest()


def _content(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else repr(value)


def plain(value: Any) -> Any:
    """A value as JSON holds it; for a value that is not plain, the name of its type."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in value), key=repr)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return _name(value if inspect.isroutine(value) or inspect.isclass(value) else type(value))


def _name(of: Any) -> str:
    return f"{getattr(of, '__module__', '?')}:{getattr(of, '__qualname__', repr(of))}"


def _line(of: Any) -> int | None:
    """Of a function: several of a file may have one name, as those written with lambda do."""
    code = getattr(of, "__code__", None)
    return None if code is None else code.co_firstlineno


def _source_of_module(of: Any) -> str | None:
    """A digest of the source. For a decorated function it is the decorator's module: `__module__` names the decorated one's."""
    name = getattr(of, "__globals__", {}).get("__name__") or getattr(of, "__module__", None)
    module = sys.modules.get(name or "")
    try:
        return digest(inspect.getsource(module))
    except (OSError, TypeError):  # built in, or typed into a prompt
        return None

"""ServerSettings: where a server is, what it calls the model, and how it hears of new weights."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_type_hints

from ..runs.secrets import MASK, is_secret
from ..runs.yaml_config import as_meant, nearest

CHECKPOINT = "{checkpoint}"  # stands for the folder, or the hub's name, of the policy that samples


def _arg(default: Any, text: str) -> Any:
    """A field and what it is for."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """The sampler_options of `sampler: server`. Raises ValueError for a value out of range, naming the setting."""

    base_url: str = field(metadata={"help": "Address of the API, up to /v1: http://localhost:8000/v1."})
    model: str = _arg(
        CHECKPOINT,
        "The server's name of the model. {checkpoint} in it stands for the policy's folder, for servers that load the model "
        "that a request names, such as `transformers serve`.",
    )
    initial_model: str | None = _arg(
        None,
        "The server's name of the model that the run starts from, if policies are adapters on it (None: as for every other "
        "policy).",
    )
    api_key_env: str | None = _arg(None, "Name of the environment variable that holds the key (None: no key).")
    max_in_flight: int = _arg(32, "Most requests at a time.")
    timeout: float = _arg(600.0, "Seconds until a request without an answer is given up, and tried again.")
    retries: int = _arg(5, "Further tries of a request that gets no answer or an error of the server, at growing intervals.")
    extra_body: Mapping[str, Any] = field(
        default_factory=dict, metadata={"help": "Added to every request, for options of the server beyond the API."}
    )
    reload_command: str | None = _arg(
        None,
        "A shell command that makes the server load a policy's weights; it runs before the policy's first completions. "
        "{checkpoint} stands for their folder, {iteration} for the iteration that made them (0: the initial model).",
    )
    reload_timeout: float = _arg(
        1800.0, "Seconds that reload_command may take, and after it the server until it answers again."
    )
    allow_stale_weights: bool = _arg(
        False, "Sample from a server that gets no new weights; a warning says so, and its completions are marked as stale."
    )

    def __post_init__(self):
        hints = get_type_hints(ServerSettings)
        for one in fields(self):
            object.__setattr__(self, one.name, as_meant(_named(one.name), getattr(self, one.name), hints[one.name]))
        url = urllib.parse.urlsplit(str(self.base_url))
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"{_named('base_url')} must be an address like http://localhost:8000/v1, got {self.base_url!r}")
        if url.username or url.password or url.query:
            raise ValueError(f"{_named('base_url')} must hold no user, password or query: a key is read from api_key_env")
        whole, seconds = int, int | float
        least_of = {"max_in_flight": (whole, 1), "retries": (whole, 0), "timeout": (seconds, 0), "reload_timeout": (seconds, 0)}
        for name, (kinds, least) in least_of.items():
            value = getattr(self, name)
            if not isinstance(value, kinds) or isinstance(value, bool) or value < least:
                raise ValueError(f"{_named(name)} must be a number of at least {least}, got {value!r}")
        if not isinstance(self.extra_body, Mapping):
            raise ValueError(f"{_named('extra_body')} must hold `name: value` settings, got {self.extra_body!r}")
        if CHECKPOINT not in self.model and self.reload_command is None and not self.allow_stale_weights:
            raise ValueError(
                f"nothing tells the server of new weights: give {_named('reload_command')}, a model name with {CHECKPOINT} "
                "where the server loads what is asked for, or allow_stale_weights to sample from the weights it has"
            )

    def is_stale(self, iteration: int) -> bool:
        """Whether completions that shall be of the policy after an iteration are not, since nothing tells the server of it."""
        return iteration > 0 and self.reload_command is None and CHECKPOINT not in self.model

    def model_of(self, checkpoint: str, iteration: int) -> str:
        name = self.model if iteration or self.initial_model is None else self.initial_model
        return name.replace(CHECKPOINT, checkpoint)

    def api_key(self) -> str:
        """The key, or what stands for none. Raises ValueError where the variable is not set."""
        if self.api_key_env is None:
            return "none"  # not left out: the client would send whatever is in OPENAI_API_KEY
        key = os.environ.get(self.api_key_env)
        if not key:
            raise ValueError(f"{_named('api_key_env')} is {self.api_key_env!r}, and there is no such environment variable")
        return key


SAME_COMPLETIONS = ("model", "initial_model", "extra_body")  # the others may change in a run that goes on


def server_settings(options: Mapping[str, Any]) -> ServerSettings:
    """ServerSettings of sampler_options. Raises ValueError for a name that is none, and for a key that is given itself."""
    known = [one.name for one in fields(ServerSettings)]
    for name in options:
        if name not in known and is_secret(name):
            raise ValueError(
                f"{_named(name)} must be left out: put the key into an environment variable, and its name into api_key_env"
            )
        if name not in known:
            raise ValueError(f"unknown setting {_named(name)}{nearest(name, known)}")
    if not options.get("base_url"):
        raise ValueError(f"sampler server needs {_named('base_url')}, such as http://localhost:8000/v1")
    return ServerSettings(**options)


def without_key(text: str, settings: ServerSettings) -> str:
    """A text that a server or a command gave, without the key should it show it."""
    key = None if settings.api_key_env is None else os.environ.get(settings.api_key_env)
    return text.replace(key, MASK) if key else text


def _named(name: str) -> str:
    return f"sampler_options.{name}"

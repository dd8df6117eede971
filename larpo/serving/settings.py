"""ServerSettings: where a server is, what it calls the model, and how it hears of new weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_type_hints

from ..field_docs import documented
from ..runs.checks import is_number, is_whole
from ..runs.secrets import is_secret
from ..runs.servers import check_address, key_in
from ..runs.yaml_config import as_meant, nearest

CHECKPOINT = "{checkpoint}"  # stands for the folder, or the hub's name, of the policy that samples


@documented
@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """The sampler_options of `sampler: server`. Raises ValueError for a value out of range, naming the setting.

    Args:
        base_url: Address of the API, up to /v1: http://localhost:8000/v1.
        model: The server's name of the model. {checkpoint} in it stands for the policy's folder, for servers that load the
            model that a request names, such as `transformers serve`.
        initial_model: The server's name of the model that the run starts from, if policies are adapters on it (None: as for
            every other policy).
        api_key_env: Name of the environment variable that holds the key (None: no key).
        max_in_flight: Most requests at a time.
        timeout: Seconds until a request without an answer is given up, and tried again.
        retries: Further tries of a request that gets no answer or an error of the server, at growing intervals.
        extra_body: Added to every request, for options of the server beyond the API.
        reload_command: A shell command that makes the server load a policy's weights; it runs before the policy's first
            completions. {checkpoint} stands for their folder, {iteration} for the iteration that made them (0: the initial
            model).
        reload_timeout: Seconds that reload_command may take, and after it the server until it answers again.
        allow_stale_weights: Sample from a server that gets no new weights; a warning says so, and its completions are marked as
            stale.
    """

    base_url: str
    model: str = CHECKPOINT
    initial_model: str | None = None
    api_key_env: str | None = None
    max_in_flight: int = 32
    timeout: float = 600.0
    retries: int = 5
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    reload_command: str | None = None
    reload_timeout: float = 1800.0
    allow_stale_weights: bool = False

    def __post_init__(self):
        hints = get_type_hints(ServerSettings)
        for one in fields(self):
            object.__setattr__(self, one.name, as_meant(_named(one.name), getattr(self, one.name), hints[one.name]))
        check_address(_named("base_url"), self.base_url, "http://localhost:8000/v1", may_have_query=False)
        for name, fits, least in (
            ("max_in_flight", is_whole, 1),
            ("retries", is_whole, 0),
            ("timeout", is_number, 0),
            ("reload_timeout", is_number, 0),
        ):
            if not fits(getattr(self, name), least):
                raise ValueError(f"{_named(name)} must be a number of at least {least}, got {getattr(self, name)!r}")
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
        return key_in(self.api_key_env, _named("api_key_env")) or "none"  # or the client would send what is in OPENAI_API_KEY


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


def _named(name: str) -> str:
    return f"sampler_options.{name}"

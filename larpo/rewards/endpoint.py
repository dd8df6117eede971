"""A reward behind an address: a server of a sequence classifier, or anything that answers JSON.

The HTTP client is that of huggingface_hub, with the proxies and certificates that it was given.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from ..runs.checks import check_choice, is_number
from ..runs.secrets import is_secret
from ..runs.servers import check_address, key_in, shown, without_key
from .judge import Later
from .text import Text, text_of

BUSY = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses after which a request is repeated


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A reward that asks an address, by POST of JSON.

    Args:
        url: the whole address: http://localhost:8000/classify.
        api: the format of requests and answers. "json" posts {"prompts": [...], "completions": [...]} and a list for each other
            column, and expects {"scores": [...]}, a number or null (no opinion) for each completion. "vllm_classify" is
            /classify of vLLM or /v1/classify of SGLang, and asks for the logit if the server knows `use_activation`.
            "tei_predict" is /predict of text-embeddings-inference, and asks for the logit (`raw_scores`).
        model: the server's name of the model, if it needs one.
        label: which of a classifier's labels is the reward: an index (vllm_classify) or a name (tei_predict); may be left out
            for a model with one label.
        api_key_env: name of the environment variable that holds the key, sent as "Authorization: Bearer ...".
        timeout: seconds until a request without an answer is given up, and made again.
        extra_body: added to every request.

    Classifiers get prompt and completion as one text. vLLM gets messages as messages, one completion per request, for its chat
    template; text-embeddings-inference has no chat template.

    Raises:
        ValueError: an address, api, label or timeout that cannot be, or a secret in one of them.
    """

    url: str
    api: str = "json"
    model: str | None = None
    label: str | int | None = None
    api_key_env: str | None = None
    timeout: float = 60.0
    extra_body: Mapping[str, Any] = field(default_factory=dict)

    asked: ClassVar[dict[str, Any]] = {"batch_size": 16, "retries": 5}  # unless the judge's settings say otherwise
    again_after: ClassVar[type] = Later

    def __post_init__(self):
        check_address("url of a reward", self.url, "http://localhost:8000/classify", may_have_query=True)
        check_choice("api of a reward", self.api, APIS)
        if self.label is not None and self.api == "json":
            raise ValueError(f"label of a reward is of a classifier, and api json answers by `scores`; got {self.label!r}")
        if not (is_number(self.timeout) and self.timeout > 0):
            raise ValueError(f"timeout of a reward must be a number of seconds above 0, got {self.timeout!r}")
        if secret := [name for name in self.extra_body if is_secret(name)]:
            raise ValueError(f"extra_body of a reward must not hold {secret[0]!r}: a key is read from api_key_env")
        self._key()

    @property
    def __name__(self) -> str:
        return self.url

    @property
    def identity(self) -> dict[str, Any]:
        """Where the model has a name, the same one may answer from another address."""
        said = {"api": self.api, "model": self.model, "label": self.label, "extra_body": dict(self.extra_body)}
        return said if self.model is not None else said | {"url": self.url}

    def takes_one_of(self, prompts: Sequence[Text]) -> bool:
        """Whether a request can hold one completion only: then a call is of one, and no answer is lost with another."""
        return self.api == "vllm_classify" and not all(isinstance(prompt, str) for prompt in prompts)

    async def __call__(self, *, prompts: Sequence[Text], completions: Sequence[Text], **columns) -> list[float | None]:
        api, found = APIS[self.api], []
        for body in api.bodies(self, prompts, completions, columns):
            named = {} if self.model is None else {"model": self.model}
            found += api.scores(self, await self._post({**body, **named, **self.extra_body}))
        return found

    async def _post(self, body: dict[str, Any]) -> Any:
        from huggingface_hub.utils import httpx

        key = self._key()
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        try:
            answer = await _client().post(self.url, json=body, headers=headers, timeout=self.timeout)
        except httpx.TransportError as error:
            raise Later(f"no answer ({type(error).__name__}: {without_key(str(error), self.api_key_env)})") from None
        if answer.status_code in BUSY:
            raise Later(self._said(answer), _seconds(answer.headers.get("retry-after")))
        if answer.is_error:
            raise ConnectionError(self._said(answer))
        try:
            return answer.json()
        except ValueError:
            raise ValueError(f"its answer is no JSON: {self._shown(answer.text)}") from None

    def _said(self, answer: Any) -> str:
        return f"it answers {answer.status_code} {answer.reason_phrase}: {self._shown(answer.text)}"

    def _shown(self, text: str) -> str:
        return shown(text, self.api_key_env, most=200)

    def _key(self) -> str | None:
        return key_in(self.api_key_env, "api_key_env of a reward")


_clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Any] = weakref.WeakKeyDictionary()


def _client() -> Any:
    """The HTTP client of the running event loop, without huggingface_hub's own hooks, which refuse every address if
    HF_HUB_OFFLINE is set."""
    from huggingface_hub import get_async_session

    loop = asyncio.get_running_loop()
    if loop not in _clients:
        _clients[loop] = get_async_session()
        _clients[loop].event_hooks = {}
    return _clients[loop]


def _seconds(retry_after: str | None) -> float:
    """At most ten minutes: a server that is away for longer should be an error now."""
    return min(float(retry_after), 600.0) if retry_after and retry_after.isdigit() else 0.0


# --- what servers speak ------------------------------------------------------------------------------------


class Api(NamedTuple):
    """bodies(endpoint, prompts, completions, columns): requests. scores(endpoint, answer): what one of them was answered."""

    bodies: Callable[..., list[dict[str, Any]]]
    scores: Callable[[Endpoint, Any], list[float | None]]


def _json_bodies(_: Endpoint, prompts: Sequence[Text], completions: Sequence[Text], columns: dict) -> list[dict[str, Any]]:
    return [{**columns, "prompts": list(prompts), "completions": list(completions)}]


def _json_scores(_: Endpoint, answer: Any) -> list[float | None]:
    return _field(answer, "scores", list)


def _vllm_bodies(_: Endpoint, prompts: Sequence[Text], completions: Sequence[Text], columns: dict) -> list[dict[str, Any]]:
    logits = {"use_activation": False}
    if all(isinstance(prompt, str) for prompt in prompts):
        return [{"input": _texts(prompts, completions), **logits}]
    return [
        {"messages": [*prompt, *_messages(completion)], "add_generation_prompt": False, **logits}
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def _vllm_scores(endpoint: Endpoint, answer: Any) -> list[float | None]:
    found = sorted(_field(answer, "data", list), key=lambda one: _field(one, "index", int))
    return [_of_label(endpoint, dict(enumerate(_field(one, "probs", list)))) for one in found]


def _tei_bodies(_: Endpoint, prompts: Sequence[Text], completions: Sequence[Text], columns: dict) -> list[dict[str, Any]]:
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("tei_predict reads text, and these prompts are messages")
    return [{"inputs": [[text] for text in _texts(prompts, completions)], "raw_scores": True}]


def _tei_scores(endpoint: Endpoint, answer: Any) -> list[float | None]:
    if not isinstance(answer, list):
        raise ValueError(f"its answer is {type(answer).__name__}; expected a list")
    return [_of_label(endpoint, {_field(p, "label", str): _field(p, "score", object) for p in one}) for one in answer]


APIS = {
    "json": Api(_json_bodies, _json_scores),
    "vllm_classify": Api(_vllm_bodies, _vllm_scores),
    "tei_predict": Api(_tei_bodies, _tei_scores),
}


def _texts(prompts: Sequence[Text], completions: Sequence[Text]) -> list[str]:
    return [prompt + text_of(completion) for prompt, completion in zip(prompts, completions, strict=True)]


def _messages(completion: Text) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)


def _field(answer: Any, name: str, kind: type) -> Any:
    if not isinstance(answer, Mapping) or not isinstance(answer.get(name), kind):
        raise ValueError(f"its answer has no {name!r}, or it is no {kind.__name__}: {str(answer)[:200]}")
    return answer[name]


def _of_label(endpoint: Endpoint, by_label: Mapping[Any, Any]) -> Any:
    if endpoint.label is None and len(by_label) == 1:
        return next(iter(by_label.values()))
    if endpoint.label not in by_label:
        raise ValueError(f"label of a reward must be one of {list(by_label)}, got {endpoint.label!r}")
    return by_label[endpoint.label]

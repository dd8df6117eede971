"""One client for a server, of the `openai` package, which tries again by itself; its errors as one sentence each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..runs.servers import shown
from .settings import ServerSettings

if TYPE_CHECKING:
    import openai


class ServerError(ConnectionError):
    """A server that is away, refuses a request, or gives fewer completions than were asked for."""


def open_client(settings: ServerSettings) -> openai.AsyncOpenAI:
    """To be made in the event loop in which it is used. Raises ImportError where `openai` is not installed."""
    try:
        import openai
    except ImportError as error:
        raise ImportError("sampler server needs the package openai; install it with: pip install openai") from error
    return openai.AsyncOpenAI(
        base_url=settings.base_url, api_key=settings.api_key(), timeout=settings.timeout, max_retries=settings.retries
    )


async def what_happened(error: openai.OpenAIError, client: openai.AsyncOpenAI, settings: ServerSettings, model: str) -> str:
    """A sentence about a request that failed after all tries."""
    import openai

    server = f"the server at {settings.base_url}"
    if isinstance(error, openai.APITimeoutError):
        return f"{server} gave no answer within {settings.timeout:g} seconds, {settings.retries + 1} times"
    if isinstance(error, openai.APIConnectionError):
        return f"{server} can't be reached ({error.__cause__ or error}): is it running, and is this its address?"
    said = shown(str(error), settings.api_key_env)
    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        key = "has none to show" if settings.api_key_env is None else f"shows the one in {settings.api_key_env}"
        return f"{server} wants another key, and this run {key} ({said})"
    if isinstance(error, openai.InternalServerError):
        return f"{server} fails when asked for model {model!r}, {settings.retries + 1} times ({said})"
    known = await _models(client)
    others = f"; the models it lists are {', '.join(known)}" if known and model not in known else ""
    return f"{server} refuses to sample from model {model!r}{others} ({said})"


async def _models(client: openai.AsyncOpenAI, most: int = 5) -> list[str]:
    """Names of the server's models, where it lists them."""
    import openai

    try:
        listed = await client.with_options(max_retries=0, timeout=10).models.list()
    except openai.OpenAIError:
        return []
    return [one.id for one in listed.data or []][:most]

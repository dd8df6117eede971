"""What a server is asked for, and what its answer holds.

The first form that the server takes is used: token ids in and out with log-likelihoods, as vLLM has them; text, or messages for
the server's own chat template, with log-likelihoods; and text alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..data import endings
from ..data.text_tokenizer import text_tokenizer
from ..rewards import Text
from ..runs.files import plain
from ..sampling import check_settings
from .settings import ServerSettings

if TYPE_CHECKING:
    import openai
    from transformers import PreTrainedTokenizerBase


class Form(NamedTuple):
    """A form of request."""

    token_ids: bool
    logprobs: bool


FORMS = (Form(token_ids=True, logprobs=True), Form(token_ids=False, logprobs=True), Form(token_ids=False, logprobs=False))


# Said, since a server takes what is not from the model's generation settings: completions come from the policy itself.
NOTHING_ELSE = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class Wanted:
    """n completions of one prompt."""

    prompt: Text
    prompt_ids: tuple[int, ...]
    template: Mapping[str, Any] | None  # what else the prompt's chat template wants
    n: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class SamplingLimits:
    """How completions are drawn, and what ends them: the same for every prompt."""

    max_new_tokens: int
    end_token_ids: tuple[int, ...]
    only_these_end: bool  # not what the model's own settings name
    top_k: int = 0
    top_p: float = 1.0
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        check_settings(self.max_new_tokens, self.top_k, self.top_p, self.stop, self.min_new_tokens)

    def only_by_token_ids(self) -> list[str]:
        """The settings that need token ids: where a server gives text, the tokens that ended it are not known."""
        found = {"eos_token": self.only_these_end, "stop": bool(self.stop), "min_new_tokens": self.min_new_tokens > 0}
        return [name for name, given in found.items() if given]


def sampling_limits(
    tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, *, eos_token_ids: Sequence[int] | None = None, **others: Any
) -> SamplingLimits:
    """The settings of a `TransformersSampler` as SamplingLimits. Raises ValueError for one that is out of its range."""
    own = eos_token_ids is not None
    ends = tuple(eos_token_ids) if own else endings.ending_of(text_tokenizer(tokenizer)).token_ids
    return SamplingLimits(max_new_tokens, ends, own, **others)


@dataclass(frozen=True)
class Choice:
    """One completion as the server gave it."""

    text: str
    finish: str | None
    token_ids: list[int] | None = None
    logps: list[float] | None = None  # of its tokens, as the server counts them


@dataclass(frozen=True)
class Answer:
    choices: list[Choice]
    prompt_tokens: int | None = None  # as the server counts them
    completion_tokens: int | None = None  # of all choices


async def ask(
    client: openai.AsyncOpenAI, settings: ServerSettings, model: str, form: Form, wanted: Wanted, limits: SamplingLimits
) -> Answer:
    """Raises openai.OpenAIError where the client gave up."""
    common: dict[str, Any] = {"model": model, "n": wanted.n, "temperature": wanted.temperature, "seed": wanted.seed}
    common |= {"top_p": limits.top_p, "max_tokens": limits.max_new_tokens}
    extra: dict[str, Any] = {}
    if form.token_ids:
        extra |= {"return_token_ids": True, "min_tokens": limits.min_new_tokens, **NOTHING_ELSE}
        extra |= {"stop_token_ids": list(limits.end_token_ids), "ignore_eos": limits.only_these_end}
        if limits.top_k:
            extra["top_k"] = limits.top_k
        if limits.stop:
            common["stop"] = list(limits.stop)
    if form.token_ids or isinstance(wanted.prompt, str):
        prompt = list(wanted.prompt_ids) if form.token_ids else wanted.prompt
        if form.logprobs:
            common["logprobs"] = 1
        answer = await client.completions.create(prompt=prompt, extra_body=extra | dict(settings.extra_body), **common)
        return _answer(answer, [_choice(one) for one in answer.choices or ()])
    keywords = dict(wanted.template or {})
    if tools := keywords.pop("tools", None):
        common["tools"] = tools
    if keywords:
        extra["chat_template_kwargs"] = keywords
    if form.logprobs:
        common["logprobs"] = True
    answer = await client.chat.completions.create(
        messages=plain(wanted.prompt), extra_body=extra | dict(settings.extra_body), **common
    )
    return _answer(answer, [_chat_choice(one) for one in answer.choices or ()])


def _answer(answer: Any, choices: list[Choice]) -> Answer:
    usage = answer.usage
    return Answer(choices, None if usage is None else usage.prompt_tokens, None if usage is None else usage.completion_tokens)


def _choice(one: Any) -> Choice:
    logps = None if one.logprobs is None else one.logprobs.token_logprobs
    return Choice(one.text or "", one.finish_reason, getattr(one, "token_ids", None), _all_numbers(logps))


def _chat_choice(one: Any) -> Choice:
    content = None if one.logprobs is None else one.logprobs.content
    logps = None if content is None else [token.logprob for token in content]
    return Choice(one.message.content or "", one.finish_reason, getattr(one, "token_ids", None), _all_numbers(logps))


def _all_numbers(logps: list[float | None] | None) -> list[float] | None:
    return None if logps is None or None in logps else logps

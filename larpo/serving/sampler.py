"""ServerSampler: completions from a server, of which whatever has arrived is on disk."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data import chat_template, endings, prompt_boundary
from ..data.text_tokenizer import text_tokenizer
from ..rewards import Text
from ..rewards.background import for_each, wait_for
from ..sampling import Sampled, Template, all_prompt_tokens, check_call
from .answers import Answers, key_of
from .asking import FORMS, Answer, Choice, Form, SamplingLimits, Wanted, ask
from .client import ServerError, open_client, what_happened
from .settings import ServerSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FINISHED = ("stop", "eos_token", "stop_sequence")
COMPLETE = (*FINISHED, "length")  # anything else (abort, content_filter) is no completion
ENOUGH_LISTS = 4  # to say that a server does not sample
EMPTY_ANSWERS = 3  # in a row, before a prompt is given up
BETWEEN_TRIES = 1.0  # seconds, while a server takes new weights


@dataclass(frozen=True)
class ServedModel:
    """What a server is asked for: its name there, the weights by which kept answers are told apart, and the seconds in which a
    server that does not answer its first request may be taking them."""

    name: str
    weights: str
    patience: float = 0.0


@dataclass
class ServerSampler:
    """Samples from a server: the tokens that it gives, or its text, tokenised here.

    Args:
        tokenizer: the policy's own, for prompts, and for completions where the server gives no token ids.
        kept: a file in which answers are kept as they arrive; None: in memory.
    """

    settings: ServerSettings
    tokenizer: PreTrainedTokenizerBase
    limits: SamplingLimits
    model: ServedModel
    kept: Path | None = None
    progress: bool = False
    form: Form | None = field(default=None, init=False)  # known after the first answer

    def __post_init__(self):
        self.tokenizer = text_tokenizer(self.tokenizer)

    def __call__(
        self, prompts: Sequence[Text], k: int, temperature: float, *, seed: int, template: Template = None
    ) -> list[list[Sampled]]:
        """See `Sampler`. Seeds are sent along; whether equal ones give equal completions is up to the server.

        Raises ServerError where the server is away, refuses, or gives too few completions, saying what is kept; ImportError
        without `openai`.
        """
        check_call(k, temperature)
        ids = all_prompt_tokens(self.tokenizer, prompts, template)
        keywords = [None] * len(prompts) if template is None else template
        seeds = np.random.SeedSequence(seed).generate_state(len(prompts)).tolist()
        rows = [Wanted(*of, k, temperature, one) for *of, one in zip(prompts, ids, keywords, seeds, strict=True)]
        return wait_for(self._lists(rows))

    async def _lists(self, rows: Sequence[Wanted]) -> list[list[Sampled]]:
        from tqdm import tqdm

        answers = Answers(self.kept)
        lists: dict[int, list[Sampled]] = {}
        with tqdm(total=len(rows), desc="sampling", unit="prompt", disable=not self.progress) as bar:
            async with open_client(self.settings) as client:
                asker = _Asker(self, client, answers)

                async def sample(row: int) -> None:
                    lists[row] = await asker.completions(rows[row])
                    bar.update()

                try:
                    await for_each(range(len(rows)), sample, self.settings.max_in_flight)
                except ServerError as error:
                    kept = f"; {len(lists)} of {len(rows)} prompts are kept, and the same command goes on from there"
                    raise ServerError(f"{error}{'' if self.kept is None else kept}") from None  # its cause may show the key
        found = [lists[row] for row in range(len(rows))]
        self._warn_of_greed(found)
        return found

    def _warn_of_greed(self, lists: Sequence[list[Sampled]]) -> None:
        """Some servers sample only if the model's generation settings say do_sample, whatever temperature they are given."""
        several = [found for found in lists if len(found) > 1]
        if len(several) >= ENOUGH_LISTS and all(one.token_ids == found[0].token_ids for found in several for one in found):
            logger.warning(
                "all completions of a prompt are the same, for each of %d prompts: does the server at %s sample at all, or do "
                "the model's generation settings have it take the likeliest token (do_sample)?",
                len(several),
                self.settings.base_url,
            )

    def sampled(self, wanted: Wanted, answer: Answer) -> list[Sampled]:
        """The completions of an answer."""
        read_as_meant = answer.prompt_tokens in (None, len(wanted.prompt_ids))
        ids = [tuple(self._tokens(wanted, choice)) for choice in answer.choices]
        as_many = answer.completion_tokens == sum(map(len, ids))
        return [
            Sampled(
                text=choice.text,
                token_ids=own,
                finished=choice.finish in FINISHED,
                prompt_ids=wanted.prompt_ids,
                logps=tuple(choice.logps) if choice.logps is not None and len(choice.logps) == len(own) else None,
                exact=choice.token_ids is not None or (as_many if choice.logps is None else len(choice.logps) == len(own)),
                prompt_exact=read_as_meant,
            )
            for choice, own in zip(answer.choices, ids, strict=True)
            if choice.finish in COMPLETE
        ]

    def _tokens(self, wanted: Wanted, choice: Choice) -> Sequence[int]:
        """The tokens that the server gave, or those of its text, followed by the one that training puts at the end."""
        if choice.token_ids is not None:
            return choice.token_ids
        tokenizer, is_text = self.tokenizer, isinstance(wanted.prompt, str)
        before = wanted.prompt if is_text else chat_template.prompt_text(tokenizer, wanted.prompt, wanted.template or {})
        _, (ids,) = prompt_boundary.split(tokenizer, before, [before + choice.text])
        end = None if is_text else endings.end_of_turn_id(tokenizer)
        end = tokenizer.eos_token_id if end is None else end
        return [*ids, end] if choice.finish in FINISHED and end is not None else ids

    def refuse_text(self, prompt: Text, *, forms: bool) -> None:
        """Raises ServerError for what only a server can do that gives token ids."""
        names = self.limits.only_by_token_ids()
        if forms and self.limits.top_k and "top_k" not in self.settings.extra_body:
            names.append("top_k")
        if forms and not isinstance(prompt, str) and prompt[-1].get("role") == "assistant":
            names.append("a prompt that ends in the assistant's own words")
        if names:
            raise ServerError(
                f"{' and '.join(names)} can't be had of the server at {self.settings.base_url}, which "
                f"{'takes text alone' if forms else 'gives no token ids'}; vLLM's takes and gives token ids"
            )


class _Asker:
    """The requests of one call of a sampler."""

    def __init__(self, sampler: ServerSampler, client: Any, answers: Answers):
        self.sampler, self.client, self.answers = sampler, client, answers
        self.first, self.refused = asyncio.Lock(), None

    async def completions(self, wanted: Wanted) -> list[Sampled]:
        """wanted.n completions: where an answer has fewer, the rest is asked for again, with another seed."""
        found: list[Sampled] = []
        empty, round_ = 0, 0
        while len(found) < wanted.n:
            seed = int(np.random.SeedSequence([wanted.seed, round_]).generate_state(1)[0])
            rest = Wanted(wanted.prompt, wanted.prompt_ids, wanted.template, wanted.n - len(found), wanted.temperature, seed)
            new = self.sampler.sampled(rest, await self._answer(rest))[: rest.n]
            found, round_ = found + new, round_ + 1
            empty = 0 if new else empty + 1
            if empty == EMPTY_ANSWERS:
                raise ServerError(
                    f"the server at {self.sampler.settings.base_url} gave {len(found)} of {wanted.n} completions of a prompt, "
                    f"and none when asked {empty} times more"
                )
        return found

    async def _answer(self, wanted: Wanted) -> Answer:
        sampler = self.sampler
        key = key_of(sampler.model.weights, wanted, sampler.limits)
        if key in self.answers:
            answer = self.answers[key]
        else:
            answer = await self._ask(wanted)
            if any(one.finish in COMPLETE for one in answer.choices):
                self.answers.put({key: answer})
        if any(one.token_ids is None for one in answer.choices):
            sampler.refuse_text(wanted.prompt, forms=False)
        return answer

    async def _ask(self, wanted: Wanted) -> Answer:
        import openai

        if self.sampler.form is None:
            async with self.first:
                if self.refused is not None:  # all that waited would fail in the same way
                    raise self.refused
                if self.sampler.form is None:
                    try:
                        return await self._ask_first(wanted)
                    except ServerError as error:
                        self.refused = error
                        raise
        try:
            return await self._in_form(self.sampler.form, wanted)
        except openai.OpenAIError as error:
            raise await self._said(error) from error

    async def _ask_first(self, wanted: Wanted) -> Answer:
        """The answer in the first form that the server takes, which is the one of all others then."""
        import openai

        until = time.monotonic() + self.sampler.model.patience
        asked_wrongly = openai.BadRequestError, openai.UnprocessableEntityError
        while True:
            for form in FORMS:
                try:
                    answer = await self._in_form(form, wanted)
                except (*asked_wrongly, openai.NotFoundError) as error:
                    refused = error
                except openai.OpenAIError as error:
                    refused = error
                    break
                else:
                    self.sampler.form = form
                    return answer
            if isinstance(refused, asked_wrongly) or time.monotonic() > until:
                raise await self._said(refused) from refused
            await asyncio.sleep(BETWEEN_TRIES)

    async def _in_form(self, form: Form, wanted: Wanted) -> Answer:
        sampler = self.sampler
        if not form.token_ids:
            sampler.refuse_text(wanted.prompt, forms=True)
        return await ask(self.client, sampler.settings, sampler.model.name, form, wanted, sampler.limits)

    async def _said(self, error: Any) -> ServerError:
        return ServerError(await what_happened(error, self.client, self.sampler.settings, self.sampler.model.name))

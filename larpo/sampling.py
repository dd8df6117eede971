"""The retriever: k completions per prompt from the current policy, at a temperature (LarPO, arXiv 2502.03699, algorithm 1).

A `Sampler` is a callable; two are here, `TransformersSampler` and `VLLMSampler`, the third is in `larpo.serving`, and
`Distinct` wraps any.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from .data import chat_template, endings, prompt_boundary
from .data.text_tokenizer import padding_id, text_tokenizer
from .rewards import Text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Template = Sequence[Mapping[str, Any]] | None
Schedule = float | Sequence[float] | tuple[Literal["linear"], float, float]


@dataclass(frozen=True)
class Sampled:
    """One completion as it was sampled."""

    text: str  # without special tokens, and without a string that ended it
    token_ids: tuple[int, ...]  # exactly as sampled, with the token that ended it, or those of the string
    finished: bool  # the model ended by itself (see `larpo.data.endings`); False: cut off at max_new_tokens
    prompt_ids: tuple[int, ...]  # the tokens it was sampled behind
    logps: tuple[float, ...] | None = None  # of token_ids, at temperature 1, as an engine that is not the trainer's has them
    exact: bool = True  # False: the sampler gave text, and of its tokens here nobody knows that they are those it sampled
    prompt_exact: bool = True  # False: by its own count the sampler read the prompt as other tokens


class Sampler(Protocol):
    def __call__(
        self, prompts: Sequence[Text], k: int, temperature: float, *, seed: int, template: Template = None
    ) -> list[list[Sampled]]:
        """k completions of every prompt, in the prompts' order; equal arguments and weights give equal completions.

        prompts: strings, or messages for the chat template. temperature: above 0, or 0 for greedy decoding with k = 1.
        template: for every prompt what else its template wants (`larpo.data.chat_template.template_keywords`); None: nothing.
        A sampler of one's own need not take it where no row has such columns.
        """
        ...


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, keywords: Mapping[str, Any] | None = None
) -> tuple[int, ...]:
    """The prompt's own tokens, as training has them: with the special tokens that the tokenizer puts in front (see
    `larpo.data.prompt_boundary`), or through the chat template, with these keywords, up to where a completion begins
    (see `larpo.data.chat_template`).

    Raises ValueError for a prompt without tokens.
    """
    if isinstance(prompt, str):
        ids, _ = prompt_boundary.split(tokenizer, prompt, (), prompt_boundary.leading_special_tokens(tokenizer))
    else:
        ids = prompt_boundary.encode(tokenizer, chat_template.prompt_text(tokenizer, prompt, keywords or {}))
    if not ids:
        raise ValueError(f"prompt {prompt!r} has no tokens; a model needs at least one to continue")
    return tuple(ids)


def all_prompt_tokens(tokenizer: Any, prompts: Sequence[Text], template: Template) -> list[tuple[int, ...]]:
    keywords = [None] * len(prompts) if template is None else template
    return [prompt_tokens(tokenizer, prompt, one) for prompt, one in zip(prompts, keywords, strict=True)]


def temperature_at(schedule: Schedule, iteration: int, iterations: int) -> float:
    """The temperature of an iteration (0, 1, ..., iterations - 1).

    schedule: one number for all, a list with a number per iteration, or ("linear", start, end).

    >>> [temperature_at(("linear", 1.2, 0.8), i, 3) for i in range(3)]
    [1.2, 1.0, 0.8]
    """
    if not 0 <= iteration < iterations:
        raise ValueError(f"iteration must be in [0, {iterations}), got {iteration}")
    if isinstance(schedule, int | float):
        temperature = float(schedule)
    elif len(schedule) == 3 and schedule[0] == "linear":
        share = iteration / max(iterations - 1, 1)
        temperature = float((1 - share) * schedule[1] + share * schedule[2])
    elif len(schedule) == iterations and not any(isinstance(value, str) for value in schedule):
        temperature = float(schedule[iteration])
    else:
        raise ValueError(
            f"temperature schedule must be a number, {iterations} numbers (one per iteration) or "
            f"('linear', start, end), got {schedule!r}"
        )
    if not temperature >= 0:
        raise ValueError(f"temperature must be at least 0, got {temperature} in iteration {iteration}")
    return temperature


# --- transformers ------------------------------------------------------------------------------------------


class TransformersSampler:
    """Samples with `model.generate` from the model as it is now, where it is.

    The model's generation settings (a repetition penalty, say) do not apply: completions come from the policy's own
    distribution at the given temperature, cut by top_k and top_p only if asked for. For evaluation mode and the random
    number generators, everything is afterwards as it was.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int,
        *,
        top_k: int = 0,
        top_p: float = 1.0,
        batch_size: int = 32,
        eos_token_ids: Sequence[int] | None = None,
        stop: Sequence[str] = (),
        min_new_tokens: int = 0,
        progress: bool = False,
    ):
        """
        Args:
            model: the bare model (not wrapped for distributed training).
            max_new_tokens: most tokens of a completion, the end-of-sequence token included.
            tokenizer: the model's.
            top_k: sample from the top_k likeliest tokens only; 0 for all.
            top_p: sample from the likeliest tokens that together have this probability only; 1.0 for all.
            batch_size: completions generated at a time; prompts are sorted by length, so that batches pad little.
            eos_token_ids: tokens that end a completion; None for those that `larpo.data.endings` finds, () for none.
            stop: strings that end a completion, too.
            min_new_tokens: no completion ends before so many tokens; above 0, completions are not samples of the policy itself.
            progress: shows a bar.
        """
        if batch_size < 1:
            raise ValueError(f"expected batch_size >= 1, got {batch_size}")
        check_settings(max_new_tokens, top_k, top_p, stop, min_new_tokens)
        tokenizer = text_tokenizer(tokenizer)
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self.top_k, self.top_p, self.batch_size, self.progress = top_k, top_p, batch_size, progress
        self.min_new_tokens = min_new_tokens
        given = None if eos_token_ids is None else endings.Ending(tuple(eos_token_ids), tuple(stop))
        self.ending = given or endings.ending_of(tokenizer, model.generation_config, stop)

    def __call__(
        self, prompts: Sequence[Text], k: int, temperature: float, *, seed: int, template: Template = None
    ) -> list[list[Sampled]]:
        """See `Sampler`. Completions depend on the seed, the prompts together and batch_size."""
        import torch
        from tqdm import tqdm

        check_call(k, temperature)
        ids = all_prompt_tokens(self.tokenizer, prompts, template)
        # One row per completion. Longest first: a batch that does not fit in memory fails at once.
        rows = sorted((row for row in range(len(prompts)) for _ in range(k)), key=lambda row: -len(ids[row]))
        lists: list[list[Sampled]] = [[] for _ in prompts]
        device = self.model.device
        with (
            torch.no_grad(),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            _as_it_was(self.model, self._generation_config(temperature)),
            tqdm(total=len(rows), desc="sampling", unit="completion", disable=not self.progress) as bar,
        ):
            # Not torch.manual_seed: it seeds the devices of others too.
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                torch.cuda.default_generators[device.index].manual_seed(seed)
            for start in range(0, len(rows), self.batch_size):
                batch = rows[start : start + self.batch_size]
                for row, generated in zip(batch, self._generate([ids[row] for row in batch]), strict=True):
                    lists[row].append(self._sampled(*generated, ids[row]))
                bar.update(len(batch))
        return lists

    def _generation_config(self, temperature: float):
        from transformers import GenerationConfig

        greedy = temperature == 0
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens or None,
            do_sample=not greedy,
            temperature=None if greedy else temperature,
            top_k=None if greedy else self.top_k,
            top_p=None if greedy else self.top_p,
            eos_token_id=list(self.ending.token_ids) or None,
            pad_token_id=padding_id(self.tokenizer),
            use_cache=True,  # training may have turned it off
        )

    def _generate(self, ids: list[tuple[int, ...]]) -> list[tuple[list[int], int | None]]:
        """The new tokens of every row, with whatever follows the end of a row that ended early; and how many of them there are
        up to the end of a string that ends one."""
        import torch

        width = max(map(len, ids))
        inputs = torch.full((len(ids), width), padding_id(self.tokenizer))
        mask = torch.zeros((len(ids), width), dtype=torch.long)
        for row, one in enumerate(ids):  # padded on the left: the new tokens follow the prompt directly
            inputs[row, width - len(one) :] = torch.tensor(one)
            mask[row, width - len(one) :] = 1
        model = self.model
        inputs, mask = inputs.to(model.device), mask.to(model.device)
        at_strings = _StringEnds(self, width)
        ids_and_new = model.generate(
            input_ids=inputs,
            attention_mask=mask,
            generation_config=model.generation_config,  # given, or old settings in model.config would be an error
            stopping_criteria=[at_strings] if self.ending.strings else None,
            **prompts_once(model, ids, inputs, mask),
        )
        return [(new, at_strings.ends.get(row)) for row, new in enumerate(ids_and_new[:, width:].tolist())]

    def _sampled(self, generated: list[int], string_end: int | None, prompt_ids: tuple[int, ...]) -> Sampled:
        token_end = next((i + 1 for i, token in enumerate(generated) if token in self.ending.token_ids), None)
        end = min((one for one in (token_end, string_end) if one is not None), default=None)
        token_ids = tuple(generated[:end])
        text = self.text_of(token_ids)
        if end is not None and end == string_end:
            text = text[: self.ending.string_starts(self.text_of(token_ids[:-1]), text)]
        return Sampled(text=text, token_ids=token_ids, finished=end is not None, prompt_ids=prompt_ids)

    def text_of(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def prompts_once(model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], inputs: Any, mask: Any) -> dict[str, Any]:
    """Arguments for `generate` by which a prompt that stands in several rows is computed once: a cache of all its tokens but
    the last, copied to each of these rows. None where no prompt does, or the model's cache is of another kind.

    inputs, mask: [rows, width], padded on the left.
    """
    import torch
    from transformers.cache_utils import DynamicCache, DynamicLayer

    first = {prompt: row for row, prompt in reversed(list(enumerate(prompts)))}
    rows, width = sorted(first.values()), inputs.shape[1] - 1
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # of an adapter
    takes, cache = inspect.signature(base.forward).parameters, DynamicCache(config=model.config)
    whole = "past_key_values" in takes and all(type(layer) is DynamicLayer for layer in cache.layers)
    if len(rows) == len(prompts) or width == 0 or not whole:
        return {}
    known = mask[rows, :-1]
    own = {"position_ids": (known.cumsum(-1) - 1).clamp(min=0), "logits_to_keep": 1}
    own = {name: value for name, value in own.items() if name in takes}
    model(input_ids=inputs[rows, :-1], attention_mask=known, past_key_values=cache, use_cache=True, **own)
    if cache.get_seq_length() != width:
        return {}
    cache.batch_select_indices(torch.tensor([rows.index(first[prompt]) for prompt in prompts], device=inputs.device))
    return {"past_key_values": cache}


class _StringEnds:
    """Ends the rows in whose new tokens a string is complete that ends them, as a stopping criterion of `generate`.

    Not transformers' own: that one also looks into the prompt, where a string may have begun.
    """

    def __init__(self, sampler: TransformersSampler, width: int):
        self.sampler, self.width = sampler, width
        self.ends: dict[int, int] = {}  # row -> its new tokens at its end

    def __call__(self, input_ids: Any, scores: Any, **kwargs) -> Any:
        import torch

        count = input_ids.shape[1] - self.width
        if count > self.sampler.min_new_tokens:
            for row, last in enumerate(input_ids[:, self.width :][:, -self.sampler.ending.window :].tolist()):
                if row not in self.ends:
                    before, text = self.sampler.text_of(last[:-1]), self.sampler.text_of(last)
                    if self.sampler.ending.string_starts(before, text) is not None:
                        self.ends[row] = count
        return torch.tensor([row in self.ends for row in range(len(input_ids))], device=input_ids.device)


@contextmanager
def _as_it_was(model: PreTrainedModel, generation_config) -> Iterator[None]:
    """Evaluation mode and another generation config for a while. `generate` fills what a config leaves open from the
    model's own, so passing one as an argument would not be enough."""
    from .modeling.eval_mode import in_eval_mode

    # With adapters, the model inside has one too, and `generate` overwrites it with the outer one.
    own = {module: module.generation_config for module in model.modules() if "generation_config" in vars(module)}
    for module in own:
        module.generation_config = generation_config
    try:
        with in_eval_mode(model):
            yield
    finally:
        for module, config in own.items():
            module.generation_config = config


# --- vLLM --------------------------------------------------------------------------------------------------


class VLLMSampler:
    """Samples with a vLLM engine (`pip install vllm`): the same tokens in and out as `TransformersSampler`.

    The engine holds its own copy of the weights. After training, make a new sampler from the saved policy, or load
    the weights into `llm` by vLLM's own means.
    """

    def __init__(
        self,
        model: Any,
        max_new_tokens: int,
        *,
        top_k: int = 0,
        top_p: float = 1.0,
        eos_token_ids: Sequence[int] | None = None,
        stop: Sequence[str] = (),
        min_new_tokens: int = 0,
        progress: bool = False,
        **engine,
    ):
        """
        Args:
            model: a name or folder that `vllm.LLM(model=..., **engine)` loads, or a `vllm.LLM`.
            max_new_tokens: most tokens of a completion, the end-of-sequence token included.
            top_k: sample from the top_k likeliest tokens only; 0 for all.
            top_p: sample from the likeliest tokens that together have this probability only; 1.0 for all.
            eos_token_ids: tokens that end a completion; None for those that `larpo.data.endings` finds, () for none.
            stop: strings that end a completion, too.
            min_new_tokens: no completion ends before so many tokens; above 0, completions are not samples of the policy itself.
            progress: shows a bar.
            engine: keywords of `vllm.LLM`: tensor_parallel_size, gpu_memory_utilization, max_model_len, ...

        Raises:
            ImportError: vLLM is not installed.
        """
        check_settings(max_new_tokens, top_k, top_p, stop, min_new_tokens)
        try:
            import vllm
        except ImportError as error:
            raise ImportError("VLLMSampler needs vLLM; install it with: pip install vllm") from error
        self.llm = vllm.LLM(model=model, **engine) if isinstance(model, str) else model
        self.max_new_tokens, self.top_k, self.top_p, self.progress = max_new_tokens, top_k, top_p, progress
        self.eos_token_ids, self.stop, self.min_new_tokens = eos_token_ids, tuple(stop), min_new_tokens

    def __call__(
        self, prompts: Sequence[Text], k: int, temperature: float, *, seed: int, template: Template = None
    ) -> list[list[Sampled]]:
        """See `Sampler`. Completions depend on the seed and on the prompt's position."""
        from vllm import SamplingParams

        check_call(k, temperature)
        tokenizer = self.llm.get_tokenizer()
        ids = all_prompt_tokens(tokenizer, prompts, template)
        given = self.eos_token_ids is not None
        # The engine itself ends at what the model's settings name, unless it is told to ignore that.
        end_tokens = tuple(self.eos_token_ids) if given else endings.ending_of(tokenizer).token_ids
        # vLLM seeds the n completions of a request with seed, seed + 1, ...: far apart for every prompt.
        seeds = np.random.SeedSequence(seed).generate_state(len(prompts)).tolist()
        parameters = [
            SamplingParams(
                n=k,
                temperature=temperature,
                top_k=self.top_k or -1,  # -1 cuts nothing off
                top_p=self.top_p,
                max_tokens=self.max_new_tokens,
                min_tokens=self.min_new_tokens,
                stop=list(self.stop),
                stop_token_ids=list(end_tokens),
                ignore_eos=given,
                seed=one,
                logprobs=0,  # of the tokens that are sampled, and of no others
            )
            for one in seeds
        ]
        requests = self.llm.generate([{"prompt_token_ids": list(one)} for one in ids], parameters, use_tqdm=self.progress)
        return [
            [
                Sampled(
                    text=out.text,
                    token_ids=tuple(out.token_ids),
                    finished=out.finish_reason == "stop",
                    prompt_ids=one,
                    logps=tuple(at[token].logprob for at, token in zip(out.logprobs, out.token_ids, strict=True)),
                )
                for out in request.outputs
            ]
            for one, request in zip(ids, requests, strict=True)
        ]


# --- distinct completions ----------------------------------------------------------------------------------


class Distinct:
    """A sampler that asks another one again until every prompt has k completions with different tokens.

    After `tries` rounds it gives what there is: at low temperature fewer than k. The completions are no longer
    independent draws, so estimates that need those (Recall@N, KL, mean reward) want the plain sampler.
    """

    def __init__(self, sampler: Sampler, tries: int = 4):
        if tries < 1:
            raise ValueError(f"tries must be at least 1, got {tries}")
        self.sampler, self.tries = sampler, tries

    def __call__(
        self, prompts: Sequence[Text], k: int, temperature: float, *, seed: int, template: Template = None
    ) -> list[list[Sampled]]:
        """See `Sampler`. Rounds after the first only sample what is missing."""
        check_call(k, temperature)
        found: list[dict[tuple[int, ...], Sampled]] = [{} for _ in prompts]
        seeds = [seed, *np.random.SeedSequence(seed).generate_state(self.tries - 1).tolist()]
        for round_seed in seeds:
            missing = [row for row in range(len(prompts)) for _ in range(k - len(found[row]))]
            if not missing:
                break
            more = {} if template is None else {"template": [template[row] for row in missing]}
            drawn = self.sampler([prompts[row] for row in missing], 1, temperature, seed=round_seed, **more)
            for row, completions in zip(missing, drawn, strict=True):
                for completion in completions:
                    found[row].setdefault(completion.token_ids, completion)
        return [list(completions.values()) for completions in found]


def check_settings(max_new_tokens: int, top_k: int, top_p: float, stop: Sequence[str], min_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"expected max_new_tokens >= 1, got {max_new_tokens}")
    if not 0 <= min_new_tokens <= max_new_tokens:
        raise ValueError(f"min_new_tokens must be from 0 to max_new_tokens={max_new_tokens}, got {min_new_tokens}")
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"expected top_k >= 0 and 0 < top_p <= 1, got top_k={top_k}, top_p={top_p}")
    if isinstance(stop, str) or not all(isinstance(one, str) and one for one in stop):
        raise ValueError(f"stop must be strings that are not empty, got {stop!r}")


def check_call(k: int, temperature: float) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if not temperature >= 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if temperature == 0 and k > 1:
        raise ValueError(f"temperature 0 is greedy decoding: all {k} completions would be the same; expected k = 1")

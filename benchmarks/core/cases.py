"""Inputs of the benchmarks, by name and deterministic by seed.

| name | what it is |
|---|---|
| smollm2-openbookqa | SmolLM2-135M on the answers of 16 real lists of 4, padded on the right |
| smollm2-openbookqa-prompt | the same rows with their prompts kept and masked |
| smollm2-sampled | SmolLM2-135M on 24 answers it sampled itself: 6 lists of 4, logits as in training |
| smollm2-reviews | SmolLM2-135M on the first 64 tokens of 64 film reviews: 16 lists of 4, 4096 tokens that count |
| smollm2-news | the same of news |
| T2048-H896-V32000-m4 | made up: tokens, hidden, vocabulary, list size; logits of std 1, random labels |
| T2048-H896-V32000-m4-peaked | the same with logits of std 20 and labels drawn from their softmax |
| T2048-H896-V32000-m4-length16 | the same with candidates of 16 tokens, where 64 are usual |
| ...-masked0.5 | either, with the first half of each row masked as a prompt |

The real cases need the packages named in larpo/offline.py the first time; what was scored stays in its cache.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from larpo import offline

IGNORED = -100
OPENBOOKQA = ("smollm2-openbookqa", "smollm2-openbookqa-prompt")
SAMPLED = "smollm2-sampled"
DOCUMENTS = ("smollm2-reviews", "smollm2-news")
REAL = (*OPENBOOKQA, SAMPLED, *DOCUMENTS)
MADE_UP = re.compile(r"T(\d+)-H(\d+)-V(\d+)-m(\d+)(?:-length(\d+))?(-peaked)?(?:-masked(0\.\d+))?")

OPENBOOKQA_LISTS = 16
SAMPLED_PROMPTS = 6
SAMPLED_PER_PROMPT = 4
SAMPLED_NEW_TOKENS = 64  # at most
SHORT_PROMPT = 60  # characters, at most
DOCUMENT_LISTS = 16
DOCUMENT_TOKENS = 64  # of each document; what follows is not read
ANSWER_TOKENS = 64  # wanted length of a made-up candidate
PEAKED_STD = 20.0
REFERENCE_DISTANCE = 5.0  # nats between policy and reference per candidate: at beta 0.1, scores of about 0.5
SCORED_VERSION = 1  # in the names of cached files: a change to what is scored takes a new number
BLOCK_BYTES = 2**28  # largest temporary while a case is made


@dataclass(frozen=True, eq=False)
class Case:
    """One input of the linear head, and through `.logits` of the logits side.

    hidden[s, t] predicts labels[s, t]. Ignored places hold finite hidden states:
    the prompt's own, or zero for padding.
    """

    name: str
    hidden: Tensor  # [S, T, H]
    weight: Tensor  # [V, H], hidden's dtype
    labels: Tensor  # [S, T] int64, -100 where ignored
    relevance: Tensor  # [S] float32
    list_sizes: int
    ref_logps: Tensor  # [S] float32, nats
    note: str

    @cached_property
    def logits(self) -> Tensor:
        """[S, T, V] in hidden's dtype: accumulated in float32 or better, rounded once, on every machine."""
        return head_logits(self.hidden.flatten(0, 1), self.weight, self.hidden.dtype).view(*self.labels.shape, -1)

    @property
    def masked(self) -> float:
        """The share of the S * T places whose label is ignored."""
        return (self.labels == IGNORED).double().mean().item()


def build(
    name: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    *,
    progress: bool = True,
) -> Case:
    """Make the case called `name`; see this file's head for the names.

    The seed draws all that is not given: the answers of smollm2-sampled, everything in a made-up case, and
    in every case the reference's distance from the policy. On one machine equal arguments give equal tensors.
    Raises ValueError for an unknown name or sizes that don't fit, ImportError where real data is missing.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; expected a floating-point dtype")
    if name in REAL:
        return _real(name, dtype, device, seed, progress)
    if match := MADE_UP.fullmatch(name):
        return _made_up(name, match, dtype, device, seed)
    raise ValueError(
        f"name is {name!r}; expected one of {', '.join(REAL)} or T<tokens>-H<hidden>-V<vocabulary>"
        "-m<candidates>[-length<tokens>][-peaked][-masked<fraction>], such as T2048-H896-V32000-m4-peaked-masked0.5"
    )


def head_logits(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """hidden [N, H] times weight [V, H] transposed -> [N, V] in `dtype`, accumulated in float32 or better.

    Slices of the vocabulary are upcast one at a time: 16-bit matrix products are slow on many CPUs.
    """
    exact = torch.promote_types(hidden.dtype, torch.float32)
    hidden = hidden.to(exact)
    logits = hidden.new_empty(len(hidden), len(weight), dtype=dtype)
    rows = max(1, BLOCK_BYTES // (exact.itemsize * max(1, *hidden.shape)))
    for a in range(0, len(weight), rows):
        logits[:, a : a + rows] = hidden @ weight[a : a + rows].to(exact).T
    return logits


# --- real cases --------------------------------------------------------------------------------------------


def _real(name: str, dtype: torch.dtype, device: str | torch.device, seed: int, progress: bool) -> Case:
    offline.require("safetensors")
    from safetensors.torch import load_file, save_file

    def score(path: Path) -> None:
        model, tokenizer = offline.load_smollm2(progress=progress)
        if name in (SAMPLED, *DOCUMENTS):
            rows = _sampled_rows(model, tokenizer, seed, progress) if name == SAMPLED else _document_rows(name, tokenizer)
            relevance = torch.randn(len(rows), generator=torch.Generator().manual_seed(seed))
        else:
            rows, relevance = _openbookqa_rows(tokenizer)
        hidden, labels = hidden_states(model, rows, progress)
        logps = sequence_logps(hidden, model.get_output_embeddings().weight.detach(), labels)
        scored = {"hidden": hidden, "labels": labels, "relevance": relevance, "logps": logps}
        save_file(scored, path)

    file = OPENBOOKQA[0] if name in OPENBOOKQA else f"{name}-seed{seed}"
    folder = offline.cache_folder() / "cases"
    scored = load_file(offline.build_once(folder / f"{file}-v{SCORED_VERSION}.safetensors", score))
    hidden, labels = scored["hidden"], scored["labels"]
    if not name.endswith("-prompt"):
        hidden, labels = _answers_only(hidden, labels)
    return Case(
        name=name,
        hidden=hidden.to(device, dtype),
        weight=offline.smollm2_head(progress=progress).to(device, dtype),
        labels=labels.to(device),
        relevance=scored["relevance"].to(device),
        list_sizes=SAMPLED_PER_PROMPT if name == SAMPLED else 4,
        ref_logps=(scored["logps"] + reference_noise(len(labels), seed)).to(device),
        note=f"SmolLM2-135M-Instruct on {_NOTES[name]}",
    )


_NOTES = {
    **dict.fromkeys(OPENBOOKQA, f"the {OPENBOOKQA_LISTS} OpenBookQA lists with the longest options"),
    SAMPLED: "its own answers, sampled at temperature 1; random relevance",
    DOCUMENTS[0]: f"the first {DOCUMENT_TOKENS} tokens of {4 * DOCUMENT_LISTS} film reviews; random relevance",
    DOCUMENTS[1]: f"the first {DOCUMENT_TOKENS} tokens of {4 * DOCUMENT_LISTS} news articles; random relevance",
}


Row = tuple[list[int], list[int]]  # token ids of a prompt, token ids of one of its answers


def _openbookqa_rows(tokenizer) -> tuple[list[Row], Tensor]:
    """The lists with the longest options, the end of text after each option; and the relevance [S]."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    # Trainers batch by length. In file order, two thirds of the places would be padding.
    lists = sorted(offline.openbookqa(), key=lambda one: -max(len(ids(option)) for option in one.completions))
    lists = lists[:OPENBOOKQA_LISTS]
    rows = [(ids(one.prompt), [*ids(option), tokenizer.eos_token_id]) for one in lists for option in one.completions]
    return rows, torch.tensor([score for one in lists for score in one.scores])


def _document_rows(name: str, tokenizer) -> list[Row]:
    """The beginnings of documents; the first token is the prompt."""
    if name == "smollm2-reviews":
        texts = offline.imdb_reviews()[0]
    else:
        texts = [row["document"].replace("\n", " ") for row in offline.json_lines("data/XSum/test.jsonl")]
    tokens = (tokenizer(text, add_special_tokens=False).input_ids for text in texts)
    long = [ids[: DOCUMENT_TOKENS + 1] for ids in tokens if len(ids) > DOCUMENT_TOKENS]
    return [(ids[:1], ids[1:]) for ids in long[: 4 * DOCUMENT_LISTS]]


@torch.no_grad()
def _sampled_rows(model, tokenizer, seed: int, progress: bool) -> list[Row]:
    """Answers of the model itself to the first short questions, asked through its chat template."""
    from tqdm import tqdm
    from transformers import LogitsProcessorList

    questions = [one.prompt for one in offline.openbookqa() if len(one.prompt) <= SHORT_PROMPT]
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False)
        for question in questions[:SAMPLED_PROMPTS]
    ]
    prompts = tokenizer(chats, add_special_tokens=False).input_ids
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")  # on the left
    with (
        torch.random.fork_rng(devices=[]),
        tqdm(total=SAMPLED_NEW_TOKENS, desc="sampling answers (once)", unit="token", disable=not progress) as bar,
    ):

        def tick(_, scores):
            bar.update()
            return scores

        torch.manual_seed(seed)
        texts = model.generate(
            **batch,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=SAMPLED_PER_PROMPT,
            max_new_tokens=SAMPLED_NEW_TOKENS,
            logits_processor=LogitsProcessorList([tick]),
        )
    rows = []
    for i, answer in enumerate(texts[:, batch["input_ids"].shape[1] :].tolist()):
        if tokenizer.eos_token_id in answer:  # the rest is padding
            answer = answer[: answer.index(tokenizer.eos_token_id) + 1]
        rows.append((prompts[i // SAMPLED_PER_PROMPT], answer))
    return rows


@torch.no_grad()
def hidden_states(model, rows: list[Row], progress: bool, batch_size: int = 16) -> tuple[Tensor, Tensor]:
    """hidden [S, T, H] float32 after the final norm, and labels [S, T] aligned with it; right-padded."""
    from tqdm import tqdm

    longest = max(len(prompt) + len(answer) for prompt, answer in rows) - 1  # the last token predicts nothing
    hidden = torch.zeros(len(rows), longest, model.config.hidden_size)
    labels = torch.full((len(rows), longest), IGNORED)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    real = torch.zeros(len(rows), longest, dtype=torch.bool)
    for s, (prompt, answer) in enumerate(rows):
        n = len(prompt) + len(answer) - 1
        ids[s, :n] = torch.tensor((prompt + answer)[:-1])
        real[s, :n] = True
        labels[s, len(prompt) - 1 : n] = torch.tensor(answer)
    starts = range(0, len(rows), batch_size)
    for a in tqdm(starts, desc="scoring answers (once)", unit="batch", disable=not progress):
        batch = slice(a, a + batch_size)
        states = model.base_model(input_ids=ids[batch], attention_mask=real[batch].long()).last_hidden_state
        hidden[batch] = states * real[batch, :, None]
    return hidden, labels


def _answers_only(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the ignored places and pad on the right again: [S, T, H], [S, T] with T the longest answer."""
    answer = labels != IGNORED
    longest = int(answer.sum(1).max())
    first = (~answer).long().argsort(dim=1, stable=True)[:, :longest]  # answer places first, in order
    kept = answer.gather(1, first)
    return hidden.take_along_dim(first[..., None], 1) * kept[..., None], labels.gather(1, first)


def sequence_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """[S] float32: log-likelihood of each answer, only over its own tokens."""
    logps = torch.zeros(labels.shape)
    answer = labels != IGNORED
    logps[answer] = -torch.nn.functional.cross_entropy(
        head_logits(hidden[answer], weight, torch.float32), labels[answer], reduction="none"
    )
    return logps.sum(1)


# --- made-up cases -----------------------------------------------------------------------------------------


def _made_up(name: str, sizes: re.Match, dtype: torch.dtype, device: str | torch.device, seed: int) -> Case:
    tokens, width, vocabulary, m = map(int, sizes.groups()[:4])
    peaked, prompt_share = bool(sizes[6]), float(sizes[7] or 0)
    if not (tokens and width and vocabulary and m) or tokens % m:
        raise ValueError(f"name is {name!r}; expected sizes of at least 1, and tokens T to be a multiple of m")
    length = int(sizes[5] or _nearest_divisor(tokens // m, ANSWER_TOKENS))
    if not length or tokens % (m * length):
        raise ValueError(f"name is {name!r}; expected tokens T to be a multiple of m times the candidates' length {length}")
    candidates = tokens // length
    prompt = round(prompt_share * length)
    if prompt == length:
        raise ValueError(f"name is {name!r}; expected a masked share that leaves some of each row's {length} tokens")
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, std: float) -> Tensor:
        """[rows, H] in dtype, drawn block by block in float32: every dtype gets the same values, rounded."""
        out = torch.empty(rows, width, dtype=dtype, device=device)
        for block in out.split(max(1, BLOCK_BYTES // (4 * width))):
            block.copy_(torch.randn(block.shape, generator=generator, device=device) * std)
        return out

    hidden = normal(tokens, 1.0)
    weight = normal(vocabulary, (PEAKED_STD if peaked else 1.0) / math.sqrt(width))
    if peaked:
        labels = _draw_labels(hidden, weight, generator)
        usual_logp = 0.0
    else:
        labels = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
        usual_logp = -math.log(vocabulary) - 0.5  # the mean of exp(z) is exp(1/2)
    labels = labels.view(candidates, length)
    labels[:, :prompt] = IGNORED
    return Case(
        name=name,
        hidden=hidden.view(candidates, length, width),
        weight=weight,
        labels=labels,
        relevance=torch.randn(candidates, generator=generator, device=device),
        list_sizes=m,
        ref_logps=usual_logp * (length - prompt) + reference_noise(candidates, seed).to(device),
        note=f"made up: {'peaked' if peaked else 'initialisation-like'} logits, {candidates} candidates of {length} tokens",
    )


def _nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` whose ratio to `wanted` is closest to 1."""
    divisors = (d for d in range(1, number + 1) if number % d == 0)
    return min(divisors, key=lambda d: abs(math.log(d / wanted)))


def _draw_labels(hidden: Tensor, weight: Tensor, generator: torch.Generator) -> Tensor:
    """[N] int64: one label per token from softmax(hidden @ weight.T), with one uniform number each."""
    labels = []
    for block in hidden.split(max(1, BLOCK_BYTES // (4 * len(weight)))):
        cumulated = head_logits(block, weight, torch.float32).softmax(-1).cumsum_(-1)
        uniform = torch.rand(len(block), 1, generator=generator, device=hidden.device)
        # Rounding lets the sum end beside 1, and the draw on the sum itself: no label past the last one.
        label = torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True)
        labels.append(label.clamp_max(len(weight) - 1).squeeze(1))
    return torch.cat(labels)


def reference_noise(candidates: int, seed: int) -> Tensor:
    """[S] float32, nats. Drawn apart from the rest, so that every device has the same."""
    return REFERENCE_DISTANCE * torch.randn(candidates, generator=torch.Generator().manual_seed(seed + 1))

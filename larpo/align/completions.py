"""Completions of a run: drawn from a policy, given their log-likelihoods, and scored. All of it in chunks that are kept."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import rewards
from ..candidates import Candidate, PromptList
from ..data.chat_template import template_keywords
from ..runs.files import Rows, plain
from .prompts import Prompt
from .run_state import Run

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Draw:
    """Which completions are drawn for each prompt.

    policy: the iteration after which the policy stands; 0 is the initial model.
    seed: what the draw is for, as numbers (see `Run.seed`); source: the same in words, for each candidate.
    chunks: the folder in which parts of it are kept until all of it is written.
    to_train_on: with the run's top_k, top_p, min_new_tokens and distinct. Without them the completions are independent draws
        from the policy itself, on which means, KL and Recall@N are defined.
    """

    policy: int
    k: int
    temperature: float
    seed: tuple[int, ...]
    source: str
    chunks: Path
    to_train_on: bool = False


def draw(run: Run, prompts: Sequence[Prompt], wanted: Draw) -> Rows:
    """A row per prompt with its k completions and their tokens, `finished` (whether each ended by itself) and `weights` (which
    policy they are from). Another engine than the trainer's adds its log-likelihoods, and whether it had the very same tokens.
    """
    progress = run.progress and run.samplers.in_one_go
    options = {"to_train_on": wanted.to_train_on, "kept": wanted.chunks / "answers.jsonl", "progress": progress}
    sampler = functools.cache(lambda: run.samplers.of(wanted.policy, **options))  # not loaded where no chunk is missing

    def work(chunk: int, part: Sequence[Prompt]) -> Rows:
        texts = [row["prompt"] for row in part]
        keywords = [template_keywords(row) for row in part]
        template = {"template": keywords} if any(keywords) else {}
        sampled = sampler()(texts, wanted.k, wanted.temperature, seed=run.seed(*wanted.seed, chunk), **template)
        rows = []
        for prompt, completions in zip(texts, sampled, strict=True):
            candidates = (Candidate(_answer(prompt, c.text), None, wanted.source, c.token_ids) for c in completions)
            one = PromptList(prompt, tuple(candidates), prompt_ids=completions[0].prompt_ids)
            known = {"finished": [c.finished for c in completions]} | run.samplers.known_of(wanted.policy, completions)
            rows.append(one.to_row() | known)
        return rows

    rows = run.in_chunks(wanted.chunks, prompts, wanted.k, work, "sampling", in_one_go=run.samplers.in_one_go)
    sampler.cache_clear()
    run.samplers.release()
    return rows


def with_logps(run: Run, policy: str, rows: Rows, k: int, chunks: Path, column: str = "logps") -> Rows:
    """The rows with the log-likelihoods of their exact tokens under a policy: sums, nats, one per candidate."""

    def work(_: int, part: Rows) -> Rows:
        return [{"logps": logps} for logps in _logps(run, policy, part)]

    found = run.in_chunks(chunks, rows, k, work, "log-likelihoods")
    return [row | {column: one["logps"]} for row, one in zip(rows, found, strict=True)]


def _logps(run: Run, policy: str, rows: Rows) -> list[list[float]]:
    from ..scoring import score_lists

    model = run.models.load(policy)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*completions? empty")  # a policy may end at once
        scored = score_lists(
            model,
            as_data(rows),
            run.models.tokenizer,
            batch_size=max(1, run.config.sample_batch_size // run.config.k),
            max_length=None,
            max_prompt_length=None,
            progress=False,
        )
    return scored["logps"][:]


def as_data(rows: Rows, *columns: str) -> Dataset:
    """Rows of a run as candidate lists, with the exact tokens and these columns."""
    from ..data.loading import as_lists

    found = [
        {"prompt": plain(row["prompt"]), "completions": [plain(one) for one in row["completions"]]}
        | {name: row[name] for name in ("prompt_ids", "completion_ids", *columns)}
        for row in rows
    ]
    return as_lists(found, scored="scores" in columns)


def _answer(prompt: rewards.Text, text: str) -> rewards.Text:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def with_scores(run: Run, rows: Rows, prompts: Sequence[Prompt], k: int, chunks: Path, *, to_train_on: bool = False) -> Rows:
    """The rows with `rewards`, the value of each reward for each completion, and `scores`, their weighted sum.

    to_train_on: with truncated: exclude, no reward is asked about completions without an end.
    """
    cut_too = not to_train_on or run.config.truncated != "exclude"
    names = dict.fromkeys(name for prompt in prompts for name in prompt if name != "prompt")

    def work(_: int, part: Sequence[tuple[dict[str, Any], Prompt]]) -> Rows:
        asked = [(row, prompt, i) for row, prompt in part for i, ended in enumerate(row["finished"]) if cut_too or ended]
        columns = {name: [prompt.get(name) for _, prompt, _ in asked] for name in names}
        columns["completion_ids"] = [row["completion_ids"][i] for row, _, i in asked]
        said = rewards.judged(
            run.rewards,
            [plain(row["prompt"]) for row, *_ in asked],
            [plain(row["completions"][i]) for row, _, i in asked],
            columns,
            on_error=run.config.on_reward_error,
            memory=run.memory,
        )
        values = zip(rewards.combined(said, run.config.reward_weights), zip(*said, strict=True), strict=True)
        nothing = None, (None,) * len(run.rewards)
        found = [[next(values) if cut_too or ended else nothing for ended in row["finished"]] for row, _ in part]
        return [
            row | {"scores": [score for score, _ in one], "rewards": [list(each) for _, each in one]}
            for (row, _), one in zip(part, found, strict=True)
        ]

    return run.in_chunks(chunks, list(zip(rows, prompts, strict=True)), k, work, "scoring")

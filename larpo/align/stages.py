"""The five stages of an iteration. Each is a function of a run and the iteration's number (from 1) that reads the files of
the stages before it, writes its own, and returns the counts that a reader wants to know. `larpo.align.run_folder` lists
the files.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import candidates as lists_of
from .. import rewards
from ..candidates import Candidate, PromptList, from_rows, to_rows
from ..data.chat_template import template_keywords
from ..runs.divergence import remembered
from ..runs.files import Rows, in_chunks, plain, read_json, read_rows, remove, rows_once, write_rows
from ..runs.ranks import ALONE, Ranks
from . import evaluation, other_engine, training
from .config import AlignConfig
from .models import Models
from .prompts import Prompt, after_iteration, of_iteration
from .run_folder import RunFolder
from .samplers import Samplers
from .scores import to_train_by

SAMPLE, EVALUATE, NEGATIVES = 1, 2, 3  # what a seed is for; 0 is training


@dataclass
class Run:
    """What every stage works with."""

    config: AlignConfig
    folder: RunFolder
    models: Models
    rewards: Sequence[rewards.Reward]
    prompts: list[Prompt]
    held_out: list[Prompt]
    progress: bool = True  # of the first process only
    ranks: Ranks = ALONE
    memory: rewards.Memory | None = None  # what was asked before
    samplers: Samplers = field(init=False)

    def __post_init__(self):
        self.samplers = Samplers(self.config, self.models, self.folder)

    def seed(self, *purpose: int) -> int:
        """A seed that depends on the run's seed and on nothing but the purpose."""
        return int(np.random.SeedSequence([self.config.seed, *purpose]).generate_state(1)[0])

    def policy(self, iteration: int) -> str:
        """Name or folder of the policy after an iteration; after iteration 0 it is the initial model."""
        return self.samplers.policy(iteration)

    def of_iteration(self, iteration: int) -> list[Prompt]:
        return of_iteration(self.prompts, self.config.prompts_per_iteration, iteration, self._further(iteration))

    def after_iteration(self, iteration: int) -> list[Prompt]:
        return after_iteration(self.prompts, self.config.prompts_per_iteration, iteration, self._further(iteration))

    def _further(self, iteration: int) -> int:
        """Prompts that earlier iterations were refilled with."""
        if not self.config.refill:
            return 0
        return sum(done(self.folder.iteration(i), "refill")["prompts"] for i in range(1, iteration))

    def rows(self, path: Path) -> Rows:
        return self.ranks.first(lambda: read_rows(path))

    def rows_once(self, path: Path, build: Callable[[], Rows]) -> Rows:
        return rows_once(path, build, self.ranks)

    def in_chunks(
        self, folder: Path, items: Sequence, k: int, work: Callable[[int, Sequence], Rows], said: str, in_one_go: bool = False
    ) -> Rows:
        """Of prompts with k completions each; `said` is what a bar says is done with them.

        in_one_go: one process does them all, and shows how far it is.
        """
        size = len(items) if in_one_go else self.config.prompts_of_a_chunk(k)
        return in_chunks(folder, items, size, work, self.ranks, description=said, bar=self.progress and not in_one_go)

    def remove(self, path: Path) -> None:
        self.ranks.first(lambda: remove(path))


# --- sample ------------------------------------------------------------------------------------------------


def sample(run: Run, iteration: int) -> dict[str, Any]:
    """k completions per prompt from the policy at the start of the iteration, at the iteration's temperature."""
    folder, temperature = run.folder.iteration(iteration), run.config.temperature(iteration)
    chunks = folder / "sample-chunks"

    def build() -> Rows:
        return draw(
            run, iteration - 1, run.of_iteration(iteration), run.config.k, temperature,
            seed=(SAMPLE, iteration), source=f"iteration {iteration}", chunks=chunks, to_train_on=True,
        )  # fmt: skip

    rows = run.rows_once(folder / "sampled.parquet", build)
    run.remove(chunks)
    lengths = [len(ids) for row in rows for ids in row["completion_ids"]]
    return {
        "temperature": temperature,
        "prompts": len(rows),
        "candidates": len(lengths),
        "duplicates": lists_of.deduplicate(from_rows(rows))[1],
        "ended_by_themselves": float(np.mean([flag for row in rows for flag in row["finished"]])),
        "tokens_per_candidate": float(np.mean(lengths)),
        **run.ranks.first(lambda: _of_another_engine(run, iteration, rows)),
    }


def _of_another_engine(run: Run, iteration: int, rows: Rows) -> dict[str, Any]:
    """Counts of completions that are not the trainer's own: see `larpo.align.other_engine`."""
    if run.config.sampler == "transformers":
        return {}
    pad = run.models.tokenizer.pad_token_id or 0
    limits = {"tolerance": run.config.logps_tolerance, "temperature": run.config.temperature(iteration)}
    apart = other_engine.gap(
        lambda: run.models.load(run.policy(iteration - 1)), rows[: run.config.compared_prompts], pad, **limits
    )
    return {"weights": rows[0].get("weights")} | other_engine.counts_of_tokens(rows) | apart


def draw(
    run: Run,
    policy: int,
    prompts: Sequence[Prompt],
    k: int,
    temperature: float,
    *,
    seed: tuple[int, ...],
    source: str,
    chunks: Path,
    to_train_on: bool = False,
) -> Rows:
    """Rows of k completions per prompt with their tokens, `finished` (ended by themselves) and the `weights` that they are of;
    from another engine than the trainer's also its log-likelihoods, and whether the tokens are the very ones.

    policy: that after which iteration.
    to_train_on: with the run's top_k, top_p, min_new_tokens and distinct. Without, they are independent draws from the policy
    itself, which is what means, KL and Recall@N are defined on.
    """
    progress = run.progress and run.samplers.in_one_go
    options = {"to_train_on": to_train_on, "kept": chunks / "answers.jsonl", "progress": progress}
    sampler = functools.cache(lambda: run.samplers.of(policy, **options))  # not loaded where no chunk is missing

    def work(chunk: int, part: Sequence[Prompt]) -> Rows:
        texts = [row["prompt"] for row in part]
        keywords = [template_keywords(row) for row in part]
        template = {"template": keywords} if any(keywords) else {}
        sampled = sampler()(texts, k, temperature, seed=run.seed(*seed, chunk), **template)
        rows = []
        for prompt, completions in zip(texts, sampled, strict=True):
            found = (Candidate(_answer(prompt, c.text), source=source, completion_ids=c.token_ids) for c in completions)
            one = PromptList(prompt, tuple(found), prompt_ids=completions[0].prompt_ids)
            known = {"finished": [c.finished for c in completions]} | run.samplers.known_of(policy, completions)
            rows.append(one.to_row() | known)
        return rows

    rows = run.in_chunks(chunks, prompts, k, work, "sampling", in_one_go=run.samplers.in_one_go)
    sampler.cache_clear()
    run.samplers.release()
    return rows


def logps_under(run: Run, policy: str, rows: Rows, k: int, chunks: Path) -> list[list[float]]:
    """Log-likelihoods of the rows' exact tokens under a policy: sums, nats, one per candidate."""

    def work(_: int, part: Rows) -> Rows:
        return [{"logps": logps} for logps in _logps_under(run, policy, part)]

    return [row["logps"] for row in run.in_chunks(chunks, rows, k, work, "log-likelihoods")]


def _logps_under(run: Run, policy: str, rows: Rows) -> list[list[float]]:
    from ..data.loading import as_lists
    from ..scoring import score_lists

    tokens = [{name: row[name] for name in ("prompt_ids", "completion_ids")} for row in rows]
    texts = [{"prompt": plain(row["prompt"]), "completions": [plain(one) for one in row["completions"]]} for row in rows]
    model = run.models.load(policy)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*completions? empty")  # a policy may end at once
        scored = score_lists(
            model,
            as_lists([a | b for a, b in zip(texts, tokens, strict=True)], scored=False),
            run.models.tokenizer,
            batch_size=max(1, run.config.sample_batch_size // run.config.k),
            max_length=None,
            max_prompt_length=None,
            progress=False,
        )
    return scored["logps"][:]


def _answer(prompt: rewards.Text, text: str) -> rewards.Text:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


# --- score -------------------------------------------------------------------------------------------------


def score(run: Run, iteration: int) -> dict[str, Any]:
    """The reward of every candidate; None where no reward has an opinion, or, with truncated exclude, where it has no end."""
    folder = run.folder.iteration(iteration)
    chunks = folder / "score-chunks"

    def build() -> Rows:
        return _scored(run, run.rows(folder / "sampled.parquet"), run.of_iteration(iteration), chunks)

    rows = run.rows_once(folder / "candidates.parquet", build)
    run.remove(chunks)
    found = [score for row in rows for score in row["scores"] if score is not None]
    return {
        "unscored": sum(len(row["scores"]) for row in rows) - len(found),
        "reward": float(np.mean(found)) if found else None,
        "reward_spread_in_a_list": _mean_spread(rows),
        "truncated": sum(not ended for row in rows for ended in row["finished"]),
        "lists_without_order": len(rows) - _with_order(run, rows),
    }


def _scored(run: Run, rows: Rows, prompts: Sequence[Prompt], chunks: Path) -> Rows:
    """Candidates to train on with their scores."""
    return with_scores(run, rows, prompts, run.config.k, chunks, cut_too=run.config.truncated != "exclude")


def _with_order(run: Run, rows: Rows) -> int:
    """How many of these lists have two candidates of different scores."""
    distinct, _ = lists_of.deduplicate(from_rows(to_train_by(run.config, rows)))
    return len(lists_of.drop_uninformative(distinct).kept)


def with_scores(run: Run, rows: Rows, prompts: Sequence[Prompt], k: int, chunks: Path, *, cut_too: bool = True) -> Rows:
    """The rows with `rewards`, what each reward says of each completion, and `scores`, their weighted sum.

    cut_too: ask of completions without an end as well; else no reward has an opinion on them.
    """
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


def _mean_spread(rows: Rows) -> float | None:
    scored = [[score for score in row["scores"] if score is not None] for row in rows]
    spreads = [float(np.std(scores)) for scores in scored if len(scores) > 1]
    return float(np.mean(spreads)) if spreads else None


# --- refill ------------------------------------------------------------------------------------------------


def refill(run: Run, iteration: int) -> dict[str, Any]:
    """Candidates of the prompts that come next, in place of those whose candidates all have one score: as many as lists are
    missing, and again, until the iteration has its number of lists with an order, or after refill_most rounds."""
    folder, config = run.folder.iteration(iteration), run.config
    own = run.rows(folder / "candidates.parquet")
    chunks = folder / "refill-chunks"

    def build() -> Rows:
        found, prompts = [], run.after_iteration(iteration)
        for number in range(1, config.refill_most + 1):
            part = prompts[: len(own) - _with_order(run, own + found)]
            if not part:
                break
            prompts = prompts[len(part) :]
            drawn = draw(
                run, iteration - 1, part, config.k, config.temperature(iteration), seed=(SAMPLE, iteration, number),
                source=f"iteration {iteration}", chunks=chunks / f"sampled-{number}", to_train_on=True,
            )  # fmt: skip
            found += [row | {"round": number} for row in _scored(run, drawn, part, chunks / f"scored-{number}")]
        return found

    rows = run.rows_once(folder / "refilled.parquet", build)
    run.remove(chunks)
    return {
        "rounds": max((row["round"] for row in rows), default=0),
        "prompts": len(rows),
        "candidates": sum(len(row["completions"]) for row in rows),
        "lists_with_order": _with_order(run, own + rows),
    }


# --- lists -------------------------------------------------------------------------------------------------


def lists(run: Run, iteration: int) -> dict[str, Any]:
    """What is trained on: earlier candidates merged in, duplicates and candidates without a score dropped, negatives and the
    subset chosen, lists without an order left out."""
    folder = run.folder.iteration(iteration)
    old, new = _candidates(run, iteration)
    pool, duplicates = lists_of.memorise(old, new) if old else lists_of.deduplicate(new)
    pool, unscored = lists_of.rank(pool)
    chosen = _choose(run, iteration, [one for one in pool if one.candidates])
    kept, tied, short = lists_of.drop_uninformative(chosen)
    run.ranks.first(lambda: write_rows(folder / "lists.parquet", to_rows(kept)))
    run.remove(folder / "negatives-chunks")
    return {
        "memorised_candidates": sum(len(one.candidates) for one in old),
        "duplicates": duplicates,
        "unscored": unscored,
        "pool_per_prompt": float(np.mean([len(one.candidates) for one in pool])),
        "tied_lists": len(tied),
        "short_lists": len(short) + sum(not one.candidates for one in pool),
        "lists": len(kept),
        "candidates": sum(len(one.candidates) for one in kept),
        "sizes": {str(size): n for size, n in sorted(Counter(len(one.candidates) for one in kept).items())},
        "sources": dict(sorted(Counter(c.source for one in kept for c in one.candidates).items())),
    }


def _candidates(run: Run, iteration: int) -> tuple[list[PromptList], list[PromptList]]:
    """Those of earlier iterations that are remembered, and those of this one, by the scores that lists are trained by."""
    first = {"none": iteration, "previous": max(1, iteration - 1), "all": 1}[run.config.memory]
    files = ("candidates.parquet", "refilled.parquet") if run.config.refill else ("candidates.parquet",)
    parts = [[row for file in files for row in run.rows(run.folder.iteration(i) / file)] for i in range(first, iteration + 1)]
    lists = from_rows(to_train_by(run.config, [row for part in parts for row in part]))
    return lists[: -len(parts[-1])], lists[-len(parts[-1]) :]


def _choose(run: Run, iteration: int, pool: list[PromptList]) -> list[PromptList]:
    """The subset of every ranked list, by `negatives` and `subset`."""
    top, bottom = run.config.top_and_bottom()
    wanted = bottom if bottom is not None else max(1, run.config.k - top)
    if run.config.negatives == "hard":
        rows = to_rows(pool)
        chunks = run.folder.iteration(iteration) / "negatives-chunks"
        logps = logps_under(run, run.policy(iteration - 1), rows, run.config.k, chunks)
        likely = [row | {"logps": found} for row, found in zip(rows, logps, strict=True)]
        return lists_of.hard_negatives(from_rows(likely), top=top, negatives=wanted)
    if run.config.negatives == "related":  # added negatives rank below all others, so the bottom is made of them
        pool, _ = lists_of.negatives_of_related_prompt(pool, wanted)
    elif run.config.negatives == "random":
        pool, _ = lists_of.random_negatives(pool, wanted, seed=run.seed(NEGATIVES, iteration))
    if run.config.negatives in ("related", "random"):
        bottom = wanted
    return lists_of.top_bottom(pool, top, bottom)


# --- train -------------------------------------------------------------------------------------------------


def train(run: Run, iteration: int) -> dict[str, Any]:
    """LarPOTrainer on the lists, from the policy at the start of the iteration; see `larpo.align.training`."""
    folder, model = run.folder.iteration(iteration), run.folder.model(iteration)
    rows = run.rows(folder / "lists.parquet")
    if not run.ranks.first(model.exists):
        with (
            remembered(folder, {}, run.ranks),
            run.ranks.said_once(),
        ):  # a run's folder has the run's settings: what diverged was this
            run.ranks.together(
                lambda: training.train(
                    run.config, rows, run.models,
                    policy=run.policy(iteration - 1), model=model, checkpoints=folder / "checkpoints",
                    seed=run.seed(0, iteration), progress=run.progress, ranks=run.ranks,
                )
            )  # fmt: skip
        run.models.forget()
    run.remove(folder / "checkpoints")
    return run.ranks.first(lambda: training.report(model))


# --- evaluate ----------------------------------------------------------------------------------------------


def evaluate(run: Run, iteration: int) -> dict[str, Any]:
    """The policy after an iteration (0: the initial model) on the held-out prompts: completions at every temperature, their
    rewards, and at temperature 1 their log-likelihoods under this policy and the initial model."""
    folder = run.folder.iteration(iteration)
    chunks = folder / "evaluation-chunks"
    rows = run.rows_once(folder / "evaluation.parquet", lambda: _held_out_rows(run, iteration, chunks))
    run.remove(chunks)
    start = rows if iteration == 0 else run.rows(run.folder.iteration(0) / "evaluation.parquet")
    return evaluation.metrics(rows, start, run.config)


def _held_out_rows(run: Run, iteration: int, chunks: Path) -> Rows:
    config, policy, initial = run.config, run.policy(iteration), run.policy(0)
    rows: Rows = []
    for i, temperature in enumerate(config.eval_temperatures):
        drawn = draw(
            run, iteration, run.held_out, config.eval_k, temperature,
            seed=(EVALUATE, i), source=run.folder.iteration(iteration).name, chunks=chunks / f"sampled-{i}",
        )  # fmt: skip
        scored = with_scores(run, drawn, run.held_out, config.eval_k, chunks / f"scored-{i}")
        rows += [row | {"temperature": float(temperature)} for row in scored]

    at_one = [row for row in rows if row["temperature"] == 1.0]
    for name, model in (("logps", policy), ("initial_logps", initial)):
        kept = chunks / ("logps" if model == policy else name)
        for row, logps in zip(at_one, logps_under(run, model, at_one, config.eval_k, kept), strict=True):
            row[name] = logps
    return [{"logps": None, "initial_logps": None} | row for row in rows]


def clean_up(run: Run, iteration: int) -> None:
    """After an iteration is evaluated: with keep_models last, the policy of the iteration before goes."""
    if run.config.keep_models == "last" and iteration > 1:
        run.remove(run.folder.model(iteration - 1))


def done(folder: Path, stage: str) -> dict[str, Any] | None:
    """The counts of a stage that is done, or None."""
    file = folder / f"{stage}.json"
    return read_json(file) if file.exists() else None

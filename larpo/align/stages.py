"""The stages of an iteration.

Each is a function of a run and the iteration's number (from 1) that reads the files of the stages before it, writes its own,
and returns the counts that a reader wants to know. `larpo.align.run_folder` lists the files.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from .. import candidates as candidate_lists
from ..candidates import PromptList, from_rows, to_rows
from ..runs.files import Rows, write_rows
from ..training.divergence import remembered
from . import evaluation, other_engine, training
from .completions import Draw, draw, with_logps, with_scores
from .run_state import Run
from .scores import to_train_by

SAMPLE, EVALUATE, NEGATIVES = 1, 2, 3  # what a seed is for; 0 is training


# --- sample ------------------------------------------------------------------------------------------------


def sample(run: Run, iteration: int) -> dict[str, Any]:
    """k completions per prompt from the policy at the start of the iteration, at the iteration's temperature."""
    wanted = _to_train_on(run, iteration, (SAMPLE, iteration), run.folder.chunks(iteration, "sample"))
    path = run.folder.iteration(iteration) / "sampled.parquet"
    rows = run.rows_once(path, lambda: draw(run, run.of_iteration(iteration)[0], wanted))
    run.remove(wanted.chunks)
    lengths = [len(ids) for row in rows for ids in row["completion_ids"]]
    return {
        "temperature": wanted.temperature,
        "prompts": len(rows),
        "candidates": len(lengths),
        "duplicates": candidate_lists.deduplicate(from_rows(rows))[1],
        "ended_by_themselves": float(np.mean([flag for row in rows for flag in row["finished"]])),
        "tokens_per_candidate": float(np.mean(lengths)),
        **run.ranks.first(lambda: _of_another_engine(run, iteration, rows)),
    }


def _to_train_on(run: Run, iteration: int, seed: tuple[int, ...], chunks: Path) -> Draw:
    """The completions that an iteration trains on: of the policy before it."""
    k, temperature = run.config.k, run.config.temperature(iteration)
    return Draw(iteration - 1, k, temperature, seed, f"iteration {iteration}", chunks, to_train_on=True)


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


# --- score -------------------------------------------------------------------------------------------------


def score(run: Run, iteration: int) -> dict[str, Any]:
    """The reward of every candidate; None where no reward has an opinion, or, with truncated exclude, where it has no end."""
    folder, chunks = run.folder.iteration(iteration), run.folder.chunks(iteration, "score")

    def build() -> Rows:
        sampled, (prompts, _) = run.rows(folder / "sampled.parquet"), run.of_iteration(iteration)
        return with_scores(run, sampled, prompts, run.config.k, chunks, to_train_on=True)

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


def _with_order(run: Run, rows: Rows) -> int:
    """How many of these lists have two candidates of different scores."""
    distinct, _ = candidate_lists.deduplicate(from_rows(to_train_by(run.config, rows)))
    return len(candidate_lists.drop_uninformative(distinct).kept)


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
    chunks = run.folder.chunks(iteration, "refill")

    def build() -> Rows:
        found, (_, prompts) = [], run.of_iteration(iteration)
        for number in range(1, config.refill_most + 1):
            part = prompts[: len(own) - _with_order(run, own + found)]
            if not part:
                break
            prompts = prompts[len(part) :]
            wanted = _to_train_on(run, iteration, (SAMPLE, iteration, number), chunks / f"sampled-{number}")
            scored = with_scores(run, draw(run, part, wanted), part, config.k, chunks / f"scored-{number}", to_train_on=True)
            found += [row | {"round": number} for row in scored]
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
    pool, duplicates = candidate_lists.memorise(old, new) if old else candidate_lists.deduplicate(new)
    pool, unscored = candidate_lists.rank(pool)
    chosen = _choose(run, iteration, [one for one in pool if one.candidates])
    kept, tied, short = candidate_lists.drop_uninformative(chosen)
    run.ranks.first(lambda: write_rows(folder / "lists.parquet", to_rows(kept)))
    run.remove(run.folder.chunks(iteration, "lists"))
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
    """(remembered candidates of earlier iterations, candidates of this one), with the scores that lists are trained by."""
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
        chunks = run.folder.chunks(iteration, "lists")
        rows = with_logps(run, run.policy(iteration - 1), to_rows(pool), run.config.k, chunks)
        return candidate_lists.hard_negatives(from_rows(rows), top=top, negatives=wanted)
    if run.config.negatives == "related":  # added negatives rank below all others, so the bottom is made of them
        pool, _ = candidate_lists.negatives_of_related_prompt(pool, wanted)
    elif run.config.negatives == "random":
        pool, _ = candidate_lists.random_negatives(pool, wanted, seed=run.seed(NEGATIVES, iteration))
    if run.config.negatives in ("related", "random"):
        bottom = wanted
    return candidate_lists.top_bottom(pool, top, bottom)


# --- train -------------------------------------------------------------------------------------------------


def train(run: Run, iteration: int) -> dict[str, Any]:
    """LarPOTrainer on the lists, from the policy at the start of the iteration; see `larpo.align.training`."""
    folder, model = run.folder.iteration(iteration), run.folder.model(iteration)
    rows = run.rows(folder / "lists.parquet")
    if not run.ranks.first(model.exists):
        # Without settings to compare: a run's folder has the run's, so what diverged there was this.
        with remembered(folder, {}, run.ranks), run.ranks.warn_once():
            run.ranks.together(lambda: training.train(run, rows, iteration))
        run.models.release_all()
    run.remove(run.folder.checkpoints(iteration))
    return run.ranks.first(lambda: training.report(model))


# --- evaluate ----------------------------------------------------------------------------------------------


def evaluate(run: Run, iteration: int) -> dict[str, Any]:
    """The policy after an iteration (0: the initial model) on the held-out prompts: completions at every temperature, their
    rewards, and at temperature 1 their log-likelihoods under this policy and the initial model."""
    folder, chunks = run.folder.iteration(iteration), run.folder.chunks(iteration, "evaluate")
    rows = run.rows_once(folder / "evaluation.parquet", lambda: _held_out_rows(run, iteration, chunks))
    run.remove(chunks)
    start = rows if iteration == 0 else run.rows(run.folder.iteration(0) / "evaluation.parquet")
    return evaluation.metrics(rows, start, run.config)


def _held_out_rows(run: Run, iteration: int, chunks: Path) -> Rows:
    config, policy, initial = run.config, run.policy(iteration), run.policy(0)
    rows: Rows = []
    source = run.folder.iteration(iteration).name
    for i, temperature in enumerate(config.eval_temperatures):
        wanted = Draw(iteration, config.eval_k, temperature, (EVALUATE, i), source, chunks / f"sampled-{i}")
        drawn = draw(run, run.held_out, wanted)
        scored = with_scores(run, drawn, run.held_out, config.eval_k, chunks / f"scored-{i}")
        rows += [{"logps": None, "initial_logps": None} | row | {"temperature": float(temperature)} for row in scored]

    at_one = [row for row in rows if row["temperature"] == 1.0]  # the only ones whose log-likelihoods say something of KL
    at_one = with_logps(run, policy, at_one, config.eval_k, chunks / "logps")
    of_initial = chunks / ("logps" if initial == policy else "initial_logps")
    measured = iter(with_logps(run, initial, at_one, config.eval_k, of_initial, column="initial_logps"))
    return [next(measured) if row["temperature"] == 1.0 else row for row in rows]


def clean_up(run: Run, iteration: int) -> None:
    """After an iteration is evaluated: with keep_models last, the policy of the iteration before goes."""
    if run.config.keep_models == "last" and iteration > 1:
        run.remove(run.folder.model(iteration - 1))

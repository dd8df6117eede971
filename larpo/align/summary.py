"""summary.md: what a run was, what came of it, and what its completions look like before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..runs.files import read_rows
from ..runs.secrets import masked
from . import markdown
from .evaluation import interval
from .markdown import block, cell
from .run_state import Run

Metrics = list[dict[str, Any]]
EXAMPLES = 5


def table(metrics: Metrics) -> str:
    """Reward and KL of the start and of every iteration, as a Markdown table."""
    return markdown.table([_row(one) for one in metrics])


def _row(one: dict[str, Any]) -> dict[str, str]:
    """Without a sampled reward and lists for the start, which trains on nothing."""
    found, started = one["evaluate"], one["iteration"] == 0
    seconds = sum(counts["seconds"] for counts in one.values() if isinstance(counts, dict))
    sampled = None if started else one["score"]["reward"]
    return {
        "": "start" if started else f"iteration {one['iteration']}",
        "held-out reward": "–" if found["reward"] is None else interval(found["reward"]),
        "KL to start, nats": interval(found["kl"]),
        "win rate": "–" if started or found["win_rate"] is None else f"{found['win_rate']['mean']:.0%}",
        "distinct": f"{found['distinct']:.0%}",
        "sampled reward": "–" if sampled is None else f"{sampled:+.2f}",
        "lists": "–" if started else f"{one['lists']['lists']}",
        "minutes": f"{seconds / 60:.1f}",
    }


def title(run: Run) -> str:
    config = run.config
    return f"{config.objective} on {Path(str(masked(config.model))).name}, {config.iterations} iterations"


def page(run: Run, metrics: Metrics, pictures: dict[str, Path]) -> str:
    config, folder = run.config, run.folder.path
    parts = [
        f"# {cell(title(run))}",
        f"{len(run.held_out)} held-out prompts x {config.eval_k} completions at temperature 1; ± is half of the 95 % interval "
        "over prompts. KL is the policy's to the initial model, per completion. Read reward and KL together: a reward "
        "that rises at a large KL, or with completions that repeat, may have been gamed.",
        table(metrics),
        *(f"## {title}\n\n![{title}]({file.relative_to(folder).as_posix()})" for title, file in pictures.items()),
        "## What was trained on\n\n" + markdown.table([_lists(one) for one in metrics[1:]]),
        "## Before and after\n\n" + _examples(run, len(metrics) - 1),
        "## Settings\n\n`config.yaml` holds all of them. Start the same command again to go on after an interruption, or with "
        "more iterations to go further.\n\n" + _settings(run),
    ]
    return "\n\n".join(parts) + "\n"


def _lists(one: dict[str, Any]) -> dict[str, Any]:
    sampled, lists = one["sample"], one["lists"]
    return {
        "iteration": one["iteration"],
        "temperature": f"{sampled['temperature']:g}",
        "sampled": sampled["candidates"],
        "duplicates": lists["duplicates"],
        "unscored": lists["unscored"],
        "memorised": lists["memorised_candidates"],
        "tied lists": lists["tied_lists"],
        "prompts refilled": one["refill"]["prompts"] if "refill" in one else "–",
        "lists": lists["lists"],
        "candidates": lists["candidates"],
        "steps": one["train"]["steps"],
    }


def _examples(run: Run, last: int) -> str:
    """The first completion of the first held-out prompts: chosen before anything was known of them."""
    lines = ["| prompt | start | | after the last iteration | |", "| - | - | - | - | - |"]
    pair = [read_rows(run.folder.iteration(i) / "evaluation.parquet") for i in (0, last)]
    at_one = ([row for row in rows if row["temperature"] == 1.0][:EXAMPLES] for rows in pair)
    for before, after in zip(*at_one, strict=True):
        cells = [cell(before["prompt"])]
        for row in (before, after):
            score = row["scores"][0]
            cells += [cell(row["completions"][0]), "–" if score is None else f"{score:+.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _settings(run: Run) -> str:
    import yaml

    config = run.config.to_dict()
    config |= {name: f"{len(value)} prompts" for name, value in config.items() if "prompts" in name and isinstance(value, list)}
    del config["output_dir"]  # a path of this machine
    return block(yaml.safe_dump(config, sort_keys=False, allow_unicode=True).strip(), "yaml")

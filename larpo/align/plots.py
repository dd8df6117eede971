"""The pictures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..runs.files import write_whole
from .config import AlignConfig

Metrics = list[dict[str, Any]]


def draw(metrics: Metrics, config: AlignConfig, folder: Path) -> dict[str, Path]:
    """Draws what the metrics allow: {title: file}."""
    evaluations = {one["iteration"]: one["evaluate"] for one in metrics}
    found = {"Reward and KL to the initial model": _figure(folder / "reward-and-kl.png", 2, _reward_and_kl, evaluations)}
    curves, title = {"best_of_n": "reward of the best of N"}, "Best of N"
    if config.solved_above is not None:
        curves["recall_at_n"] = "Recall@N"
        title = f"Best of N, and Recall@N (solved: a reward above {config.solved_above:g})"
    if any(one["best_of_n"] for one in evaluations.values()):
        found[title] = _figure(folder / "n.png", len(curves), _curves, evaluations, curves)
    iterations = [one for one in metrics if one["iteration"] > 0]
    if any(one["lists"]["lists"] for one in iterations):
        found["Lists that were trained on"] = _figure(folder / "lists.png", 2, _lists, iterations)
    return found


def _figure(path: Path, panels: int, paint: Any, *what: Any) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * panels, 3.4), layout="constrained")
    FigureCanvasAgg(figure)  # not through pyplot: the caller's backend stays
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for one in axes:
        one.grid(alpha=0.3)
        one.set_axisbelow(True)
    paint(axes, *what)
    write_whole(path, lambda unfinished: figure.savefig(unfinished, dpi=120, format="png"))
    return path


def _reward_and_kl(axes: Any, evaluations: dict[int, dict]) -> None:
    for one, name, label in zip(axes, ("reward", "kl"), ("held-out reward", "KL to the initial model, nats"), strict=True):
        points = [(i, counts[name]) for i, counts in evaluations.items() if counts[name] is not None]
        means = [estimate["mean"] for _, estimate in points]
        half = [0 if estimate["low"] is None else (estimate["high"] - estimate["low"]) / 2 for _, estimate in points]
        one.errorbar([i for i, _ in points], means, half, marker="o", capsize=4)
        _iterations(one, evaluations, label)


def _iterations(axes: Any, iterations: Any, label: str) -> None:
    axes.set_xticks(list(iterations))
    axes.set_xlabel("iteration (0: the start)" if 0 in iterations else "iteration")
    axes.set_ylabel(label)


def _curves(axes: Any, evaluations: dict[int, dict], names: dict[str, str]) -> None:
    """A colour per iteration (the first and the last where there are several temperatures), a style per temperature."""
    temperatures = list(next(iter(evaluations.values()))[next(iter(names))])
    shown = evaluations if len(temperatures) == 1 else {i: evaluations[i] for i in sorted({0, max(evaluations)})}
    for one, (name, label) in zip(axes, names.items(), strict=True):
        for colour, (i, counts) in enumerate(shown.items()):
            for style, (temperature, curve) in zip(("-", "--", ":", "-.") * 9, counts[name].items(), strict=False):
                said = ("start" if i == 0 else f"iteration {i}") + (f", T = {temperature}" if len(temperatures) > 1 else "")
                one.plot([int(n) for n in curve], list(curve.values()), style, marker="o", color=f"C{colour}", label=said)
        ns = [int(n) for n in curve]
        one.set_xscale("log", base=2)
        one.set_xticks(ns, labels=[str(n) for n in ns])
        one.set_xlabel("N")
        one.set_ylabel(label)
        one.legend(fontsize="small")


def _lists(axes: Any, iterations: Metrics) -> None:
    numbers = [one["iteration"] for one in iterations]
    sources = sorted({source for one in iterations for source in one["lists"]["sources"]})
    _stacked(
        axes[0],
        numbers,
        {f"from {source}": [one["lists"]["sources"].get(source, 0) for one in iterations] for source in sources},
    )
    _iterations(axes[0], numbers, "candidates trained on")
    kinds = {"trained on": "lists", "all scores equal": "tied_lists", "below two candidates": "short_lists"}
    _stacked(axes[1], numbers, {label: [one["lists"][name] for one in iterations] for label, name in kinds.items()})
    _iterations(axes[1], numbers, "lists")


def _stacked(axes: Any, at: list[int], heights: dict[str, list[int]]) -> None:
    bottom = [0] * len(at)
    for label, values in heights.items():
        axes.bar(at, values, bottom=bottom, width=0.6, label=label)
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    axes.set_ylim(0, 1.4 * max(bottom))  # room for the legend
    axes.legend(fontsize="small", ncols=2, loc="upper center")

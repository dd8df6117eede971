"""The counts of a stage as one line for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .evaluation import interval

LEFT_OUT = ("seconds", "sizes", "sources", "weights")


def line(folder: str, stage: str, counts: Mapping[str, Any]) -> str:
    """The line of a stage in this folder of a run, with the seconds that it took."""
    return f"{folder:>12} {stage:<8} {counts['seconds']:7.1f} s  {_what(stage, counts)}"


def _what(stage: str, counts: Mapping[str, Any]) -> str:
    if stage == "evaluate":
        reward, kl = counts["reward"], counts["kl"]
        shown = "no reward" if reward is None else f"reward {interval(reward)}"
        return f"{shown}, KL {interval(kl)} nats, {counts['distinct']:.0%} distinct"
    if stage == "train":
        last = counts["log"][-1] if counts["log"] else {}
        figures = [f"{name} {value:.3g}" for name, value in last.items() if name != "step"]
        return ", ".join([f"{counts['steps']} steps", *figures])
    said = {name: value for name, value in counts.items() if name not in LEFT_OUT and value is not None}
    return ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in said.items())

"""The counts of finished stages for TensorBoard, trackio, wandb and what else transformers reports to, an iteration a step.

`report_to` names the tools, as in TrainingArguments. Each is used through its callback in transformers, which reads
environment variables of its own (TENSORBOARD_LOGGING_DIR, WANDB_PROJECT, ...).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..runs.secrets import masked

if TYPE_CHECKING:
    from ..config import LarPOConfig

logger = logging.getLogger(__name__)


class Reporter:
    """Sends counts to the tools of `report_to`. A tool that fails is left out from then on, with a warning, and ends no run:
    the counts are in the run's folder.

    A run that continues reports its finished stages again, so that each run of a tool is whole. Of several processes the first
    one reports.
    """

    def __init__(self, report_to: str | list[str] | None, args: LarPOConfig):
        """Raises ValueError for a tool that transformers doesn't know, and for one that is not installed."""
        from transformers.integrations import get_reporting_integration_callbacks
        from transformers.trainer_callback import TrainerControl, TrainerState

        try:
            tools = [tool() for tool in get_reporting_integration_callbacks(report_to)]
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"report_to: {error}") from None
        self._tools = tools if args.process_index == 0 else []
        self._args, self._state, self._control = args, TrainerState(), TrainerControl()
        self._tell("on_train_begin")

    def stage(self, iteration: int, stage: str, counts: Mapping[str, Any]) -> None:
        """Reports the counts of a stage: of evaluation as eval/..., of others as train/sample/..., in each tool's spelling."""
        if self._tools:
            self._state.global_step = iteration
            begin = "eval_" if stage == "evaluate" else f"{stage}/"
            self._tell("on_log", logs={begin + name: value for name, value in figures(counts).items()})

    def close(self) -> None:
        self._tell("on_train_end")

    def _tell(self, event: str, **what: Any) -> None:
        for tool in list(self._tools):
            try:
                getattr(tool, event)(self._args, self._state, self._control, model=None, **what)
            except Exception as error:
                logger.warning(
                    "%s fails, and is told no more: %s: %s", type(tool).__name__, type(error).__name__, masked(str(error))
                )
                self._tools.remove(tool)


def figures(counts: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in a stage's counts by their place; of an estimate its mean, of a log its last entry.

    >>> figures({"reward": {"mean": 0.5, "low": 0.1}, "log": [{"loss": 2}, {"loss": 1}], "best_of_n": {"1": {"4": 3}}})
    {'reward': 0.5, 'log/loss': 1, 'best_of_n/1/4': 3}
    """
    found: dict[str, float] = {}
    for name, value in counts.items():
        if isinstance(value, Mapping) and "mean" in value:
            value = value["mean"]
        if isinstance(value, list) and value and isinstance(value[-1], Mapping):
            value = value[-1]
        if isinstance(value, Mapping):
            found |= {f"{name}/{inner}": number for inner, number in figures(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = value
    return found

"""One iteration's training: lists in, a policy's folder out. Killed inside, it goes on from the trainer's last checkpoint."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runs.files import Rows, read_json, write_whole
from ..runs.ranks import shown
from .completions import as_data
from .config import AlignConfig

if TYPE_CHECKING:
    from .run_state import Run

logger = logging.getLogger(__name__)

REPORTED = ("loss", "grad_norm", "rewards/accuracies", "rewards/margins", "ndcg", "kendall_tau")
STATE = "trainer_state.json"


def train(run: Run, rows: Rows, iteration: int) -> None:
    """Trains the policy before an iteration on lists and writes the one after it, with the trainer's log. All processes train,
    the first one writes.

    The reference is the policy before training, or the initial model with reference="initial". Without lists the policy
    is written as it is, with a warning.

    Raises NonFiniteError where training diverges: nothing is written then.
    """
    from ..modeling.sharding import is_sharded
    from ..runs.checkpoints import last_whole_checkpoint
    from ..trainer import LarPOTrainer
    from ..training.nonfinite import refuse_nonfinite_weights
    from .models import train_last_layers

    config, models, ranks = run.config, run.models, run.ranks
    before, after, checkpoints = run.policy(iteration - 1), run.folder.model(iteration), run.folder.checkpoints(iteration)
    if not rows:
        ranks.first(lambda: _write_as_it_is(models.load(before), after, models.tokenizer))
        return
    policy = models.load_for_training(before)
    if config.trained_layers is not None:
        train_last_layers(policy, config.trained_layers)
    settings = config.training_settings()
    trainer = LarPOTrainer(
        policy,
        models.load_reference() if config.reference == "initial" and not settings.get("reference_free") else None,
        arguments(config, str(checkpoints), run.seed(0, iteration)),
        train_dataset=as_data(rows, "scores", "source"),
        processing_class=models.tokenizer,
        peft_config=_peft_config(config, policy),
    )
    if settings["precompute_ref_log_probs"]:
        trainer.reference.release()  # its log-probs are in the data now
        models.release()
    _show_a_bar(trainer, run.progress)
    trainer.train(resume_from_checkpoint=ranks.first(lambda: last_whole_checkpoint(checkpoints, trainer.args)))
    sharded = is_sharded(trainer.accelerator)
    refuse_nonfinite_weights(trainer.model, after, trainer.accelerator if sharded else None)
    weights = trainer.accelerator.get_state_dict(trainer.model) if sharded else None  # whole, in the first process
    trained = trainer.accelerator.unwrap_model(trainer.model)
    ranks.first(lambda: _write(after, trained, models.tokenizer, weights, trainer.state))
    ranks.each(lambda: shown(after))


def arguments(config: AlignConfig, output_dir: str, seed: int) -> Any:
    """The LarPOConfig of one iteration. Raises what LarPOConfig raises for a bad setting."""
    import torch

    from ..config import LarPOConfig

    gpu = torch.accelerator.is_available()
    # Without a GPU torch warns of pinned memory, and accelerate sees one process only unless it is told to use the CPU.
    here = {"dataloader_pin_memory": gpu, "use_cpu": not gpu}
    try:
        return LarPOConfig(output_dir=output_dir, seed=seed, **here | config.training_settings())
    except (TypeError, ValueError) as error:
        raise ValueError(f"training: {error}") from error


def report(model: Path) -> dict[str, Any]:
    """What the trainer's log in a policy's folder says: steps, and by step the loss and how well lists are ordered."""
    log = read_json(model / STATE) if (model / STATE).is_file() else None
    if log is None:
        return {"steps": 0, "log": []}
    steps = [
        {"step": entry["step"]} | {name: entry[name] for name in REPORTED if name in entry and math.isfinite(entry[name])}
        for entry in log["log_history"]
        if "loss" in entry
    ]
    return {"steps": log["global_step"], "log": steps}


def _write_as_it_is(policy: Any, folder: Path, tokenizer: Any) -> None:
    logger.warning("no list has an order to learn from: the policy stays as it is (%s)", folder.parent)
    _write(folder, policy, tokenizer)


def _write(folder: Path, model: Any, tokenizer: Any, weights: Any = None, state: Any = None) -> None:
    """The policy's folder, whole. weights: those to write, of a model whose own are cut over processes."""

    def save(unfinished: Path) -> None:
        model.save_pretrained(unfinished, state_dict=weights)
        tokenizer.save_pretrained(unfinished)
        if state is not None:
            state.save_to_json(str(unfinished / STATE))

    write_whole(folder, save)


def _peft_config(config: AlignConfig, policy: Any) -> Any:
    if config.peft is None or hasattr(policy, "peft_config"):  # after the first iteration the policy has its adapter
        return None
    from ..modeling.adapters import lora_config

    return lora_config(config.peft)


def _show_a_bar(trainer: Any, progress: bool) -> None:
    """A bar instead of a dict per logged step: the log goes into the policy's folder."""
    from transformers import PrinterCallback
    from transformers.trainer_callback import ProgressCallback

    class Bar(ProgressCallback):
        def on_log(self, *args, **kwargs):
            pass

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if progress:
        trainer.add_callback(Bar)

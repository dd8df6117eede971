"""LarPOTrainer with a loss that is a function: the data, the reference, the rows and the logs stay as they are."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback

from larpo.candidates import PromptList, drop_uninformative, to_rows
from larpo.config import LarPOConfig
from larpo.runs.progress_bars import without_bars_of_libraries
from larpo.scoring import score_lists
from larpo.trainer import LarPOTrainer

# (logps [S], ref_logps [S] or None, num_tokens [S], relevance [S], list_sizes [L]) -> (mean loss over lists, scores [S])
Loss = Callable[[Tensor, Tensor | None, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class ObjectiveTrainer(LarPOTrainer):
    """LarPOTrainer that minimises `loss`, one of `larpo.recipes.objectives` or any function of that form."""

    def __init__(self, *args, loss: Loss, **kwargs):
        """loss: see `Loss`; other arguments as in LarPOTrainer.

        Raises ValueError for length_normalized: it would divide by lengths that the function divides by itself.
        """
        self.loss = loss
        super().__init__(*args, **kwargs)
        if self.args.length_normalized:
            raise ValueError("length_normalized must be off with a loss of your own")

    def list_loss(self, logps: Tensor, ref_logps: Tensor | None, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return self.loss(logps, ref_logps, inputs["num_tokens"], inputs["relevance"], inputs["list_sizes"])


QUIET = dict(report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True)


def train(
    model, tokenizer, lists: Sequence[PromptList], loss: Loss, *, trainer: Callable = ObjectiveTrainer, **settings: Any
) -> dict[str, int]:
    """Trains the model in place against itself as it was; counts lists, lists without an order, and empty completions.

    All of them stay in the batches. Where no list has an order there is nothing to learn, and the model stays as it is.
    trainer: ObjectiveTrainer or a subclass, also with arguments of its own bound. settings: of LarPOConfig.
    """
    kept, tied, short = drop_uninformative(lists)
    counts = {"lists": len(lists), "tied": len(tied), "too short": len(short)}
    counts["empty completions"] = sum(not c.completion for one in lists for c in one.candidates)
    if not kept:
        return counts  # the optimiser would divide noise by noise
    with quiet(), tempfile.TemporaryDirectory() as folder:
        arguments = LarPOConfig(output_dir=folder, lr_scheduler_type="constant", **QUIET, **settings)
        data = Dataset.from_list(to_rows(lists))
        one = trainer(model, args=arguments, train_dataset=data, processing_class=tokenizer, loss=loss)
        one.remove_callback(PrinterCallback)
        one.train()
    model.eval()
    return counts


def counts_in_words(trainings: Iterable[Mapping[str, int]]) -> str:
    """What `train` counted, summed over trainings, as a sentence.

    >>> counts_in_words([{"lists": 40, "tied": 1, "too short": 0, "empty completions": 2}])
    'Of 40 lists trained on, 1 tied in all scores and 0 had no two candidates; 2 completions were empty. None was dropped.'
    """
    counts = sum(map(Counter, trainings), Counter())
    return (
        f"Of {counts['lists']} lists trained on, {counts['tied']} tied in all scores and {counts['too short']} had no two "
        f"candidates; {counts['empty completions']} completions were empty. None was dropped."
    )


def logps_of(model, tokenizer, lists: Sequence[PromptList]) -> tuple[Tensor, Tensor]:
    """Log-likelihoods [S] and tokens [S] of all candidates, lists one after the other."""
    with quiet():
        scored = score_lists(model, Dataset.from_list(to_rows(lists)), tokenizer, batch_size=64, progress=False)
    return tuple(torch.tensor([x for row in scored[name] for x in row]) for name in ("logps", "num_tokens"))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without progress bars of libraries, as a recipe has its own, and without the warning of empty completions: a policy may
    sample them, and recipes count them."""
    with without_bars_of_libraries(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*completions? empty", category=UserWarning)
        yield

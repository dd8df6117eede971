"""A whole training step of LarPOTrainer and of TRL's DPOTrainer, on the same candidates: batch, loss, gradients, AdamW, logs.

SmolLM2-135M; a prompt opens a film review, and its best completion is how that review goes on. The reference is the policy with
noise in its weights: as long as the two are equal every score is 0, and so the loss is right whatever was computed. A case is
named L4-m2: lists of a batch, candidates of a list. A pairwise trainer gets the best of a list with each of the others.
"""

from __future__ import annotations

import copy
import functools
import re
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.core.memory import give_back_freed
from benchmarks.core.problem import BETA, identity
from benchmarks.core.truth import Target
from benchmarks.providers.registry import Output, provider
from larpo import offline

PROMPT_WORDS, COMPLETION_WORDS = 63, 44  # about 80 and 55 tokens
REFERENCE_NOISE = 0.03  # of the standard deviation of each parameter
LIMITS = {"loss": 100, "logps": 1e5}  # in roundings of the dtype: 1e-5 and 0.01 nats of hundreds in float32


@dataclass
class TrainerStep:
    """A batch of lists, and the loop of the trainer under way; stands where the kernels' problems stand in `measure`."""

    case: str
    dtype: torch.dtype
    device: torch.device
    seed: int
    rows: list[dict[str, Any]]  # prompt, completions, scores; the first completion is the best
    loop: Loop | None = field(default=None, repr=False)
    side = "trainer"
    NAME = re.compile(r"L(\d+)-m(\d+)")

    @classmethod
    def build(cls, case: str, dtype: torch.dtype, device: str, seed: int) -> TrainerStep:
        import datasets
        import transformers

        found = cls.NAME.fullmatch(case)
        if not found:
            raise ValueError(f"case: got {case!r}, expected a name as L4-m2")
        transformers.utils.logging.disable_progress_bar()  # the benchmark has its own
        datasets.disable_progress_bars()
        lists, m = map(int, found.groups())
        reviews = [text.split() for text in offline.imdb_reviews()[0]]
        reviews = [words for words in reviews if len(words) >= PROMPT_WORDS + COMPLETION_WORDS][: lists * m]
        prompts = [" ".join(words[:PROMPT_WORDS]) for words in reviews]
        ends = [" " + " ".join(words[PROMPT_WORDS:][:COMPLETION_WORDS]) for words in reviews]
        rows = [
            {"prompt": prompts[i], "completions": ends[i : i + m], "scores": [1.0] + [0.0] * (m - 1)}
            for i in range(0, lists * m, m)
        ]
        return cls(case, dtype, torch.device(device), seed, rows)

    @property
    def m(self) -> int:
        return len(self.rows[0]["completions"])

    @property
    def mode(self) -> str:
        return "pairs" if self.m == 2 else "lists"

    def pairs(self) -> list[dict[str, str]]:
        return [
            {"prompt": row["prompt"], "chosen": row["completions"][0], "rejected": other}
            for row in self.rows
            for other in row["completions"][1:]
        ]

    def policy(self):
        """The model, anew, and its tokenizer."""
        return _policy(self.dtype, self.device)

    def reference(self):
        """A model for one trainer, which wraps its forward. All of them share their parameters, which trainers only read: four
        copies would fill a laptop."""
        shared = _reference(self.dtype, self.device, self.seed)
        return copy.deepcopy(shared, {id(parameter): parameter for parameter in shared.parameters()})

    def tokens(self, tokenizer) -> list[tuple[list[int], list[int]]]:
        """Of every candidate, those of its prompt and those of its completion."""
        texts = [(row["prompt"], completion) for row in self.rows for completion in row["completions"]]
        end = [tokenizer.eos_token_id]
        return [(tokenizer(prompt).input_ids, tokenizer(completion).input_ids + end) for prompt, completion in texts]

    def trained(self, make: Callable[[TrainerStep, dict], Any]) -> TrainerStep:
        """With a trainer that is about to take its first step; make(step, settings that any trainer has) -> trainer."""
        folder = tempfile.TemporaryDirectory()
        settings = {
            "output_dir": folder.name,
            "use_cpu": self.device.type == "cpu",
            "max_steps": 10**6,
            "lr_scheduler_type": "constant",
            "beta": BETA,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        return replace(self, loop=Loop(make(self, settings), folder))

    def finish(self) -> None:
        if self.loop is not None:
            self.loop.end()

    def fresh(self, *, copy: bool = False) -> TrainerStep:
        return self

    def gradients(self) -> dict[str, torch.Tensor]:
        return {}  # the optimizer has used them

    def describe(self) -> dict:
        model, tokenizer = self.policy()
        tokens, parameters = self.tokens(tokenizer), sum(p.numel() for p in model.parameters())
        scored, total = sum(len(end) for _, end in tokens), sum(len(start) + len(end) for start, end in tokens)
        return {
            **identity(self),
            "note": f"{parameters / 1e6:.1f} M parameters and as many of the reference; AdamW; peak is above what stays from "
            "step to step: the weights and AdamW's moments",
            "candidates": len(tokens),
            "lists": len(self.rows),
            "m": self.m,
            "T": total,
            "scored_tokens": scored,
            "masked": round(1 - scored / total, 4),
            "H": model.config.hidden_size,
            "V": model.config.vocab_size,
            "gemm_flops": 0,
            "traffic_bytes": 0,
            "gradient_bytes": parameters * self.dtype.itemsize,
        }

    def save(self, path: Path) -> None:
        """The recipe: models are loaded anew."""
        recipe = {name: getattr(self, name) for name in ("side", "case", "dtype", "seed")}
        torch.save({**recipe, "device": self.device.type}, path)


def _policy(dtype: torch.dtype, device: torch.device):
    model, tokenizer = offline.load_smollm2(dtype, progress=False)
    return model.to(device), tokenizer


@functools.lru_cache(maxsize=1)
def _reference(dtype: torch.dtype, device: torch.device, seed: int):
    model, _ = _policy(dtype, device)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * REFERENCE_NOISE)
    return model.requires_grad_(False)


class Loop:
    """A trainer's own loop, which stops in front of every step until it is told to take it.

    It runs in a thread of its own, so that trainers can take turns. A step is all that happens from one stop to the next.
    """

    def __init__(self, trainer, folder: tempfile.TemporaryDirectory):
        from transformers import PrinterCallback

        self.trainer, self.folder = trainer, folder
        self._stopped, self._go = threading.Semaphore(0), threading.Semaphore(0)
        self._ending, self._error = False, None
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_stop_before_steps(self._stop))
        self._thread = threading.Thread(target=self._train, args=(torch.get_num_threads(),), daemon=True)
        self._thread.start()
        self._wait()

    def step(self) -> dict[str, float]:
        """Takes one -> what the trainer logged."""
        self._go.release()
        self._wait()
        return self.trainer.state.log_history[-1]

    def end(self) -> None:
        self._ending = True
        self._go.release()
        self._thread.join()
        self.folder.cleanup()
        self._free()

    def _free(self) -> None:
        """The trainers of one table fill a laptop: those of the last one must be gone, whoever still refers to them."""
        self.trainer.optimizer.state.clear()
        for parameter in self.trainer.model.parameters():
            parameter.data, parameter.grad = parameter.data.new_empty(0), None
        give_back_freed()  # a thread keeps what it freed

    def _train(self, threads: int) -> None:
        torch.set_num_threads(threads)  # which each thread has for itself
        try:
            self.trainer.train()
        except _Ended:
            pass
        except Exception as error:  # raised where the step was asked for
            self._error = error
        finally:
            self._stopped.release()

    def _stop(self) -> None:
        self._stopped.release()
        self._go.acquire()
        if self._ending:
            raise _Ended

    def _wait(self) -> None:
        self._stopped.acquire()
        if self._error is not None:
            raise self._error


class _Ended(Exception):
    """Leaves trainer.train()."""


def _stop_before_steps(stop: Callable[[], None]):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_begin(self, *args, **kwargs) -> None:
            stop()

    return Stop()


class InFloat64:
    """The loss and the log-likelihoods of the first step, from the same weights in float64."""

    def __init__(self, problem: TrainerStep):
        self.problem = problem
        policy, tokenizer = problem.policy()
        tokens = problem.tokens(tokenizer)
        models = (policy, copy.deepcopy(problem.reference()))
        logps = [_sequence_logps(model.double(), tokens).view(-1, problem.m) for model in models]
        self.scores = BETA * (logps[0] - logps[1])
        self.logps = _best_and_others(logps[0])

    def target(self, computes: str) -> Target:
        return Target(None, None)  # each trainer ends in one loss of its own

    def errors(self, computes: str, value, logps, gradients) -> dict[str, float]:
        best, others = self.scores[:, :1], self.scores[:, 1:]
        true = F.softplus(others - best) if computes == "DPO pairs" else self.scores.logsumexp(-1, keepdim=True) - best
        return {"loss": float((value - true.mean()).abs()), "logps": float((logps - self.logps).abs().max())}

    def limits(self, eager: dict[str, float], computes: str, **rounding) -> dict[str, float]:
        return {name: limit * torch.finfo(self.problem.dtype).eps for name, limit in LIMITS.items()}


@torch.no_grad()
def _sequence_logps(model, tokens: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    found = []
    for start, end in tokens:
        ids = torch.tensor([start + end], device=model.device)
        logits = model(input_ids=ids).logits[0, len(start) - 1 : -1]
        found.append(-F.cross_entropy(logits, ids[0, len(start) :], reduction="sum"))
    return torch.stack(found)


def _best_and_others(logps: torch.Tensor) -> torch.Tensor:
    """Means over lists, as both trainers log them."""
    return torch.stack([logps[:, 0].mean(), logps[:, 1:].mean()])


# --- the trainers ---------------------------------------------------------------------------------------


def _larpo(**options):
    def make(step: TrainerStep, settings: dict):
        from datasets import Dataset

        from larpo.config import LarPOConfig
        from larpo.trainer import LarPOTrainer

        model, tokenizer = step.policy()
        args = LarPOConfig(per_device_train_batch_size=len(step.rows), **settings, **options)
        return LarPOTrainer(model, step.reference(), args, Dataset.from_list(step.rows), processing_class=tokenizer)

    return lambda step: step.trained(make)


def _trl(step: TrainerStep) -> TrainerStep:
    def make(step: TrainerStep, settings: dict):
        from datasets import Dataset
        from huggingface_hub import constants
        from trl import DPOConfig, DPOTrainer

        constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL reports every trainer that is made
        model, tokenizer = step.policy()
        pairs = step.pairs()
        own = {"bf16": False, "gradient_checkpointing": False}  # on by default
        args = DPOConfig(per_device_train_batch_size=len(pairs), **settings, **own)
        return DPOTrainer(model, step.reference(), args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)

    return step.trained(make)


def _one_step(step: TrainerStep) -> Output:
    logged = step.loop.step()
    return Output(torch.tensor(logged["loss"]), torch.tensor([logged["logps/chosen"], logged["logps/rejected"]]))


def _mean_over_pairs(step: TrainerStep) -> Output:
    """LambdaRank sums over the pairs of a list: with one best candidate, those of the best with each of the others."""
    out = _one_step(step)
    return out._replace(value=out.value / (step.m - 1))


_step = {"leaves_memory": True, "finish": TrainerStep.finish}
_pairs = {"computes": "DPO pairs", **_step}
provider("ours (LarPOTrainer)", "trainer", prepare=_larpo(objective="lambdarank"), **_pairs)(_mean_over_pairs)
_shared = _larpo(objective="lambdarank", share_prefix=True)
provider("ours (LarPOTrainer, share_prefix)", "trainer", prepare=_shared, **_pairs)(_mean_over_pairs)
provider("ours (LarPOTrainer, contrastive)", "trainer", modes=("lists",), prepare=_larpo(), **_step)(_one_step)
provider("trl DPOTrainer", "trainer", needs="trl", prepare=_trl, **_pairs)(_one_step)

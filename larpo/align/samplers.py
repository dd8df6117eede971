"""What samples in a run, by its setting `sampler`, and from which weights."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..sampling import Distinct, Sampled, Sampler
from ..serving.asking import SamplingLimits, sampling_limits
from ..serving.settings import server_settings
from ..serving.weights import ServedWeights
from . import other_engine
from .config import AlignConfig
from .models import Models
from .run_folder import RunFolder


def refuse_beside_others(config: AlignConfig, processes: int) -> None:
    """Raises ValueError for an engine of vLLM in each of several processes."""
    if config.sampler == "vllm" and processes > 1:
        raise ValueError(
            f"sampler vllm runs in a loop of one process, and this one has {processes}: start `vllm serve` beside it, "
            "and use sampler server; or start the loop without torchrun or accelerate launch"
        )


@dataclass
class Samplers:
    """Samplers of the policies of a run. A policy is named by its iteration; 0 is the initial model."""

    config: AlignConfig
    models: Models
    folder: RunFolder
    _served: ServedWeights | None = field(init=False, default=None)

    def __post_init__(self):
        """Raises ValueError where a server's key is not there."""
        if self.config.sampler == "server":
            self._served = ServedWeights(server_settings(self.config.sampler_options))
            self._served.settings.api_key()

    @property
    def in_one_go(self) -> bool:
        """Whether all prompts may be given at once, since the sampler itself keeps what has arrived."""
        return self.config.sampler == "server"

    def policy(self, iteration: int) -> str:
        """Name or folder."""
        return self.models.initial if iteration == 0 else str(self.folder.model(iteration))

    def weights(self, iteration: int) -> dict[str, Any]:
        """The weights that completions are from, for their files. stale: the server had others, those that it started with."""
        model = self.folder.model(iteration).relative_to(self.folder.path).as_posix()
        stale = self._served is not None and self._served.settings.is_stale(iteration)
        return {"checkpoint": model if iteration else str(self.config.model), "iteration": iteration, "stale": stale}

    def known_of(self, iteration: int, completions: Sequence[Sampled]) -> dict[str, Any]:
        """Columns for the row of a prompt: the weights, and what another engine reports of the completions."""
        others = {} if self.config.sampler == "transformers" else other_engine.columns(completions)
        return {"weights": self.weights(iteration)} | others

    def of(self, iteration: int, *, to_train_on: bool, kept: Path, progress: bool) -> Sampler:
        """The sampler of a policy. A server is told of its weights now.

        to_train_on: with the run's top_k, top_p, min_new_tokens and distinct. kept: where a server's answers are as they come.
        """
        from .. import sampling

        config, policy = self.config, self.policy(iteration)
        options: dict[str, Any] = {"eos_token_ids": self.models.eos_token_ids(), "stop": config.stop_strings()}
        if to_train_on:
            options |= {"top_k": config.top_k, "top_p": config.top_p, "min_new_tokens": config.min_new_tokens or 0}
        if config.sampler == "vllm":
            options["progress"] = progress
            sampler = sampling.VLLMSampler(policy, config.max_new_tokens, **options, **config.sampler_options)
        elif self._served is not None:
            limits = sampling_limits(self.models.tokenizer, config.max_new_tokens, **options)
            sampler = self._of_server(iteration, limits, kept, progress)
        else:
            options |= {"progress": progress, "batch_size": config.sample_batch_size}
            model = self.models.load(policy)
            sampler = sampling.TransformersSampler(model, self.models.tokenizer, config.max_new_tokens, **options)
        return Distinct(sampler) if to_train_on and config.distinct else sampler

    def release(self) -> None:
        """Lets go of an engine that is no longer used, with the memory of its GPU."""
        if self.config.sampler == "vllm":
            gc.collect()  # an engine and its parts hold each other

    def _of_server(self, iteration: int, limits: SamplingLimits, kept: Path, progress: bool) -> Sampler:
        from ..serving.sampler import ServedModel, ServerSampler

        policy, settings = self.policy(iteration), self._served.settings
        patience = settings.reload_timeout if self._served.tell(policy, iteration) else 0.0
        model = ServedModel(settings.model_of(policy, iteration), str(self.weights(iteration)), patience)
        return ServerSampler(settings, self.models.tokenizer, limits, model, kept=kept, progress=progress)

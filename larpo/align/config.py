"""AlignConfig: what a run of the loop is. Every field can stand in a YAML file under its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import inf
from pathlib import Path
from typing import Any, Literal, get_type_hints

from ..candidates import PAPER_SUBSETS
from ..field_docs import documented
from ..rewards import Judge, name_of
from ..rewards.finding import check_settings, settings_that_count
from ..runs.checks import check_choice, is_number, is_whole
from ..runs.identity import changed, with_defaults
from ..runs.secrets import given_again, masked
from ..runs.settings import read_settings
from ..runs.yaml_config import as_meant, kinds_of, nearest, only_choices
from ..sampling import temperature_at
from ..serving.settings import SAME_COMPLETIONS, server_settings

# Settings of LarPOConfig where neither `training` nor the loop says otherwise. "paper": arXiv 2502.03699, its experiment
# on objectives; it states neither schedule nor warm-up, these are what comparable public recipes use.
TRAINING_DEFAULTS: dict[str, Any] = {
    "learning_rate": 5e-7,  # paper
    "num_train_epochs": 2,  # paper
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # below 1: a share of all steps
    "precompute_ref_log_probs": True,  # few epochs: one pass over the data costs less than holding a second model
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "disable_tqdm": True,
}
OWNED = {  # settings of LarPOConfig that the loop sets by itself, and its own setting to use instead
    "output_dir": "output_dir",
    "seed": "seed",
    "data_seed": "seed",
    "sync_ref_model": "reference",
    "list_top": "subset",
    "list_bottom": "subset",
    "eval_strategy": "eval_k",
    "load_best_model_at_end": "eval_k",
    "do_eval": "eval_k",
    "do_predict": "eval_k",
    "resume_from_checkpoint": "output_dir",
    "model_init_kwargs": "model_init_kwargs",
}
MAY_CHANGE = ("iterations", "output_dir", "report_to", "compared_prompts", "logps_tolerance")  # of a run that has begun


@documented
@dataclass(kw_only=True, repr=False)
class AlignConfig:
    """A run of LarPO's algorithm 1 (arXiv 2502.03699): sample, score, build lists, train, evaluate, and again.

    Args:
        output_dir: The run folder; a run that was killed continues from what is in it.
        model: Name or folder of a causal LM, or smollm2 (SmolLM2-135M-Instruct out of a Python package).
        prompts: A file (.txt: one per line; .json, .jsonl, .parquet: field `prompt`, other fields go to the reward), a dataset
            on the hub, imdb (openings of film reviews), a list of prompts or rows, or a datasets.Dataset.
        reward: What scores a completion: imdb_sentiment, package.module:function (a coroutine too), the name or folder of a
            sequence classifier, {reward: one of these, groupwise: true, ...}, {url: http://..., api: ...}, or a list of these.
        iterations: Iterations of the loop (paper: 3).
        prompts_per_iteration: Prompts of an iteration, the next ones of a shuffled order (None: all).
        prompts_split: Split of `prompts`, if they are a dataset on the hub.
        report_to: Tools that the counts of each stage go to: tensorboard, trackio, wandb, ... (see TrainingArguments).
        seed: Equal seeds on an equal machine give an equal run.
        reference: The reference policy: iteration (the policy at the start of the iteration; paper) or initial (`model`).
        k: Completions sampled per prompt and iteration (paper: 10).
        temperatures: A number, one per iteration, or [linear, start, end] (paper: 0.8 to 1.2).
        max_new_tokens: Most tokens of a completion.
        min_new_tokens: Fewest tokens of a completion that is trained on (None: it may end at once).
        eos_token: The token, or tokens, that end a completion (None: those of the model's generation settings, the tokenizer's
            eos_token and the one that closes a turn in the chat template).
        stop: A text, or several, that also end a completion. It is trained on, and rewards do not see it.
        top_k: Sample from the top_k likeliest tokens only (0: all).
        top_p: Sample from the likeliest tokens that hold this probability only.
        distinct: Sample again until the k completions of a prompt differ (4 tries).
        sample_batch_size: Completions generated at a time.
        chunk_size: Prompts that one process samples or scores before it writes the results: what is repeated if it is killed
            (None: as many as fill a batch of sample_batch_size; 64 with another sampler). Completions depend on it.
        sampler: What samples: transformers, vllm (in this process) or server (of the OpenAI-compatible API).
        sampler_options: Keywords of vllm.LLM; for a server the settings of larpo.serving.settings: base_url, model,
            reload_command, ...
        compared_prompts: Prompts per iteration on whose completions log-likelihoods of vllm or a server are compared with the
            trainer's.
        logps_tolerance: Mean difference between the sampler's and the trainer's log-likelihoods, nats per token, that is warned
            of.
        reward_weights: A weight per reward (None: 1 each).
        normalise_rewards: Bring each reward to mean 0 and spread 1 within a list before it is weighted, for the lists that are
            trained on.
        truncated: What to do with a completion that was cut at max_new_tokens: keep it, exclude it (no reward is asked), or a
            number to subtract from its score.
        on_reward_error: What to do if a reward fails: raise, or skip (the completions of that chunk get no score).
        refill: Sample further prompts in place of those whose candidates all have the same score, until an iteration has
            prompts_per_iteration lists with an order.
        refill_most: Most rounds of refill, each of as many prompts as there are lists missing.
        memory: Candidates of earlier iterations that enter the lists: none, previous or all (paper: all).
        subset: What is trained on of each ranked list: all, [top, bottom], or paper: 1 against 3 for contrastive, 2 and 2 for
            listmle and lambdarank, 1 against 1 for pairwise.
        negatives: What the bottom of the subset holds: low (lowest rewards; paper), hard (of the lower half by reward those
            that the policy finds likely), related or random (candidates of another prompt).
        baseline: dpo: iterative DPO, the best against the worst of the same k, so that both spend the same generations.
        training: Settings of LarPOConfig: objective, beta, learning_rate, ...
        trained_layers: Train only this many of the last decoder layers (None: everything).
        peft: Settings of peft.LoraConfig: trains an adapter.
        model_init_kwargs: Arguments of from_pretrained: dtype, attn_implementation.
        keep_models: Which policies stay in the run folder: all, or last.
        eval_prompts: Held-out prompts: how many of `prompts` to hold out, or prompts of their own, given like `prompts`.
        eval_prompts_split: Split of `eval_prompts`, if they are a dataset on the hub.
        eval_k: Completions per held-out prompt, and the largest N of best-of-N and Recall@N.
        eval_temperatures: Temperatures of best-of-N and Recall@N; 1.0 is among them, where reward and KL are measured.
        solved_above: A completion with a higher reward solves its prompt (None: no Recall@N).

    Raises ValueError for a value that is out of its range, naming the field, and TypeError for prompts that are neither a
    source's name nor rows. A token of the hub that config.yaml has masked is taken from the environment, HF_TOKEN.
    """

    output_dir: str
    model: str
    prompts: Any
    reward: Any

    # --- the loop
    iterations: int = 3
    prompts_per_iteration: int | None = None
    prompts_split: str = "train"
    report_to: str | list[str] | None = "none"
    seed: int = 0
    reference: Literal["iteration", "initial"] = "iteration"

    # --- retrieve
    k: int = 10
    temperatures: Any = 1.0
    max_new_tokens: int = 256
    min_new_tokens: int | None = None
    eos_token: str | list[str] | None = None
    stop: str | list[str] | None = None
    top_k: int = 0
    top_p: float = 1.0
    distinct: bool = False
    sample_batch_size: int = 64
    chunk_size: int | None = None
    sampler: Literal["transformers", "vllm", "server"] = "transformers"
    sampler_options: dict[str, Any] = field(default_factory=dict)
    compared_prompts: int = 32
    logps_tolerance: float = 0.05

    # --- rerank
    reward_weights: list[float] | None = None
    normalise_rewards: bool = False
    truncated: Any = "keep"
    on_reward_error: Literal["raise", "skip"] = "raise"

    # --- lists
    refill: bool = False
    refill_most: int = 3
    memory: Literal["none", "previous", "all"] = "all"
    subset: Any = "paper"
    negatives: Literal["low", "hard", "related", "random"] = "low"
    baseline: Literal["dpo"] | None = None

    # --- train
    training: dict[str, Any] = field(default_factory=dict)
    trained_layers: int | None = None
    peft: dict[str, Any] | None = None
    model_init_kwargs: dict[str, Any] = field(default_factory=dict)
    keep_models: Literal["all", "last"] = "all"

    # --- evaluate
    eval_prompts: Any = 32
    eval_prompts_split: str = "test"
    eval_k: int = 4
    eval_temperatures: list[float] = field(default_factory=lambda: [1.0])
    solved_above: float | None = None

    def __post_init__(self):
        self.prompts = _rows("prompts", self.prompts)
        if not isinstance(self.eval_prompts, int):
            self.eval_prompts = _rows("eval_prompts", self.eval_prompts)
        optional = ("prompts_per_iteration", "trained_layers", "chunk_size")
        for name in ("iterations", "k", "refill_most", "max_new_tokens", "sample_batch_size", "eval_k", *optional):
            value = getattr(self, name)
            if not (is_whole(value, 1) or (value is None and name in optional)):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in ("compared_prompts", "logps_tolerance"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)!r}")
        hints = get_type_hints(AlignConfig)
        for name, hint in hints.items():
            value = getattr(self, name)
            if (choices := only_choices(hint)) and not (value is None and type(None) in kinds_of(hint)):
                check_choice(name, value, choices)
        for name in ("training", "model_init_kwargs", "sampler_options"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{name} must hold `name: value` settings, got {masked(getattr(self, name), name)!r}")
        self._check_ending()
        self._check_rewards()
        self._take_no_mask_for_a_secret()
        self._check_temperatures()
        self._check_combinations()
        self._check_training_names()
        for name, hint in hints.items():
            setattr(self, name, as_meant(name, getattr(self, name), hint))

    def _check_temperatures(self) -> None:
        for iteration in range(self.iterations):
            if temperature_at(self.temperatures, iteration, self.iterations) == 0 and self.k > 1:
                raise ValueError("temperatures must be above 0: at 0 all completions of a prompt are the same")
        held_out = self.eval_temperatures
        if not isinstance(held_out, Sequence) or 1.0 not in held_out:
            raise ValueError(f"eval_temperatures must hold 1.0, where reward and KL are measured; got {held_out!r}")
        if any(not temperature > 0 for temperature in held_out):
            raise ValueError(f"eval_temperatures must be above 0, got {held_out!r}")

    def _check_combinations(self) -> None:
        """Settings that are right by themselves, and not together."""
        if self.refill and self.prompts_per_iteration is None:
            raise ValueError("refill needs prompts_per_iteration: without it, an iteration has all prompts from the beginning")
        if self.k < 2 and self.memory == "none" and self.negatives in ("low", "hard"):
            raise ValueError("k must be at least 2: a list of one candidate has no order")
        if self.trained_layers is not None and self.peft is not None:
            raise ValueError("trained_layers and peft exclude each other: an adapter trains nothing of the model")
        if self.sampler == "vllm" and self.peft is not None:
            raise ValueError("sampler vllm reads a whole model from the run folder, and peft leaves an adapter there")
        if self.sampler == "transformers" and self.sampler_options:
            raise ValueError("sampler_options are of another engine: they need sampler vllm or server")
        if self.sampler == "server":
            server_settings(self.sampler_options)
        _, bottom = self.top_and_bottom()
        if bottom == 0 and self.negatives != "low":
            raise ValueError(f"negatives {self.negatives!r} fill the bottom of the subset, but subset={self.subset!r} has none")

    def _take_no_mask_for_a_secret(self) -> None:
        settings = {name: value for name, value in vars(self).items() if not _is_rows(name, value)}
        vars(self).update(given_again(settings))

    def _check_ending(self) -> None:
        least, most = self.min_new_tokens, self.max_new_tokens
        if least is not None and not (is_whole(least, 0) and least <= most):
            raise ValueError(f"min_new_tokens must be a whole number from 0 to max_new_tokens={most}, got {least!r}")
        for name in ("eos_token", "stop"):
            value = getattr(self, name)
            texts = [value] if isinstance(value, str) else value
            if value is not None and not (isinstance(texts, list | tuple) and all(isinstance(x, str) and x for x in texts)):
                raise ValueError(f"{name} must be a text or a list of texts, none of them empty; got {value!r}")
            if value is not None and not texts:
                raise ValueError(f"{name} must hold at least one text; got {value!r}")

    def _check_rewards(self) -> None:
        for one in self.rewards():
            if isinstance(one, Mapping):
                check_settings(one)
            groupwise = one.get("groupwise") if isinstance(one, Mapping) else getattr(one, "groupwise", False)
            if groupwise and self.memory != "none":
                raise ValueError(
                    f"memory must be 'none' with a groupwise reward ({_named(one)}): it scores the candidates of one iteration "
                    f"among each other; got {self.memory!r}"
                )
        cut = self.truncated
        if cut not in ("keep", "exclude") and not (is_number(cut) and 0 < cut < inf):
            raise ValueError(f"truncated must be 'keep', 'exclude' or a number above 0, got {cut!r}")

    def _check_training_names(self) -> None:
        from ..config import LarPOConfig

        known = {f.name for f in fields(LarPOConfig) if f.init} - OWNED.keys()
        for name in self.training:
            if name in OWNED:
                raise ValueError(f"training.{name} is settled by the loop: see {OWNED[name]}")
            if name not in known:
                raise ValueError(f"unknown setting training.{name}{nearest(name, known)}")
        if self.baseline == "dpo":
            if self.training.get("objective", "pairwise") != "pairwise":
                raise ValueError(f"baseline dpo is pairwise, but training.objective is {self.training['objective']!r}")
            if self.negatives != "low" or self.subset not in ("paper", [1, 1]):
                raise ValueError("baseline dpo takes the best against the worst: leave out subset and negatives")

    # --- what follows from the fields

    def training_settings(self) -> dict[str, Any]:
        """Settings of LarPOConfig, without those of one iteration (folder, seed)."""
        own = {"objective": "pairwise"} if self.baseline == "dpo" else {}
        settings = {**TRAINING_DEFAULTS, **self.training, **own}
        if settings.get("reference_free"):
            settings["precompute_ref_log_probs"] = False
        return settings

    @property
    def objective(self) -> str:
        return self.training_settings().get("objective", "contrastive")

    def top_and_bottom(self) -> tuple[int, int | None]:
        """How many of the best and of the worst of a list are trained on; None: all the others."""
        if self.subset == "all":
            return 1, None
        if self.subset == "paper":
            return PAPER_SUBSETS.get(self.objective, (1, None))
        pair = self.subset
        is_pair = isinstance(pair, Sequence) and len(pair) == 2 and all(is_whole(n, 0) for n in pair)
        if not is_pair or sum(pair) < 2:
            raise ValueError(f"subset must be 'all', 'paper' or [top, bottom] with at least 2 together, got {pair!r}")
        return tuple(pair)

    def stop_strings(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def prompts_of_a_chunk(self, k: int) -> int:
        """With k completions each."""
        by_batch = max(1, self.sample_batch_size // k) if self.sampler == "transformers" else 64
        return self.chunk_size or by_batch

    def temperature(self, iteration: int) -> float:
        """Of an iteration, counted from 1."""
        return temperature_at(self.temperatures, iteration - 1, self.iterations)

    def rewards(self) -> list[Any]:
        return list(self.reward) if isinstance(self.reward, list | tuple) else [self.reward]

    def to_dict(self) -> dict[str, Any]:
        """What config.yaml holds: plain values, a reward that is a Python object by its name, secrets masked."""
        rewards = [one if isinstance(one, Mapping) else _as_setting(one) for one in self.rewards()]
        values = vars(self) | {"reward": rewards if isinstance(self.reward, list | tuple) else rewards[0]}
        return {name: _plain(value if _is_rows(name, value) else masked(value, name)) for name, value in values.items()}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"


def _named(reward: Any) -> str:
    if isinstance(reward, Mapping):
        return masked(reward.get("url") or reward["reward"])
    return reward if isinstance(reward, str) else name_of(reward)


def _as_setting(reward: Any) -> Any:
    """The name of a reward; of a Judge also what makes it say other things: whether it sees whole lists, and its version."""
    own = ("groupwise", "version") if isinstance(reward, Judge) else ()
    said = {name: getattr(reward, name) for name in own if getattr(reward, name)}
    return {"reward": _named(reward)} | said if said else _named(reward)


def _is_rows(name: str, value: Any) -> bool:
    """Whether these are prompts themselves: data, in which nothing is masked."""
    return name in ("prompts", "eval_prompts") and isinstance(value, list | tuple)


def _rows(name: str, prompts: Any) -> Any:
    """A source's name as it is; rows as a list, which config.yaml can hold."""
    if isinstance(prompts, str | Path | list | tuple):
        return prompts
    if hasattr(prompts, "to_list") and hasattr(prompts, "column_names"):  # a Dataset, without loading `datasets` to know it
        return prompts.with_format(None).to_list()
    advice = ""
    if isinstance(prompts, Mapping):
        advice = "; choose a split"
    elif hasattr(prompts, "to_dict"):
        advice = "; a DataFrame becomes a list of rows with to_dict('records')"
    kinds = "a file, a name, a list of prompts or rows, or a datasets.Dataset"
    raise TypeError(f"{name} must be {kinds}, got {type(prompts).__name__}{advice}")


def _plain(value: Any) -> Any:
    """Without tuples and paths, so that what is read back from a file is equal."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def load_config(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> AlignConfig:
    """An AlignConfig from a YAML file, from settings that win over it, or from both.

    Args:
        path: a YAML file, or None.
        overrides: settings by name; one of `training`, `peft` or another group also as "training.learning_rate".

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown or a bad setting, with the line of the file and what is wrong.
    """
    (config,) = read_settings([AlignConfig], path, overrides or {})
    return config


def differences(before: Mapping[str, Any], after: AlignConfig) -> list[str]:
    """The settings by which a run would become another one, as sentences; none if it may go on."""
    before, now = (one | _what_counts(one) for one in (with_defaults(before, AlignConfig), after.to_dict()))
    found = changed(before, now, MAY_CHANGE)
    linear = isinstance(after.temperatures, Sequence) and after.temperatures[0] == "linear"
    if linear and before.get("iterations") != now["iterations"]:
        found.append(f"iterations was {before.get('iterations')!r}, and a linear temperature depends on it")
    return found


def _what_counts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a judge or a server that change its answers: not its address, or how often it is asked."""
    found = {"reward": settings_that_count(settings.get("reward"))}
    if settings.get("sampler") == "server":
        options = settings["sampler_options"]
        found["sampler_options"] = {name: options[name] for name in SAME_COMPLETIONS if name in options}
    return found

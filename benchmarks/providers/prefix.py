"""A whole training step of a language model on one list: every candidate in a row of its own, or the prompt run once.

The model is random and has the shape of a real one. On a CPU a tenth of its layers and a tenth of its vocabulary are built,
so that the head keeps its share of the work. A case is named P256-R64-m8: prompt tokens, completion tokens, candidates.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch

import larpo_kernels as lk
from benchmarks.core.problem import BETA, OBJECTIVE, identity
from benchmarks.core.truth import Target
from benchmarks.providers.registry import Output, provider
from larpo.modeling.prefix_sharing import DENSE_MASK_TOKENS, TOLERANCE
from larpo.modeling.row_layouts import TokenizedCandidate, backbone_inputs, padded_rows, shared_rows

SMOLLM2_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "rope_theta": 1e5,
}
LLAMA3_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_theta": 5e5,
}
SHARE = {"cpu": 10, "cuda": 1}  # one in so many of the layers and of the vocabulary
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # relative; orders of summation differ


@dataclass(frozen=True)
class Shape:
    prompt: int  # tokens
    completion: int  # tokens of each candidate
    m: int
    NAME: ClassVar = re.compile(r"P(\d+)-R(\d+)-m(\d+)")

    @classmethod
    def named(cls, name: str) -> Shape:
        found = cls.NAME.fullmatch(name)
        if not found:
            raise ValueError(f"shape: got {name!r}, expected a name as P256-R64-m8")
        return cls(*map(int, found.groups()))

    @property
    def bound(self) -> float:
        """Tokens that separate rows run for each token of the shared row."""
        return self.m * (self.prompt + self.completion) / (self.prompt + self.m * self.completion)


@dataclass
class ModelStep:
    """One list through one model; stands where the kernels' problems stand in `measure`."""

    case: str
    seed: int
    share: int  # one in so many of the layers and of the vocabulary
    dtype: torch.dtype
    device: torch.device
    model: torch.nn.Module
    candidates: list[TokenizedCandidate]
    rows: dict[str, torch.Tensor] = field(default_factory=dict)  # those of the provider under way
    side, mode = "prefix", "step"

    @classmethod
    def build(cls, case: str, dtype: torch.dtype, device: str, seed: int, share: int | None = None) -> ModelStep:
        from transformers import LlamaConfig, LlamaForCausalLM

        shape, share = Shape.named(case), share or SHARE[device]
        base = SMOLLM2_135M if device == "cpu" else LLAMA3_1B
        cut = {name: base[name] // share for name in ("num_hidden_layers", "vocab_size")}
        longest = shape.prompt + shape.completion
        config = LlamaConfig(**{**base, **cut}, tie_word_embeddings=True, max_position_embeddings=longest)
        config._attn_implementation = "sdpa" if device == "cpu" else "flex_attention"
        torch.manual_seed(seed)
        with torch.device(device):  # numbers are drawn where they are used: a CPU takes many seconds
            model = LlamaForCausalLM(config).to(dtype).eval()
        draw, lengths = torch.Generator().manual_seed(seed), [shape.prompt, *[shape.completion] * shape.m]
        prompt, *completions = (torch.randint(config.vocab_size, (n,), generator=draw).tolist() for n in lengths)
        candidates = [TokenizedCandidate(prompt, completion) for completion in completions]
        return cls(case, seed, share, dtype, torch.device(device), model, candidates)

    def logps(self) -> torch.Tensor:
        """[m] log-likelihoods through the backbone and the fused head."""
        rows = self.rows
        inputs = backbone_inputs(rows, self.model.config, self.dtype)
        hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[rows["predictor_positions"]]
        weight = self.model.get_output_embeddings().weight
        return lk.linear_sequence_logps(hidden, weight, rows["labels"], cu_seqlens=rows["cu_seqlens"])

    def laid_out(self, rows: dict[str, torch.Tensor]) -> ModelStep:
        return replace(self, rows={name: x.to(self.device) for name, x in rows.items()})

    def fresh(self, *, copy: bool = False) -> ModelStep:
        self.model.zero_grad(set_to_none=True)
        return self

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: p.grad for name, p in self.model.named_parameters()}

    def first_list(self) -> ModelStep:
        """The list cut to two candidates: warms libraries up."""
        return replace(self, candidates=self.candidates[:2])

    def describe(self) -> dict:
        shape = Shape.named(self.case)
        scored, parameters = shape.m * shape.completion, sum(p.numel() for p in self.model.parameters())
        config = self.model.config
        return {
            **identity(self),
            "note": f"Llama, {config.num_hidden_layers} layers, {parameters / 1e6:.1f} M parameters, "
            f"{config._attn_implementation}; gradients to all parameters",
            "candidates": shape.m,
            "lists": 1,
            "m": shape.m,
            "T": shape.m * (shape.prompt + shape.completion),
            "scored_tokens": scored,
            "masked": round(shape.prompt / (shape.prompt + shape.completion), 4),
            "H": config.hidden_size,
            "V": config.vocab_size,
            "P": shape.prompt,
            "R": shape.completion,
            "bound": shape.bound,
            "gemm_flops": 0,
            "traffic_bytes": 0,
            "gradient_bytes": parameters * self.dtype.itemsize,
        }

    def save(self, path: Path) -> None:
        """The recipe: the model is drawn again from its seed."""
        recipe = {name: getattr(self, name) for name in ("side", "case", "dtype", "seed", "share")}
        torch.save({**recipe, "device": self.device.type}, path)


class SeparateRows:
    """What the shared prompt must agree with: log-likelihoods and gradients of rows apart, in the same dtype."""

    def __init__(self, problem: ModelStep):
        self.problem = problem
        out = separate(apart(problem).fresh())
        out.value.backward()
        self.logps = out.logps
        self.gradients = {name: g.clone() for name, g in problem.gradients().items()}

    def target(self, computes: str) -> Target:
        return Target(None, None)  # each provider ends in one loss of its own

    def errors(self, computes: str, value, logps, gradients: dict[str, torch.Tensor]) -> dict[str, float]:
        """Greatest difference of a log-likelihood, nats; relative difference of all gradients together."""
        wrong = sum((g - self.gradients[name]).double().square().sum() for name, g in gradients.items())
        right = sum(g.double().square().sum() for g in self.gradients.values())
        return {"logps": float((logps - self.logps).abs().max()), "d_weights": float((wrong / right).sqrt())}

    def limits(self, eager: dict[str, float], computes: str, **rounding) -> dict[str, float]:
        tokens, dtype = Shape.named(self.problem.case).completion, self.problem.dtype
        return {"logps": TOLERANCE[dtype] * tokens**0.5, "d_weights": GRADIENT_TOLERANCE[dtype]}


def apart(problem: ModelStep) -> ModelStep:
    return problem.laid_out(padded_rows(problem.candidates, pad_token_id=0))


def together(problem: ModelStep) -> ModelStep:
    most = DENSE_MASK_TOKENS if problem.device.type == "cpu" else None
    return problem.laid_out(shared_rows(problem.candidates, pad_token_id=0, max_completion_tokens=most))


def _loss(problem: ModelStep) -> Output:
    logps = problem.logps()
    relevance = torch.arange(len(logps), device=logps.device)
    loss = lk.listwise_loss(BETA * logps, relevance, list_sizes=len(logps), objective=OBJECTIVE)
    return Output(loss, logps.detach())


@provider("separate rows", "prefix", prepare=apart)
def separate(problem: ModelStep) -> Output:
    return _loss(problem)


@provider("ours (shared prompt)", "prefix", prepare=together)
def shared(problem: ModelStep) -> Output:
    return _loss(problem)

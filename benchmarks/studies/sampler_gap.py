"""How far a sampler's log-likelihoods are from the trainer's: for rounding, and for the errors that `logps_tolerance` of
`larpo align` must tell from it.

    python -m benchmarks.studies.sampler_gap

SmolLM2-135M in float32 completes openings of film reviews; then it reads them again in bfloat16, behind a prompt of other
tokens, and with noise in its weights, as if these were another policy's. Nats per token.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from larpo.align.other_engine import token_logps
from larpo.align.prompts import imdb_openings
from larpo.modeling.loading import load_causal_lm, load_tokenizer
from larpo.offline import smollm2_folder
from larpo.runs.files import Rows
from larpo.sampling import TransformersSampler


def with_noise(model: nn.Module, share: float) -> nn.Module:
    """Every weight off by a normal number, of this share of the spread of its matrix."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * share)
    return model


def cases(folder: str, model: nn.Module, rows: Rows, bos: int) -> Iterator[tuple[str, nn.Module, Rows]]:
    yield "bfloat16", load_causal_lm(folder, {"dtype": "bfloat16"}).eval(), rows
    yield "the prompt's first token left out", model, [row | {"prompt_ids": row["prompt_ids"][1:]} for row in rows]
    yield "a BOS too many", model, [row | {"prompt_ids": [bos, *row["prompt_ids"]]} for row in rows]
    for share in (0.001, 0.01):
        yield f"noise of {share:.1%} in the weights", with_noise(load_causal_lm(folder).eval(), share), rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    asked = parser.parse_args()
    folder = str(smollm2_folder())
    model, tokenizer = load_causal_lm(folder).eval(), load_tokenizer(folder)
    prompts = [row["prompt"] for row in imdb_openings()[: asked.prompts]]
    lists = TransformersSampler(model, tokenizer, asked.tokens)(prompts, asked.k, 1.0, seed=0)
    rows = [
        {"prompt_ids": list(found[0].prompt_ids), "completion_ids": [list(one.token_ids) for one in found]} for found in lists
    ]
    own = _flat(token_logps(model, rows, 0))
    print(f"{len(own)} tokens")
    for name, other, theirs in cases(folder, model, rows, tokenizer.bos_token_id):
        apart = np.abs(_flat(token_logps(other, theirs, 0)) - own)
        print(f"{name:36} mean {apart.mean():.4f}  most {apart.max():.3f}", flush=True)


def _flat(logps: Iterator[list[list[float]]]) -> np.ndarray:
    return np.concatenate([one for row in logps for one in row])


if __name__ == "__main__":
    main()

"""SmolLM2-135M on four kinds of text, as cases: answers to a quiz, its own samples, film reviews and news.

The first two are the benchmark's own cases. Of reviews and news the first tokens of 64 documents are 16 lists of 4 candidates.
"""

from __future__ import annotations

import torch

from benchmarks.core import cases
from larpo import offline

LISTS, LENGTH = 16, 64  # of documents; tokens of each


def _reviews() -> list[str]:
    return offline.imdb_reviews()[0]


def _news() -> list[str]:
    return [row["document"].replace("\n", " ") for row in offline.json_lines("data/XSum/test.jsonl")]


DOCUMENTS = {"film reviews": _reviews, "news": _news}
NAMES = {"quiz answers": cases.OPENBOOKQA[0], "own samples": cases.SAMPLED}
TEXTS = (*NAMES, *DOCUMENTS)


def build(name: str, progress: bool = True) -> cases.Case:
    """In float32. Scored once; the cache folder keeps it."""
    if name in NAMES:
        return cases.build(NAMES[name], progress=progress)
    from safetensors.torch import load_file, save_file

    def score(path) -> None:
        model, tokenizer = offline.load_smollm2(progress=progress)
        tokens = (tokenizer(text, add_special_tokens=False).input_ids for text in DOCUMENTS[name]())
        long = [ids[: LENGTH + 1] for ids in tokens if len(ids) > LENGTH][: 4 * LISTS]
        hidden, labels = cases.hidden_states(model, [(ids[:1], ids[1:]) for ids in long], progress)
        save_file({"hidden": hidden, "labels": labels}, path)

    path = offline.cache_folder() / "cases" / f"smollm2-{name.replace(' ', '-')}-v{cases.SCORED_VERSION}.safetensors"
    found = load_file(offline.build_once(path, score))
    hidden, labels = found["hidden"], found["labels"]
    weight = offline.smollm2_head(progress=progress)
    return cases.Case(
        name=name,
        hidden=hidden,
        weight=weight,
        labels=labels,
        relevance=torch.randn(len(labels), generator=torch.Generator().manual_seed(0)),
        list_sizes=4,
        ref_logps=cases.sequence_logps(hidden, weight, labels) + cases.reference_noise(len(labels), 0),
        note=f"SmolLM2-135M-Instruct on {name}, {len(labels)} documents of {LENGTH} tokens; random relevance",
    )

"""Errors of gradients with `tail_threshold`, against float64: tables and plot of docs/numerics.md.

python benchmarks/tail.py                # measures what docs/tail.json does not hold yet, writes page and plot
python benchmarks/tail.py --draw         # page and plot again, of what docs/tail.json and docs/tail_learning.json hold

SmolLM2-135M on four kinds of text (benchmarks/core/cases.py), and logits that were made up. A block of tokens shares the
rows that are kept. `exact` and `merged` are the library's own; `dropped`, and merging into more than one mean row, are a few
lines of PyTorch here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import larpo_kernels as lk
from benchmarks import tail_learning
from benchmarks.core import cases
from benchmarks.reporting.tables import filled
from benchmarks.studies import tails
from larpo.recipes.harness.report import markdown, over_seeds

DOCS = Path(__file__).resolve().parents[1] / "docs"
THRESHOLDS = {"2^-16": 2**-16, "2^-14": 2**-14, "2^-12": 2**-12, "1e-3": 1e-3, "2^-8": 2**-8, "1e-2": 1e-2}
SHOWN = ("2^-12", "1e-3")  # in the tables, and tried in training
TEXTS = {
    "quiz answers": cases.OPENBOOKQA[0],
    "own samples": cases.SAMPLED,
    "film reviews": "smollm2-reviews",
    "news": "smollm2-news",
}
SIZES = {"film reviews": (512, 1024, 2048), "news": (1024,)}  # tokens of a block; all tokens where none are given
PLOTTED = 1024  # tokens of the block that a text is drawn by, or what is nearest
GROUPS = (1, 8, 64)
MADE_UP = {"initialisation-like": "T512-H576-V49152-m4", "std 20": "T512-H576-V49152-m4-peaked"}
Row = dict[str, Any]


@dataclass(frozen=True)
class Block:
    """Tokens that share the rows that are kept, and the upstream gradient of each one's log-prob."""

    hidden: Tensor  # [n, H] float32
    weight: Tensor  # [V, H] float32
    labels: Tensor  # [n]
    upstream: Tensor  # [n]

    def first(self, n: int) -> Block:
        return replace(self, hidden=self.hidden[:n], labels=self.labels[:n], upstream=self.upstream[:n])


@dataclass(frozen=True)
class Exact:
    """In float64, then rounded to float32: what errors are measured against."""

    p: Tensor  # [V, n] probabilities
    d_hidden: Tensor  # [n, H]
    d_weight: Tensor  # [V, H]


def block_of(case: cases.Case) -> Block:
    """All tokens of a case that count, with the upstream gradients of the contrastive list loss."""
    at = case.labels != cases.IGNORED
    logps = cases.sequence_logps(case.hidden, case.weight, case.labels).requires_grad_()
    scores = 0.1 * (logps - case.ref_logps)
    lk.listwise_loss(scores, case.relevance, list_sizes=case.list_sizes, objective="contrastive").backward()
    upstream = logps.grad[:, None].expand(at.shape)[at]
    return Block(case.hidden[at].contiguous(), case.weight, case.labels[at], upstream)


def exact(block: Block, chunk: int = 512) -> Exact:
    weight, n = block.weight.double(), len(block.labels)
    p, d_hidden, d_weight = torch.empty(len(weight), n), torch.empty_like(block.hidden), torch.zeros_like(weight)
    for at in torch.arange(n).split(chunk):
        hidden = block.hidden[at].double()
        g = (hidden @ weight.T).softmax(1)
        p[:, at] = g.T.float()
        g.neg_()[torch.arange(len(at)), block.labels[at]] += 1
        g *= block.upstream[at, None].double()
        d_hidden[at] = (g @ weight).float()
        d_weight += g.T @ hidden
    return Exact(p, d_hidden, d_weight.float())


def relative(error: Tensor, truth: Tensor) -> float:
    """Length of the error over the length of the truth."""
    return float(error.norm() / truth.norm())


def rows_left_out(p: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """The rows that no token of the block gives more than the threshold, and that are nobody's target."""
    out = p.amax(1) <= threshold
    out[labels] = False
    return out.nonzero()[:, 0]


def groups_of(weight: Tensor, number: int, steps: int = 10) -> Tensor:
    """[V]: rows by k-means of the weight."""
    centres = weight[torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))[:number]].clone()
    for _ in range(steps if number > 1 else 1):
        owner = (weight @ centres.T - centres.square().sum(1) / 2).argmax(1)
        count = torch.bincount(owner, minlength=number).clamp(min=1)
        centres = torch.zeros_like(centres).index_add_(0, owner, weight) / count[:, None]
    return owner


def means(p: Tensor, weight: Tensor, owner: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Of the rows left out: each token's mass in each group [groups, n], and each group's mean row [groups, H], weighted by
    the probability that rows hold in the block."""
    mass = p.new_zeros(number, p.shape[1]).index_add_(0, owner, p)
    total = p.sum(1)
    sums = weight.new_zeros(number, weight.shape[1]).index_add_(0, owner, weight * total[:, None])
    return mass, sums / total.new_zeros(number).index_add_(0, owner, total).clamp(min=1e-30)[:, None]


def in_theory(block: Block, truth: Exact, threshold: float, groups: dict[int, Tensor]) -> Row:
    """What leaving rows out costs where everything else is exact, dropped and merged into each number of groups."""
    out = rows_left_out(truth.p, block.labels, threshold)
    p, weight, upstream = truth.p[out], block.weight[out], block.upstream[:, None]
    missing, mass = p.T @ weight, p.sum(0)
    row: Row = {
        "kept": 1 - len(out) / len(block.weight),
        "largest mass": float(mass.max()),
        "mean mass": float(mass.mean()),
        "dropped": relative(upstream * missing, truth.d_hidden),
        "d weight": relative(p @ (block.hidden * upstream), truth.d_weight),
        **bounds(block, truth, threshold, p, weight),
    }
    for number, owner in groups.items():
        mass, rows = means(p, weight, owner[out], number)
        row[f"merged into {number}"] = relative(upstream * (missing - mass.T @ rows), truth.d_hidden)
    return row


def bounds(block: Block, truth: Exact, threshold: float, p: Tensor, weight: Tensor) -> Row:
    """What the errors cannot exceed, of the rows left out: p [rows, n] and weight [rows, H]. Of d hidden, each token's mass
    times how far a row is from the mean row; of d weight, the threshold in every entry."""
    total = p.sum(1)
    distance = (weight - (total @ weight) / total.sum()).norm(dim=1)
    upstream = block.upstream.abs()
    return {
        "bound of d hidden": relative(upstream * p.sum(0) * distance.max(), truth.d_hidden) if len(p) else 0.0,
        "bound of d weight": float(len(p) ** 0.5 * threshold * (upstream @ block.hidden.norm(dim=1)) / truth.d_weight.norm()),
    }


def of_the_library(block: Block, truth: Exact, threshold: float | None) -> Row:
    """Errors as `linear_token_logps` gives them, and the rows that it kept."""
    token_logps = partial(lk.linear_token_logps, tail_threshold=threshold)
    with tails.in_blocks_of(len(block.labels)), lk.TailShares() as shares:
        return {**_errors(token_logps, block, truth, torch.float32), "kept": shares.rows}


def of_eager_bf16(block: Block) -> Row:
    """PyTorch's own errors in bfloat16 on the first tokens, against the gradients at the rounded inputs."""
    block = block.first(256)
    rounded = replace(block, hidden=block.hidden.bfloat16().float(), weight=block.weight.bfloat16().float())
    return _errors(lk.reference.linear_token_logps, rounded, exact(rounded), torch.bfloat16)


def _errors(token_logps: Callable[[Tensor, Tensor, Tensor], Tensor], block: Block, truth: Exact, dtype: torch.dtype) -> Row:
    hidden, weight = (x.clone().to(dtype).requires_grad_() for x in (block.hidden, block.weight))
    token_logps(hidden, weight, block.labels).backward(block.upstream)
    return {
        "d hidden": relative(hidden.grad - truth.d_hidden, truth.d_hidden),
        "d weight": relative(weight.grad - truth.d_weight, truth.d_weight),
    }


# --- what is measured ------------------------------------------------------------------------------------------


def blocks(name: str) -> dict[int, Block]:
    """By number of tokens."""
    whole = block_of(cases.build(TEXTS[name]))
    return {size: whole.first(size) for size in SIZES.get(name, (len(whole.labels),))}


def cancelling(block: Block, noise: float = 0.05) -> Block:
    """Every token twice with opposite upstream gradients, as of two candidates that hardly differ."""
    other = block.hidden * (1 + noise * torch.randn(block.hidden.shape, generator=torch.Generator().manual_seed(0)))
    hidden, upstream = torch.stack([block.hidden, other], 1), torch.stack([block.upstream, -block.upstream], 1)
    return Block(hidden.flatten(0, 1), block.weight, block.labels.repeat_interleave(2), upstream.flatten())


def random_upstream(block: Block) -> Block:
    return replace(block, upstream=torch.randn(len(block.labels), generator=torch.Generator().manual_seed(0)))


def measured(name: str, block: Block, thresholds: Sequence[str]) -> list[Row]:
    """A row without a threshold, and one for each."""
    truth, groups = exact(block), {number: groups_of(block.weight, number) for number in GROUPS}
    about = {"text": name, "tokens": len(block.labels)}
    rows = [{**about, "threshold": None, "exact": of_the_library(block, truth, None), "bf16 eager": of_eager_bf16(block)}]
    for label in thresholds:
        threshold = THRESHOLDS[label]
        row = in_theory(block, truth, threshold, groups)
        rows.append({**about, "threshold": label, **row, "merged": of_the_library(block, truth, threshold)})
    return rows


def measure(path: Path) -> list[Row]:
    from tqdm import tqdm

    found: list[Row] = json.loads(path.read_text()) if path.exists() else []
    done = {(row["text"], row["tokens"]) for row in found}
    reviews = blocks("film reviews")
    todo = [(name, block) for name in TEXTS if name != "film reviews" for block in blocks(name).values()]
    todo += [("film reviews, random upstream", random_upstream(reviews[512]))]
    todo += [("film reviews, cancelling upstream", cancelling(reviews[512]))]
    todo += [(f"made up, {name}", block_of(cases.build(case))) for name, case in MADE_UP.items()]
    todo += [("film reviews", block) for block in reviews.values()]
    for name, block in tqdm([(name, block) for name, block in todo if (name, len(block.labels)) not in done], unit="block"):
        plotted = name in TEXTS and (name not in SIZES or len(block.labels) == PLOTTED)
        found += measured(name, block, tuple(THRESHOLDS) if plotted else SHOWN)
        path.write_text(json.dumps(found, indent=1) + "\n")
    return found


# --- tables and the plot ------------------------------------------------------------------------------------------


def errors_table(found: list[Row]) -> list[Row]:
    """Two thresholds on every block, beside what exact float32 and eager bfloat16 err by."""
    shown = []
    for base in sorted((row for row in found if row["threshold"] is None), key=_place):
        for threshold in SHOWN:
            row = _at(found, base, threshold)
            shown.append(
                {
                    "text": base["text"],
                    "tokens": base["tokens"],
                    "threshold": threshold,
                    "rows kept": f"{row['merged']['kept']:.0%}",
                    "below the threshold, of a token: mean, most": f"{row['mean mass']:.1%}, {row['largest mass']:.0%}",
                    "d hidden: exact": _e(base["exact"]["d hidden"]),
                    "dropped": _e(row["dropped"]),
                    "merged": _e(row["merged"]["d hidden"]),
                    "bf16 eager": _e(base["bf16 eager"]["d hidden"]),
                    "d weight: exact": _e(base["exact"]["d weight"]),
                    "merged ": _e(row["merged"]["d weight"]),
                    "bf16 eager ": _e(base["bf16 eager"]["d weight"]),
                }
            )
    return shown


def groups_table(found: list[Row]) -> list[Row]:
    """What more than one mean row brings, on the largest block of every text."""
    largest = {row["text"]: row for row in sorted(found, key=_place) if row["threshold"] is None}
    return [
        {"text": name, "threshold": threshold, "rows kept": f"{row['kept']:.0%}", "dropped": _e(row["dropped"])}
        | {f"{number} mean row{'s' * (number > 1)}": _e(row[f"merged into {number}"]) for number in GROUPS}
        for name, base in largest.items()
        for threshold in SHOWN
        for row in [_at(found, base, threshold)]
    ]


def learning_table(found: list[Row]) -> list[Row]:
    """Mean and standard deviation over seeds, and how far a seed's reward is from the exact run's."""
    exact = {(row["world"], row["seed"]): row["reward"] for row in found if row["arm"] == "exact"}
    shown = []
    for world in (name for name in tail_learning.WORLDS if any(name == row["world"] and row["arm"] in SHOWN for row in found)):
        for arm in tail_learning.ARMS:
            rows = [row for row in found if (row["world"], row["arm"]) == (world, arm)]
            if rows:
                apart = [row["reward"] - exact[world, row["seed"]] for row in rows if (world, row["seed"]) in exact]
                shown.append(
                    {
                        "world": world,
                        "gradients": arm,
                        "seeds": len(rows),
                        "rows kept, %": over_seeds([100 * row["rows kept"] for row in rows], 0),
                        "reward before": over_seeds([row["start"] for row in rows]),
                        "after": over_seeds([row["reward"] for row in rows]),
                        "KL, nats": over_seeds([row["kl"] for row in rows], 2),
                        "reward minus exact's, seed by seed": ", ".join(f"{x:+.3f}" for x in apart) if arm != "exact" else "",
                    }
                )
    return shown


def _place(row: Row) -> tuple[bool, str, int]:
    """Texts first."""
    return row["text"] not in TEXTS, row["text"], row["tokens"]


def _at(found: list[Row], base: Row, threshold: str) -> Row:
    return next(
        row for row in found if (row["text"], row["tokens"], row["threshold"]) == (base["text"], base["tokens"], threshold)
    )


def _e(value: float) -> str:
    """As 2.3e-3; 1e-6 where no digit matters."""
    digits, power = f"{value:.{0 if value < 1e-5 else 1}e}".split("e")
    return f"{digits}e{int(power)}" if value else "0"


def written(text: str, found: list[Row], learned: list[Row]) -> str:
    """The page with its tables made anew."""
    tables = {"errors": errors_table(found), "groups": groups_table(found), "learning": learning_table(learned)}
    for name, rows in tables.items():
        text = filled(text, f"tail:{name}", markdown(rows))
    return text


def draw(found: list[Row], path: Path) -> None:
    """Errors and rows kept against the threshold: the four texts at the block nearest to 1024 tokens."""
    from benchmarks.reporting.plots import plt

    figure, (hidden, weight, kept) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    x = list(THRESHOLDS.values())
    for place, name in enumerate(TEXTS):
        bases = [row for row in found if row["text"] == name and row["threshold"] is None]
        base = min(bases, key=lambda row: abs(row["tokens"] - PLOTTED))
        rows, color = [_at(found, base, threshold) for threshold in THRESHOLDS], f"C{place}"
        label = f"{name}, {base['tokens']} tokens"
        hidden.loglog(x, [row["merged"]["d hidden"] for row in rows], "o-", color=color, label=label)
        hidden.loglog(x, [row["dropped"] for row in rows], ":", color=color)
        weight.loglog(x, [row["merged"]["d weight"] for row in rows], "o-", color=color)
        kept.semilogx(x, [row["merged"]["kept"] for row in rows], "o-", color=color)
        for axis, field in ((hidden, "d hidden"), (weight, "d weight")):
            axis.axhline(base["bf16 eager"][field], color=color, linewidth=0.7, linestyle="--")
    hidden.set(title="d hidden: merged (points), dropped (dotted)", ylabel="error relative to float64")
    weight.set(title="d weight")
    kept.set(title="rows kept", ylabel="share of the vocabulary", ylim=(0, 1))
    for axis in (hidden, weight, kept):
        axis.set(xlabel="threshold", xticks=x, xticklabels=list(THRESHOLDS))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    hidden.legend(fontsize=7, title="dashed: bfloat16 eager", title_fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    asked = parser.parse_args()
    file, page = DOCS / "tail.json", DOCS / "numerics.md"
    found = json.loads(file.read_text()) if asked.draw else measure(file)
    learned = json.loads((DOCS / "tail_learning.json").read_text())
    page.write_text(written(page.read_text(encoding="utf-8"), found, learned), encoding="utf-8")
    draw(found, DOCS / "tail.png")


if __name__ == "__main__":
    main()

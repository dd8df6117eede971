"""Time and memory of a training step on 1 to 1024 GPUs, on paper: docs/scaling.md. A model, not a measurement.

python benchmarks/scaling.py                    # prints the tables
python benchmarks/scaling.py --write            # and puts them and the plot into docs/
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.reporting.tables import aligned, as_markdown, filled

DOCS = Path(__file__).resolve().parents[1] / "docs"
GPUS = [2**i for i in range(11)]  # 1 to 1024
PLACES = {"DDP": "replicated", "FSDP2": "sharded over all GPUs", "FSDP2 + head": "and the head's rows over a node"}
HALF, FULL = 2, 4  # bytes of a bfloat16 and a float32


@dataclass(frozen=True)
class Machine:
    """Rates of one GPU, and of what connects them."""

    memory: float = 141e9  # bytes (H200)
    layers: float = 400e12  # FLOP/s that the layers reach: 40 % of 989e12, the dense bf16 peak. Not yet measured
    head: float = 790e12  # FLOP/s of the head's GEMMs. Not yet measured
    nvlink: float = 0.8 * 450e9  # bytes/s in one direction: 80 % of NVLink 4
    network: float = 0.8 * 50e9  # bytes/s in one direction and per GPU: 80 % of 400 Gb/s
    node: int = 8  # GPUs in one
    hop: float = 5e-6  # seconds of a step of a ring

    def collective(self, size: float, gpus: int) -> float:
        """Seconds in which each of so many GPUs gathers, or reduces and scatters, `size` bytes in all, by rings.

        A ring over several nodes crosses as many network cards of a node as it has GPUs, one each.
        """
        if gpus == 1:
            return 0.0
        rate = self.nvlink if gpus <= self.node else min(self.nvlink, self.node * self.network)
        return size * (gpus - 1) / gpus / rate + self.hop * (gpus - 1)


@dataclass(frozen=True)
class Policy:
    """The shape of a transformer with gated feed-forward layers and grouped keys."""

    name: str
    layers: int
    hidden: int
    feed_forward: int
    key_values: int  # width of keys, and of values
    vocabulary: int

    @property
    def layer(self) -> int:
        """Parameters of a layer."""
        return self.hidden * (2 * self.hidden + 2 * self.key_values + 3 * self.feed_forward)

    @property
    def head(self) -> int:
        return self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        """Embedding and head are two."""
        return self.layers * self.layer + 2 * self.head


@dataclass(frozen=True)
class Work:
    """What a GPU does in a step: so many forwards and backwards, each of so many candidates."""

    passes: int
    candidates: int
    prompt: int = 512
    answer: int = 512

    @classmethod
    def of(cls, gpus: int, lists: int, candidates: int) -> Work:
        """A GPU's share of a step of so many lists: whole lists one after the other, or a part of a list's candidates."""
        passes = max(1, lists // gpus)
        return cls(passes, max(1, candidates * lists // (gpus * passes)))

    @property
    def tokens(self) -> int:
        return self.candidates * (self.prompt + self.answer)

    @property
    def scored(self) -> int:
        return self.candidates * self.answer


POLICIES = (
    Policy("7B", layers=28, hidden=3584, feed_forward=18944, key_values=512, vocabulary=152064),  # as Qwen2.5-7B
    Policy("70B", layers=80, hidden=8192, feed_forward=28672, key_values=1024, vocabulary=128256),  # as Llama-3-70B
)
PASSES = 1 + 1 + 1 + 2  # forwards' worth of the layers: reference, policy, recomputed for the backward, backward
HEAD_GEMMS = 1 + 3  # score_only for the reference, list_hold for the policy
TILE = 1 << 30  # bytes of a tile of logits (larpo_kernels.linear.tile_shapes.GPU_TILE_BYTES)


@dataclass(frozen=True)
class Step:
    seconds: float
    communicating: float  # seconds of it in which the GPU waits
    memory: float  # bytes on each GPU


def step(policy: Policy, work: Work, machine: Machine, gpus: int, place: str) -> Step:
    """One step of every GPU."""
    shards = 1 if place == "DDP" else gpus
    ranks = min(gpus, machine.node) if place == "FSDP2 + head" else 1  # that share the head's rows
    attention = 2 * work.tokens * (work.prompt + work.answer) * policy.hidden  # FLOP of a layer, causal: half of 4 T^2 H
    layer = (2 * work.tokens * policy.layer + attention) / machine.layers
    head = HEAD_GEMMS * 2 * work.scored * policy.head / machine.head

    hidden = FULL * ranks * work.scored * policy.hidden  # of all ranks that share the head, float32
    if place == "DDP":  # gradients are reduced while the backward goes on, the last layer's after it
        reduce = 2 * machine.collective(FULL * policy.layer, gpus)
        waiting = policy.layers * max(0.0, reduce - 3 * layer) + 2 * machine.collective(2 * FULL * policy.head, gpus)
    else:
        gather, reduce = machine.collective(HALF * policy.layer, gpus), machine.collective(FULL * policy.layer, gpus)
        waiting = policy.layers * (2 * max(0.0, gather - layer) + max(0.0, gather + reduce - 3 * layer))
        embedding = 3 * machine.collective(HALF * policy.head, gpus) + machine.collective(FULL * policy.head, gpus)
        over_ranks = 2 * machine.collective(hidden / 2, ranks) + 2 * machine.collective(hidden, ranks)  # h twice, d h once
        over_nodes = 2 * machine.collective(FULL * policy.head / ranks, gpus // ranks)  # d weight of the same rows
        waiting += embedding + (embedding if ranks == 1 else over_ranks + over_nodes)

    state = FULL + FULL + 2 * FULL  # master weights, gradients, two moments of Adam
    reference = HALF
    body = policy.parameters - (policy.head if ranks > 1 else 0)
    memory = (state + reference) * (body / shards + (policy.head / ranks if ranks > 1 else 0))
    if place == "DDP":
        memory += HALF * policy.parameters  # bf16 weights to compute with
    else:
        memory += HALF * (2 * policy.layer + policy.head) + FULL * policy.layer  # gathered: two layers, embedding; a gradient
        memory += (HALF + FULL) * policy.head if ranks == 1 else HALF * policy.head / ranks
    memory += HALF * work.tokens * policy.hidden * policy.layers  # what checkpointing keeps: the input of each layer
    memory += HALF * work.tokens * (8 * policy.hidden + 4 * policy.feed_forward)  # a layer while it is recomputed
    logits = HALF * work.scored * policy.vocabulary  # as many with more tokens and fewer rows of the head
    memory += min(TILE, logits) + logits + 2 * hidden  # a tile, E held for the backward, h and d h
    waiting *= 1 if place == "DDP" else work.passes  # DDP reduces gradients once a step, FSDP gathers weights in each pass
    return Step(work.passes * (policy.layers * PASSES * layer + head) + waiting, waiting, memory)


def steps(policy: Policy, batch: tuple[int, int], machine: Machine, place: str) -> list[Step]:
    return [step(policy, Work.of(gpus, *batch), machine, gpus, place) for gpus in GPUS]


def table(policy: Policy, batch: tuple[int, int], machine: Machine) -> list[list[str]]:
    """A line for each number of GPUs: seconds and gigabytes of each way to place parameters; brackets: it does not fit."""
    lines = [["GPUs", "on each"]]
    for place in PLACES:
        lines[0] += [f"{place}: s", "waiting", "GB"]
    columns = [steps(policy, batch, machine, place) for place in PLACES]
    for i, gpus in enumerate(GPUS):
        work = Work.of(gpus, *batch)
        line = [str(gpus), f"{work.passes} x {work.candidates}"]
        for column in columns:
            s = column[i]
            cells = [f"{s.seconds:.2f}", f"{s.communicating / s.seconds:.0%}", f"{s.memory / 1e9:.0f}"]
            line += cells if s.memory <= machine.memory else [f"({cell})" for cell in cells]
        lines.append(line)
    return lines


def written(text: str, batch: tuple[int, int], machine: Machine) -> str:
    """The page with its tables made anew."""
    for policy in POLICIES:
        text = filled(text, f"scaling:{policy.name}", as_markdown(table(policy, batch, machine), "---:"))
    return text


def draw(batch: tuple[int, int], machine: Machine, path: Path) -> None:
    from benchmarks.reporting.plots import plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex=True)
    for row, policy in zip(axes, POLICIES, strict=True):
        for place, style in zip(PLACES, ("o--", "s-", "D:"), strict=True):
            found = steps(policy, batch, machine, place)
            row[0].plot(GPUS, [s.seconds for s in found], style, label=place)
            row[1].plot(GPUS, [s.memory / 1e9 for s in found], style, label=place)
        ideal = steps(policy, batch, machine, "FSDP2")[0].seconds
        row[0].plot(GPUS, [ideal / gpus for gpus in GPUS], color="grey", linewidth=1, label="one GPU's time shared out")
        title = f"{policy.name}: time of {batch[0]} lists of {batch[1]}"
        row[0].set(ylabel="seconds a step", title=title, yscale="log")
        row[1].set(ylabel="GB a GPU", title=f"{policy.name}: memory", yscale="log")
        row[1].axhline(machine.memory / 1e9, color="grey", linewidth=1)
        row[1].annotate("an H200", (GPUS[-1], machine.memory / 1e9), color="grey", va="top", ha="right")
    for axis in axes[1]:
        axis.set(xlabel="GPUs", xscale="log")
        axis.set_xticks(GPUS[::2], [str(gpus) for gpus in GPUS[::2]])
        axis.minorticks_off()
    axes[0, 0].legend()
    figure.suptitle("A model, not a measurement")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    machine = Machine()
    parser.add_argument("--layer-flops", type=float, default=machine.layers, help="FLOP/s that the layers reach")
    parser.add_argument("--head-flops", type=float, default=machine.head, help="FLOP/s that the head's GEMMs reach")
    parser.add_argument("--network", type=float, default=machine.network, help="bytes a second between nodes, per GPU")
    parser.add_argument("--lists", type=int, default=128, help="of a step, over all GPUs")
    parser.add_argument("--candidates", type=int, default=8, help="of each list")
    parser.add_argument("--write", action="store_true", help="put tables and plot into docs/")
    asked = parser.parse_args()
    machine = Machine(layers=asked.layer_flops, head=asked.head_flops, network=asked.network)
    batch = asked.lists, asked.candidates
    for policy in POLICIES:
        print(f"{policy.name}: {policy.parameters / 1e9:.1f}e9 parameters")
        print(aligned(table(policy, batch, machine)), end="\n\n")
    if asked.write:
        page = DOCS / "scaling.md"
        page.write_text(written(page.read_text(encoding="utf-8"), batch, machine), encoding="utf-8")
        draw(batch, machine, DOCS / "scaling.png")


if __name__ == "__main__":
    main()

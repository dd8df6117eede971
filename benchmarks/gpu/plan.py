"""What gpu_check does, in which order, and how long each step may take: what matters most comes first.

A step is a generator of rows in a module of this folder, called with a Context and the step's arguments.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu import device
from benchmarks.gpu.steps import Step

MINUTES = 7.75  # that the seconds below add up to
LAST_S = 15  # kept for plots and tables


@dataclass(frozen=True)
class Context:
    """What a step is told."""

    rows: Path  # of all steps
    launch: Path | None  # the tuned launches, if the file exists
    seconds: float  # for this step


@dataclass(frozen=True)
class Planned:
    name: str
    what: str
    function: str  # module.generator
    seconds: float  # planned
    arguments: tuple = ()
    patience: float = 1.0  # the limit, as a multiple of the plan; later steps pay for what is above 1
    imports: tuple[str, ...] = ()  # before it waits for the GPU, where they are installed
    beside: bool = False  # runs at the same time as the one before
    reserved: bool = False  # those before it leave its seconds

    def rows(self, context: Context):
        return self._generator()(context, *self.arguments)

    def _generator(self):
        module, _, name = self.function.rpartition(".")
        return getattr(importlib.import_module(module if "." in module else f"benchmarks.gpu.{module}"), name)

    def load(self) -> None:
        """Everything that takes long to import, and nothing that touches the GPU."""
        self._generator()
        for name in self.imports:
            try:
                importlib.import_module(name)
            except Exception as error:  # the step will say what it misses
                print(f"{name}: {type(error).__name__}: {error}")


@dataclass(frozen=True)
class Shapes:
    """What is measured; in a dry run, small enough for a CPU."""

    rows: tuple[tuple[int, int, str], ...]  # tokens, vocabulary, dtype
    heads: tuple[tuple[int, int, int, int], ...]  # tokens, ignored, hidden, vocabulary
    cases: tuple[tuple[str, str, str], ...]  # name, side, mode
    peer_case: str
    model: str
    smoke_rows: tuple[tuple[int, int, str], ...]
    smoke_head: tuple[int, int, int]  # tokens, hidden, vocabulary
    big_rows: tuple[tuple[int, int], ...]
    big_head: tuple[int, int, int]
    graph: tuple[int, int, int, int]  # candidates, tokens, hidden, vocabulary
    batch: tuple[int, int, int]  # candidates, tokens, vocabulary
    profile: tuple[int, int, int]  # tokens, hidden, vocabulary
    runs: int  # that must all give the same numbers
    more_than: int  # elements of what is called big


REAL = Shapes(
    rows=(
        *((t, 128256, "bfloat16") for t in (8192, 1024, 64, 4096, 256, 16384)),
        *((8192, v, "bfloat16") for v in (32000, 151936, 50257)),
        (4096, 262144, "bfloat16"),
        (1024, 32000, "bfloat16"),
        (4096, 128256, "float32"),
    ),
    heads=((8192, 0, 4096, 128256), (16384, 0, 4096, 32000), (1024, 0, 4096, 128256), (4096, 3, 4096, 128256)),
    cases=(
        ("T8192-H4096-V128256-m8", "logits", "train"),
        ("T8192-H4096-V128256-m8", "linear", "trainable"),
        ("T8192-H4096-V128256-m8", "linear", "frozen"),
        ("T16384-H4096-V32000-m8", "linear", "trainable"),
        ("T4096-H4096-V262144-m8", "logits", "train"),
        ("T8192-H4096-V128256-m8-peaked", "linear", "trainable"),
    ),
    peer_case="T8192-H4096-V128256-m8",
    model="P1024-R1024-m8",
    smoke_rows=((512, 128256, "bfloat16"), (300, 50257, "bfloat16"), (64, 32000, "float32"), (4, 262144, "float16")),
    smoke_head=(1003, 512, 32000),
    big_rows=((70_000, 32_000), (9_000, 262_144), (66_000, 50_257)),
    big_head=(80_000, 64, 32_768),
    graph=(16, 32, 256, 32_000),
    batch=(64, 64, 128_256),
    profile=(8192, 4096, 128256),
    runs=100,
    more_than=2**31,
)
TINY = Shapes(
    rows=((64, 100, "bfloat16"), (8, 40, "float32")),
    heads=((64, 3, 16, 96),),
    cases=(("T64-H16-V96-m4", "logits", "train"), ("T64-H16-V96-m4", "linear", "frozen")),
    peer_case="T64-H16-V96-m4",
    model="P8-R8-m2",
    smoke_rows=((96, 100, "bfloat16"), (96, 40, "float32")),
    smoke_head=(96, 16, 80),
    big_rows=((96, 100),),
    big_head=(120, 16, 96),
    graph=(8, 12, 16, 64),
    batch=(64, 4, 40),
    profile=(64, 16, 96),
    runs=3,
    more_than=1000,
)

COMPILER = ("torch._inductor.compile_fx", "transformers.integrations.flex_attention")  # a dry run compiles nothing
LLAMA = "transformers.models.llama.modeling_llama"

# name: provider, imports, sides and modes, seconds
PEERS = (
    ("trl fused head", ("trl.trainer.utils",), (("linear", "trainable"), ("linear", "frozen")), 15),
    ("liger fused_linear_cross_entropy", ("liger_kernel.transformers",), (("linear", "trainable"), ("linear", "frozen")), 14),
    ("cut-cross-entropy", ("cut_cross_entropy",), (("linear", "trainable"), ("linear", "frozen")), 14),
    ("liger cross_entropy", ("liger_kernel.transformers",), (("logits", "train"),), 10),
    ("trl selective_log_softmax", ("trl.kernels",), (("logits", "train"),), 10),
    ("liger DPO", ("liger_kernel.chunked_loss",), (("linear", "trainable"), ("linear", "frozen")), 20),
)


def shapes() -> Shapes:
    return TINY if device.dry() else REAL


def plan() -> list[Planned]:
    sizes, compiler = shapes(), () if device.dry() else COMPILER[:1]
    cases = [
        Planned(f"{side} {mode} {name}", "ours and others", "speed.case", 15, (name, side, mode), 1.7, compiler)
        for name, side, mode in sizes.cases
    ]
    compiled = [
        Planned(f"ahead: {one.name}", "torch.compile's code", "ahead.inductor", 35, one.arguments, 1.25, compiler, beside=True)
        for one in cases
        if "peaked" not in one.name
    ]
    peers = [
        Planned(name, "a peer", "speed.peer", s, (name, modes), 1.7, (*imports, *compiler)) for name, imports, modes, s in PEERS
    ]
    training = "a training step, a prompt run once or for each candidate"
    of_model = (LLAMA, *(() if device.dry() else COMPILER))
    return [
        Planned("smoke: rows", "from logits, against float64", "correct.smoke_rows", 35, patience=1.5),
        _beside("smoke: head", "every schedule, against float64", "correct.smoke_head", 35, patience=1.5),
        _beside("smoke: graph", "one CUDA graph, forward and backward", "correct.smoke_graph", 35, patience=1.5),
        _beside("ahead: launches", "the candidates' kernels, for tune", "ahead.launches", 35),
        *compiled,
        Planned("tune", "launch parameters", "speed.tune", 45),
        Planned("rows", "from logits, against copying as many bytes", "speed.rows", 25, patience=1.3),
        Planned("head", "from hidden and weight, against the GEMMs alone", "speed.head", 35, patience=1.3),
        *cases,
        *peers,
        Planned("profile", "kernels by time", "speed.profile", 12),
        Planned("graphs", "no waiting for the device; CUDA graphs, forward and backward", "correct.graphs", 75),
        _beside("determinism", "the same numbers in 100 runs, and in any batch", "correct.determinism", 75),
        _beside("big", "more than 2^31 elements and more than 65,535 rows", "correct.big", 75),
        _beside("ahead: model", "FlexAttention's code", "ahead.model", 75, imports=of_model),
        _beside("tests", "the kernel tests", "correct.tests", 75, patience=10),
        Planned("model", training, "speed.model", 45, patience=10, imports=of_model, reserved=True),
    ]


def _beside(*arguments, **options) -> Planned:
    return Planned(*arguments, beside=True, **options)


def planned_seconds() -> float:
    return sum(one.seconds for one in plan() if not one.beside)


def steps(
    command: list[str], minutes: float, only: list[str] | None, environment: dict[str, str], peers: Path | None
) -> list[Step]:
    """command: to which a step's name is appended. peers: a folder of libraries, for the steps that measure them."""
    scale = max(0.0, 60 * minutes - LAST_S) / (60 * MINUTES - LAST_S)
    paths = [str(peers.resolve())] if peers else []
    with_peers = {**environment, "PYTHONPATH": os.pathsep.join([environment["PYTHONPATH"], *paths])}
    found, together = [], False  # whether a step that `one` runs beside is among the found
    for one in plan():
        together = together and one.beside
        if only and not any(word in one.name for word in only):
            continue
        limit = one.seconds * scale * one.patience
        found.append(
            Step(
                one.name,
                one.what,
                [*command, one.name, "--seconds", f"{limit:.1f}"],
                limit,
                reserved_s=one.seconds * scale if one.reserved else 0.0,
                beside=together,
                waits=True,
                environment=with_peers if one.what == "a peer" else environment,
            )
        )
        together = True
    return found

"""Which cases, from which side, in which dtype: the named suites."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from benchmarks.core.machine import has_native_bfloat16
from benchmarks.core.problem import SIDES


@dataclass(frozen=True)
class Job:
    """One case on one side; its modes share the float64 truth."""

    case: str
    side: str
    modes: tuple[str, ...]
    dtype: str = "auto"  # bfloat16, or float32 for GEMMs on a CPU that has no bfloat16 of its own

    def resolve(self, device: str) -> Job:
        if self.dtype != "auto":
            return self
        fast = self.side == "logits" or has_native_bfloat16(device)
        return replace(self, dtype="bfloat16" if fast else "float32")


REAL, SAMPLED = "smollm2-openbookqa", "smollm2-sampled"
TRAINING = ("frozen", "trainable")
SMALL = ((4, 5, 100), (16, 16, 100), (64, 32, 1000), (512, 64, 1000))  # candidates, tokens of each, vocabulary
HEADS = ("T2048-H896-V32000-m8", "T2048-H896-V151936-m8", "T2048-H2048-V128256-m8", "T4096-H512-V128256-m8")
VOCABULARIES = (32000, 128256, 151936, 262144)
LIST_SIZES = (2, 4, 8, 16)


def quick() -> list[Job]:
    return [Job(REAL, "logits", ("train",)), Job(REAL, "linear", TRAINING)]


def logits() -> list[Job]:
    real = [Job(REAL, "logits", SIDES["logits"], dtype) for dtype in ("bfloat16", "float32")]
    by_vocabulary = [Job(f"T1024-H128-V{v}-m8", "logits", ("train",)) for v in VOCABULARIES]
    by_list_size = [Job(f"T1024-H128-V32000-m{m}", "logits", ("train",)) for m in LIST_SIZES if m != 8]
    return [*real, *by_vocabulary, *by_list_size, Job("T1024-H128-V32000-m8-masked0.5", "logits", ("train",))]


def linear() -> list[Job]:
    real = [Job(REAL, "linear", SIDES["linear"]), Job(SAMPLED, "linear", TRAINING, "bfloat16")]
    heads = [Job(name, "linear", TRAINING, dtype) for name in HEADS for dtype in ("bfloat16", "float32")]
    by_list_size = [Job(f"T2048-H896-V32000-m{m}", "linear", TRAINING) for m in LIST_SIZES if m != 8]
    by_tokens = [Job(f"T{t}-H896-V32000-m8", "linear", TRAINING) for t in (512, 1024, 4096)]
    masked = [Job(f"T2048-H896-V32000-m8-masked{share}", "linear", TRAINING) for share in (0.25, 0.5, 0.75)]
    peaked = [Job("T2048-H896-V32000-m8-peaked", "linear", TRAINING)]
    return [*real, *heads, *by_list_size, *by_tokens, *masked, *peaked]


def full() -> list[Job]:
    """For a GPU: both sides at the sizes of today's models, then m and the masked share at one of them."""
    shape = "T{}-H4096-V{}-m{}".format
    grid = [shape(t, v, 8) for t in (4096, 8192, 16384) for v in VOCABULARIES]
    by_list_size = [shape(8192, 128256, m) for m in LIST_SIZES if m != 8]
    masked = [shape(8192, 128256, 8) + "-masked0.5"]
    names = [*grid, *by_list_size, *masked, shape(8192, 128256, 8) + "-peaked"]
    real = [Job(REAL, "logits", ("train",)), Job(SAMPLED, "linear", TRAINING, "bfloat16")]
    return [*real, *(Job(n, "logits", ("train",)) for n in names), *(Job(n, "linear", TRAINING) for n in names)]


def prefix(times: int = 1, dtype: str = "float32") -> list[Job]:
    """Whole training steps, the prompt shared or not: prompt to completion as 0.4, 1 and 4, by list size.

    times: how many times as long as on a CPU.
    """
    shapes = [(times * prompt, times * completion) for prompt, completion in ((64, 160), (128, 128), (256, 64))]
    return [Job(f"P{p}-R{r}-m{m}", "prefix", SIDES["prefix"], dtype) for p, r in shapes for m in (4, 8, 16)]


def trainer() -> list[Job]:
    """Training steps of LarPOTrainer and of TRL's DPOTrainer: four pairs, and a list of eight."""
    return [Job("L4-m2", "trainer", ("pairs",), "float32"), Job("L1-m8", "trainer", ("lists",), "float32")]


def small() -> list[Job]:
    """What a call costs beside its arithmetic, up to sizes where arithmetic takes nearly all the time."""
    sides = (("logits", ("train",)), ("linear", ("trainable",)))
    cases = [f"T{s * t}-H64-V{v}-m4-length{t}" for s, t, v in SMALL]
    return [Job(case, side, modes, "float32") for case in cases for side, modes in sides]


SUITES = {
    "quick": quick,
    "logits": logits,
    "linear": linear,
    "full": full,
    "small": small,
    "prefix": prefix,
    "prefix-long": partial(prefix, 8, "bfloat16"),  # for a GPU
    "trainer": trainer,
}


def jobs(suite: str, device: str, shapes: list[str] | None = None, dtypes: list[str] | None = None) -> list[Job]:
    """The suite's jobs; `shapes` puts other cases in their place, `dtypes` other dtypes."""
    if suite not in SUITES:
        raise ValueError(f"suite: got {suite!r}, expected one of {', '.join(SUITES)}")
    found = SUITES[suite]()
    if shapes:
        modes = {side: [j.modes for j in found if j.side == side] for side in SIDES}
        longest = {side: max(m, key=len) for side, m in modes.items() if m}
        found = [Job(shape, side, side_modes) for shape in shapes for side, side_modes in longest.items()]
    if dtypes:
        found = [replace(job, dtype=dtype) for job in found for dtype in dtypes]
    return list(dict.fromkeys(job.resolve(device) for job in found))

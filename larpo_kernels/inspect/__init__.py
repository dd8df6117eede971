"""What the compiler makes of every kernel, on any machine: no GPU is needed, and none is used.

python -m larpo_kernels.inspect --target sm_90 --json kernels.json

cases.py         the table of kernels and of the launches that are inspected
crosscompile.py  the launch code of backends/triton, run for a GPU that is not here
disassembly.py   machine code -> registers, spills, widths of loads and stores
loops.py         machine code -> its loops
targets.py       what the GPUs have, and how much of it a kernel can fill
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import triton

from .cases import choose
from .crosscompile import compile_case, reason_to_skip, require_compiler
from .disassembly import Loop, read
from .targets import TARGETS, Occupancy, Target, occupancy

__all__ = ["TARGETS", "KernelReport", "Report", "report"]


@dataclass(frozen=True)
class KernelReport:
    """One kernel as one launch compiles it for one target. Counts are instructions of a thread, widths bytes of a thread."""

    kernel: str
    variant: str
    target: str
    dtype: str
    aligned: bool  # rows start at multiples of 16 bytes; if not, rows of 32003 columns or 4093 tokens
    error: str | None = None  # why it did not compile; nothing below is known then
    warps: int = 0  # of one program
    registers: int = 0  # of one thread
    spills: int = 0  # instructions on local memory; on AMD spilled vector registers
    local_bytes: int = 0  # of one thread
    shared_bytes: int = 0  # of one program
    shared_limit: int = 0
    occupancy: Occupancy | None = None
    loads: dict[int, int] = field(default_factory=dict)  # width -> loads of that width from global memory
    stores: dict[int, int] = field(default_factory=dict)
    loops: list[Loop] = field(default_factory=list)  # in program order
    itemsize: int | None = None  # bytes of an element the loops read; None where they read more than one kind

    @property
    def main_loop(self) -> Loop | None:
        """The loop with the most exps; of equals the one that loads the most bytes, then one that stores, then the first."""
        return max(self.loops, key=lambda loop: (loop.exps, loop.bytes_loaded, bool(loop.stores)), default=None)

    @property
    def exps_per_element(self) -> float | None:
        """Of the main loop; None where it does not read one kind of element."""
        return self._per_element("exps")

    @property
    def instructions_per_element(self) -> float | None:
        """Likewise, of those that every turn runs: what else a multiprocessor has to issue beside moving the bytes."""
        return self._per_element("instructions")

    def _per_element(self, name: str) -> float | None:
        loop = self.main_loop
        if loop is None or not loop.loads or self.itemsize is None:
            return None
        return getattr(loop, name) * self.itemsize / loop.bytes_loaded

    @property
    def problems(self) -> list[str]:
        """What no shipped kernel may do."""
        if self.error:
            return [f"does not compile: {self.error}"]
        found = []
        if self.spills:
            found.append(f"spills ({self.spills})")
        if self.local_bytes:
            found.append(f"uses {self.local_bytes} bytes of local memory")
        if self.shared_bytes > self.shared_limit:
            found.append(f"needs {self.shared_bytes} bytes of shared memory, the target has {self.shared_limit}")
        return found

    def as_dict(self) -> dict:
        main = self.main_loop
        loop = None if main is None else asdict(main)
        properties = ("exps_per_element", "instructions_per_element", "problems")
        return asdict(self) | {"main_loop": loop} | {name: getattr(self, name) for name in properties}


@dataclass(frozen=True)
class Report:
    triton: str  # version
    kernels: list[KernelReport]
    skipped: dict[str, str]  # target -> why it could not be compiled for here

    def as_dict(self) -> dict:
        """Of what JSON knows."""
        kernels = [kernel.as_dict() for kernel in self.kernels]
        return {"triton": self.triton, "skipped": self.skipped, "kernels": kernels}


def report(
    targets: Sequence[str] | None = None,
    kernels: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    *,
    progress: Callable[[int, int, str], None] | None = None,
) -> Report:
    """Compiles each kernel as the launch code launches it, and reads the machine code.

    Args:
        targets: names from `TARGETS`; None for all of them.
        kernels: shell patterns for "kernel" or "kernel/variant", such as "list_losses/listnet*"; None for all.
        dtypes: of the logits, among "bf16", "fp16", "fp32"; None for all. Kernels that read no logits are always there.
        progress: called with (done, in all, what is compiled next).

    Raises:
        ValueError: an unknown target or dtype, or a pattern that fits no kernel.
        RuntimeError: Triton's interpreter has replaced the compiler (TRITON_INTERPRET).
    """
    targets = list(TARGETS if targets is None else targets)
    for name in targets:
        if name not in TARGETS:
            raise ValueError(f"targets must be among {list(TARGETS)}, got {name!r}")
    chosen = list(choose(kernels, dtypes))
    require_compiler()
    skipped = {name: reason for name in targets if (reason := reason_to_skip(TARGETS[name]))}
    work = [(case, name) for case in chosen for name in targets if name not in skipped]
    reports = []
    with ThreadPoolExecutor() as pool:  # the tools that read machine code work while the next kernel is compiled
        for i, (case, name) in enumerate(work):
            if progress:
                progress(i, len(work), f"{case.kernel}/{case.variant} {case.dtype} for {name}")
            what = dict(kernel=case.kernel, variant=case.variant, target=name, dtype=case.dtype, aligned=case.aligned)
            try:
                compiled = compile_case(case, TARGETS[name])
            except Exception as error:  # compilers raise what they like; that one kernel fails is a line of the report
                reason = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
                reports.append(pool.submit(KernelReport, **what, error=reason))
            else:
                reports.append(pool.submit(_read, compiled, TARGETS[name], what, case.itemsize))
    return Report(triton.__version__, [future.result() for future in reports], skipped)


def _read(compiled, target: Target, what: dict, itemsize: int | None) -> KernelReport:
    code = read(compiled.asm)
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    return KernelReport(
        **what,
        **vars(code),
        warps=warps,
        shared_bytes=shared,
        shared_limit=target.shared_per_block,
        occupancy=occupancy(target, code.registers, shared, warps),
        itemsize=itemsize,
    )

"""python -m larpo_kernels.inspect: a table of what every kernel compiles to, and the same as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..backends import has_triton

if TYPE_CHECKING:
    from . import KernelReport

COLUMNS = (
    *("kernel", "logits", "target", "warps", "registers", "spills", "shared", "loads", "stores"),
    *("exps per element", "instructions", "warps/SM"),
)
ABOUT = """\
logits: their dtype; "odd" if rows are not 16-byte aligned. registers: of a thread. spills: instructions on local memory.
shared: KB of a program, of the target's limit. loads, stores: what a thread issues to global memory in one turn of the
main loop (of the whole kernel where it has no loop), as width in bytes x count; other loops are in the JSON. exps and
instructions per element that the loop reads; instructions behind a branch do not count.
warps/SM: an estimate of how many fit, and what is used up first.
Exit status 1 if a kernel does not compile, spills, uses local memory or wants more shared memory than there is.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m larpo_kernels.inspect", description=__doc__, epilog=ABOUT, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--target", nargs="+", help="sm_80 sm_90 sm_100 gfx942; all of them by default")
    parser.add_argument("--kernel", nargs="+", help="shell patterns for kernel or kernel/variant, as 'list_losses/listnet*'")
    parser.add_argument("--dtype", nargs="+", help="bf16 fp16 fp32; all of them by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    options = parser.parse_args()
    if not has_triton():
        parser.error("this needs the package triton, which is not installed")
    from . import report

    try:
        result = report(options.target, options.kernel, options.dtype, progress=_progress if sys.stderr.isatty() else None)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    if options.json:
        options.json.write_text(json.dumps(result.as_dict(), indent=1) + "\n")
    show(result.kernels)
    for target, reason in result.skipped.items():
        print(f"{target} skipped: {reason}")
    bad = [kernel for kernel in result.kernels if kernel.problems]
    for kernel in bad:
        print(f"{kernel.kernel}/{kernel.variant} {kernel.dtype} for {kernel.target}: {'; '.join(kernel.problems)}")
    print(f"Triton {result.triton}: {len(result.kernels)} kernels compiled, {len(bad)} with problems")
    return 1 if bad else 0


def _progress(done: int, total: int, what: str) -> None:
    print(f"\r\x1b[K{done}/{total} {what}", end="\r\x1b[K" if done + 1 == total else "", file=sys.stderr, flush=True)


def show(kernels: list[KernelReport]) -> None:
    """Prints the table."""
    rows = [COLUMNS, *map(_row, kernels)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _row(k: KernelReport) -> tuple[str, ...]:
    name = (f"{k.kernel}/{k.variant}", k.dtype + ("" if k.aligned else " odd"), k.target)
    if k.error:
        return *name, "error", *[""] * (len(COLUMNS) - len(name) - 1)
    loop = k.main_loop
    shared = f"{k.shared_bytes / 1024:.1f} of {k.shared_limit // 1024}"
    accesses = _widths((loop or k).loads), _widths((loop or k).stores)
    per_element = ("" if x is None else f"{x:.2f}" for x in (k.exps_per_element, k.instructions_per_element))
    occupancy = f"{k.occupancy.warps} of {k.occupancy.most}, {k.occupancy.limit}"
    return *name, str(k.warps), str(k.registers), str(k.spills), shared, *accesses, *per_element, occupancy


def _widths(counts: dict[int, int]) -> str:
    return " ".join(f"{width}x{count}" for width, count in counts.items())


if __name__ == "__main__":
    sys.exit(main())

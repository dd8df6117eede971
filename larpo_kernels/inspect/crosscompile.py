"""Compiles kernels for GPUs that are not here, by the launch code itself: it runs on tensors without data, for a driver
that only says which GPU it stands for, and stops where the kernel would start. Arguments, constants, warps and the
compiler's assumptions on alignment are therefore those of a real launch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from triton import knobs
from triton.backends import backends
from triton.runtime import JITFunction, driver

from ..backends.triton.kernels import rows
from .cases import Case
from .targets import Target


class AbsentDevice:
    """What Triton asks its driver before it compiles."""

    def __init__(self, target: Target):
        self.target = target.gpu

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> str:
        return f"absent {self.target}"  # the key under which kernels keep what was compiled

    def get_current_stream(self, device) -> int:
        return 0


@contextmanager
def compiling_for(target: Target) -> Iterator[list]:
    """Inside, launches compile for the target and start nothing; the list receives what they compile."""
    compiled = []
    run, active = JITFunction.run, driver._active

    def only_compile(self, *args, warmup, **keywords):
        compiled.append(run(self, *args, warmup=True, **keywords))
        return compiled[-1]

    JITFunction.run = only_compile
    driver.set_active(AbsentDevice(target))
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = active  # reset_active would look for a GPU


def compile_case(case: Case, target: Target):
    """-> Triton's compiled kernel."""
    with compiling_for(target) as compiled:
        case.launch()
    found = [kernel for kernel in compiled if kernel.metadata.name == case.kernel]
    if not found:
        raise LookupError(f"the launch of {case.kernel}/{case.variant} started only {[k.metadata.name for k in compiled]}")
    return found[-1]


def require_compiler() -> None:
    if not isinstance(rows.token_logps_forward, JITFunction):
        raise RuntimeError(
            "TRITON_INTERPRET is set, so kernels run in Triton's interpreter and nothing is compiled; "
            "unset it and start a new process to inspect compiled kernels"
        )


def reason_to_skip(target: Target) -> str | None:
    """Why this Triton cannot compile for the target, or cannot show what it compiled; None if it can."""
    if not any(backend.compiler.supports_target(target.gpu) for backend in backends.values()):
        return f"Triton was built without the backend {target.gpu.backend!r} (it has {sorted(backends)})"
    if target.gpu.backend == "cuda":
        try:
            for tool in (knobs.nvidia.ptxas, knobs.nvidia.cuobjdump, knobs.nvidia.nvdisasm):
                tool.path  # noqa: B018  # looks for the tool
        except RuntimeError as error:
            return str(error)
    return None

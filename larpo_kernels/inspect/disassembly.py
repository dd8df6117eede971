"""Machine code of one kernel -> what it costs. NVIDIA: the tools in Triton's wheel; AMD: the assembly Triton keeps."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass

from triton import knobs

from .loops import Body, Instruction, loops


@dataclass(frozen=True)
class Loop:
    """One turn of a loop, as one thread runs it, without the loops inside it. Code behind rare branches counts, but for
    `instructions`: those that every turn runs."""

    instructions: int
    exps: int
    spills: int  # accesses to local memory
    loads: dict[int, int]  # width in bytes -> loads of that width from global memory
    stores: dict[int, int]

    @property
    def bytes_loaded(self) -> int:
        return sum(width * count for width, count in self.loads.items())


@dataclass(frozen=True)
class Code:
    """Fields of the same names in `KernelReport` say what they are."""

    registers: int
    spills: int
    local_bytes: int
    loads: dict[int, int]
    stores: dict[int, int]
    loops: list[Loop]


def read(asm: dict) -> Code:
    """asm: the stages that Triton keeps of a compiled kernel."""
    return _nvidia(asm["cubin"]) if "cubin" in asm else _amd(asm["amdgcn"])


def _loop(body: Body, width, exp: str, spill: tuple[str, ...]) -> Loop:
    code = body.all
    return Loop(
        instructions=len(body.always),
        exps=sum(x.opcode.startswith(exp) for x in code),
        spills=sum(x.opcode.startswith(spill) for x in code),
        loads=_widths(code, width, "load"),
        stores=_widths(code, width, "store"),
    )


def _widths(code: list[Instruction], width, kind: str) -> dict[int, int]:
    """width: opcode -> ("load" or "store", bytes) of a global access, None of anything else."""
    found = Counter(access[1] for x in code if (access := width(x.opcode)) and access[0] == kind)
    return dict(sorted(found.items()))


# --- NVIDIA ----------------------------------------------------------------------------------------------------------

NVIDIA_LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<operands>[^;]*);")
NVIDIA_LABEL = re.compile(r"(\.L\w+):")
NVIDIA_ENDS = ("EXIT", "RET", "BRA", "BRX", "JMP", "KILL")
NVIDIA_SPILL = ("LDL", "STL")
NVIDIA_BITS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}  # a plain access is 4 bytes wide


def _nvidia(cubin: bytes) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        sass = _run(knobs.nvidia.nvdisasm.path, "-c", "-ndf", file.name)
    resources = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    if resources.keys() != {"REG", "STACK", "LOCAL"}:
        raise RuntimeError(f"cuobjdump -res-usage printed no REG, STACK and LOCAL but {usage!r}")
    code = nvidia_instructions(sass)
    return Code(
        registers=resources["REG"],
        spills=sum(x.opcode.startswith(NVIDIA_SPILL) for x in code),
        local_bytes=resources["STACK"] + resources["LOCAL"],
        loads=_widths(code, nvidia_access, "load"),
        stores=_widths(code, nvidia_access, "store"),
        loops=[_loop(body, nvidia_access, "MUFU.EX2", NVIDIA_SPILL) for body in loops(code)],
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def nvidia_instructions(sass: str) -> list[Instruction]:
    """Lines that nvdisasm -c prints."""
    code, labels = [], []
    for line in sass.splitlines():
        if label := NVIDIA_LABEL.match(line):
            labels.append(label[1])
        elif found := NVIDIA_LINE.match(line):
            opcode, operands = found["opcode"], found["operands"].strip()
            goal = re.search(r"`\((\.L\w+)\)", operands)
            # a branch may also be guarded by a predicate among its operands: BRA P0, `(.L_x_1) or BRA.DIV UR4, `(.L_x_1)
            guarded = found["guard"] or (goal and not operands.startswith("`"))
            ends = opcode.split(".")[0] in NVIDIA_ENDS and not guarded
            code.append(Instruction(opcode, tuple(labels), goal and goal[1], not ends))
            labels = []
    return code


def nvidia_access(opcode: str) -> tuple[str, int] | None:
    name, *parts = opcode.split(".")
    kind = {"LDG": "load", "LD": "load", "LDGSTS": "load", "STG": "store", "ST": "store"}.get(name)
    return kind and (kind, next((NVIDIA_BITS[part] for part in parts if part in NVIDIA_BITS), 4))


# --- AMD -------------------------------------------------------------------------------------------------------------

AMD_LINE = re.compile(r"\s+(?P<opcode>[a-z]\w*_\w+)\s*(?P<operands>[^;\n]*)")
AMD_LABEL = re.compile(r"(\.LBB\w+):")
AMD_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store)_(dwordx[234]|dword|[us]?short|[us]?byte)")
AMD_SPILL = ("scratch_",)
AMD_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "byte": 1}


def _amd(assembly: str) -> Code:
    def metadata(name: str) -> int:
        value = re.search(rf"^\s*-?\s*\.{name}:\s*(\d+)", assembly, re.M)
        if value is None:
            raise RuntimeError(f"the assembly has no .{name}")
        return int(value[1])

    code = amd_instructions(assembly)
    return Code(
        registers=metadata("vgpr_count"),  # accumulation registers included
        spills=metadata("vgpr_spill_count"),
        local_bytes=metadata("private_segment_fixed_size"),
        loads=_widths(code, amd_access, "load"),
        stores=_widths(code, amd_access, "store"),
        loops=[_loop(body, amd_access, "v_exp_", AMD_SPILL) for body in loops(code)],
    )


def amd_instructions(assembly: str) -> list[Instruction]:
    """Lines of LLVM's AMDGPU assembly, up to the end of the first function."""
    code, labels = [], []
    for line in assembly.splitlines():
        if line.startswith(".Lfunc_end"):
            break
        if label := AMD_LABEL.match(line):
            labels.append(label[1])
        elif found := AMD_LINE.match(line):
            opcode, operands = found["opcode"], found["operands"].strip()
            goal = operands if opcode == "s_branch" or opcode.startswith("s_cbranch") else None
            ends = opcode in ("s_branch", "s_endpgm", "s_setpc_b64")
            code.append(Instruction(opcode, tuple(labels), goal, not ends))
            labels = []
    return code


def amd_access(opcode: str) -> tuple[str, int] | None:
    found = AMD_ACCESS.match(opcode)
    if found is None:
        return None
    return found[1], next(size for name, size in AMD_BYTES.items() if found[2].endswith(name))

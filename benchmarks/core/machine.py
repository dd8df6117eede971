"""The machine, the versions and the commit that a result was measured with."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "neon", "bf16")
PACKAGES = (
    "torch",
    "triton",
    "larpo_kernels",
    "transformers",
    "numpy",
    "trl",
    "liger-kernel",
    "flash-attn",
    "cut-cross-entropy",
    "quack-kernels",
)


def cpu() -> dict:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""

    def field(name: str) -> str:
        return (re.search(rf"^{name}\s*:\s*(.+)$", text, re.M) or [None, ""])[1]

    flags = set((field("flags") or field("Features")).split())
    return {
        "model": field("model name") or platform.processor() or platform.machine(),
        "cores": torch.get_num_threads(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
    }


def has_native_bfloat16(device: str) -> bool:
    """Whether a bfloat16 GEMM is faster than a float32 one here."""
    return device != "cpu" or bool({"avx512_bf16", "amx_bf16", "bf16"} & set(cpu()["instruction_sets"]))


def describe(device: str) -> dict:
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {"cpu": cpu(), "gpu": gpu, "system": f"{platform.system()} {platform.machine()}"}


def slug(machine: dict) -> str:
    """A folder name: nvidia-h200, or amd-epyc-2-threads-avx2."""
    isa = [name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in machine["cpu"]["instruction_sets"]]
    text = machine["gpu"] or f"{machine['cpu']['model']} {machine['cpu']['cores']} threads {(isa or [''])[0]}"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def git_state() -> dict:
    """commit, and whether files differed from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*words):
        done = subprocess.run(["git", "-C", root, *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    except FileNotFoundError:
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def header(device: str) -> dict:
    """The part of a recorded result that is not a measurement."""
    return {
        "schema": 1,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": describe(device),
        "versions": versions(),
        "git": git_state(),
    }

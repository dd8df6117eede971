"""Whether a file was written to its end: an interrupted copy, a full disk or a lost machine leaves some that were not."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

TORCH = ("pytorch_model*.bin", "adapter_model*.bin", "optimizer*.bin", "training_args.bin", "*.pt", "*.pth")
OF_A_MODEL = ("model*", "pytorch_model*", "adapter_*", "config.json", "tokenizer*.json")  # what is loaded of its folder


class Damaged(ValueError):
    """A file that can't be read: `path` is the file, `why` what is wrong with it."""

    def __init__(self, path: Path, why: str):
        self.path, self.why = path, why
        super().__init__(f"{path} can't be read: {why}")


def damage(path: Path) -> str | None:
    """What is wrong with a file of weights, states or JSON; None if it is whole, or of another kind. Of a large file only the
    beginning and the length are looked at."""
    try:
        if path.suffix == ".safetensors":
            return _damage_of_safetensors(path)
        if any(path.match(pattern) for pattern in TORCH):
            return _damage_of_torch(path)
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.name == ".metadata":
            return _damage_of_shards(path.parent)
    except (OSError, ValueError) as error:
        return "it is empty" if path.is_file() and path.stat().st_size == 0 else f"it is cut or damaged ({error})"
    return None


def first_damage(folder: Path) -> tuple[Path, str] | None:
    """The first file below a folder that is damaged, and how."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if (found := damage(path)) is not None:
            return path, found
    return None


def refuse_damaged_model(folder: Path) -> None:
    """Raises Damaged where a file that is loaded of a model's or an adapter's folder was not written to its end."""
    for pattern in OF_A_MODEL:
        for path in sorted(folder.glob(pattern)):
            if path.is_file() and (found := damage(path)) is not None:
                raise Damaged(path, found)


def _damage_of_safetensors(path: Path) -> str | None:
    """The header says how long the file is: 8 bytes for its length, the header, and the data up to the last offset."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
        if size < 8 or header > size - 8:
            return f"it is cut: {size} bytes, and its header alone has {header + 8}" if size >= 8 else "it is empty or cut"
        tensors = json.loads(file.read(header))
    end = max((entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"), default=0)
    expected = 8 + header + end
    return None if size == expected else f"it is cut: {size} of {expected} bytes"


def _damage_of_torch(path: Path) -> str | None:
    """torch.save writes a zip file, whose list of contents comes last; long ago it was a pickle, which is taken as it is."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return None if archive.namelist() else "it is empty"
    with path.open("rb") as file:
        start = file.read(1)
    return None if start == b"\x80" else "it is cut or damaged" if start else "it is empty"


def _damage_of_shards(folder: Path) -> str | None:
    """Of what torch.distributed.checkpoint writes: its .metadata says which bytes of which file hold what."""
    from torch.distributed.checkpoint import FileSystemReader

    try:
        parts = FileSystemReader(folder).read_metadata().storage_data.values()
    except Exception as error:  # a pickle that is cut raises anything
        return f"it is cut or damaged ({error})"
    for part in parts:
        file = folder / part.relative_path
        if not file.is_file() or file.stat().st_size < part.offset + part.length:
            return f"it says that {file.name} holds more than is there"
    return None

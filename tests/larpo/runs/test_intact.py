"""Files that were not written to their end are told from whole ones."""

import pytest
import torch
from safetensors.torch import save_file

from larpo.runs.files import write_json
from larpo.runs.intact import Damaged, damage, first_damage, refuse_damaged_model


@pytest.fixture
def folder(tmp_path):
    save_file({"a": torch.zeros(50), "b": torch.ones(3, 2, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    save_file({}, tmp_path / "empty.safetensors")
    torch.save({"state": torch.zeros(50)}, tmp_path / "optimizer.pt")
    torch.save([torch.zeros(50)], tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    write_json(tmp_path / "config.json", {"hidden_size": 32, "name": "é"})
    (tmp_path / "notes.bin").write_bytes(b"")  # of another kind
    return tmp_path


def test_whole_files_are_whole(folder):
    assert first_damage(folder) is None
    refuse_damaged_model(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "config.json"])
@pytest.mark.parametrize("kept", [0, 1, 7, 9, 0.5, -1])
def test_a_file_that_is_cut_anywhere_is_damaged(folder, name, kept):
    path = folder / name
    content = path.read_bytes().rstrip(b"\n")
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    assert damage(path) is not None
    assert first_damage(folder)[0] == path
    if name == "optimizer.pt":  # nothing that is loaded of a model
        return refuse_damaged_model(folder)
    with pytest.raises(Damaged, match=name.replace(".", r"\.")) as caught:
        refuse_damaged_model(folder)
    assert caught.value.path == path


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "config.json"])
def test_a_file_of_zeros_is_damaged(folder, name):
    """As a power cut leaves one whose length the disk had, and whose bytes it had not."""
    (folder / name).write_bytes(bytes((folder / name).stat().st_size))
    assert damage(folder / name) is not None


@pytest.mark.filterwarnings("ignore")
def test_distributed_checkpoints_are_measured_against_their_contents(tmp_path):
    import torch.distributed.checkpoint as dcp

    dcp.save({"a": torch.arange(1000.0)}, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    assert first_damage(tmp_path) is None
    (part,) = tmp_path.glob("*.distcp")
    part.write_bytes(part.read_bytes()[:-1])
    assert part.name in first_damage(tmp_path)[1]
    (tmp_path / ".metadata").write_bytes((tmp_path / ".metadata").read_bytes()[:20])
    assert first_damage(tmp_path)[0].name == ".metadata"

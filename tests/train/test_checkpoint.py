"""Checkpoints: whole or absent, damage found, the newest never deleted."""

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dinox_model
from dinox_train import checkpoint as module
from dinox_train.checkpoint import (
    CheckpointError,
    list_checkpoints,
    newest_checkpoint,
    open_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    rotate,
    save_checkpoint,
)


@pytest.fixture(scope="module")
def teacher() -> dinox_model.VisionTransformer:
    config = dinox_model.ViTConfig(width=32, num_layers=1, num_heads=2, mlp_hidden=64)
    return dinox_model.build(config, seed=1)


def save(root: Path, update: int, teacher: dinox_model.VisionTransformer) -> Path:
    tensors = {"student": {"weight": torch.arange(6.0).reshape(2, 3)}}
    return save_checkpoint(root, update, teacher=teacher, tensors=tensors, state={"update": update, "position": update})


def test_a_checkpoint_is_read_back_and_is_a_model_folder(
    tmp_path: Path, teacher: dinox_model.VisionTransformer
) -> None:
    folder = save(tmp_path, 40, teacher)
    assert folder.name == "step-00000040"
    opened = open_checkpoint(folder)
    assert (opened.update, opened.state["position"]) == (40, 40)
    assert torch.equal(opened.tensors("student")["weight"], torch.arange(6.0).reshape(2, 3))
    loaded = dinox_model.load(folder)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), teacher.state_dict().values(), strict=True)
    )
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".json", ".safetensors"}


def test_it_is_never_overwritten(tmp_path: Path, teacher: dinox_model.VisionTransformer) -> None:
    save(tmp_path, 3, teacher)
    with pytest.raises(CheckpointError, match="exists already"):
        save(tmp_path, 3, teacher)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "train/student.safetensors", "train/state.json", "config.json", "MANIFEST.json"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "lose"])
def test_any_damage_is_found_and_the_one_before_is_used(
    tmp_path: Path, teacher: dinox_model.VisionTransformer, name: str, damage: str
) -> None:
    save(tmp_path, 10, teacher)
    file = save(tmp_path, 20, teacher) / name
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    file.write_bytes(data[:-3] if damage == "cut" else data)
    if damage == "lose":
        file.unlink()
    found, messages = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.update == 10
    assert len(messages) == 1
    assert "step-00000020" in messages[0]
    assert (tmp_path / "step-00000020.damaged").is_dir()
    assert newest_checkpoint(tmp_path)[1] == []


def test_no_whole_checkpoint_is_an_error_again_and_again_and_not_a_fresh_start(
    tmp_path: Path, teacher: dinox_model.VisionTransformer
) -> None:
    assert newest_checkpoint(tmp_path / "none") == (None, [])
    (save(tmp_path, 10, teacher) / "model.safetensors").unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="no checkpoint is whole"):
            newest_checkpoint(tmp_path)
    assert (tmp_path / "step-00000010").is_dir()


def test_another_version_or_an_unreadable_disk_is_no_damage(
    tmp_path: Path, teacher: dinox_model.VisionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, teacher)
    monkeypatch.setattr(module, "VERSION", 99)
    newest = save(tmp_path, 2, teacher)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="version 99"):
        newest_checkpoint(tmp_path)
    assert newest.is_dir()

    def fails(_file: Path) -> str:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(module, "_sha256", fails)
    with pytest.raises(OSError, match="Input/output"):
        open_checkpoint(tmp_path / "step-00000001")


def test_a_full_disk_leaves_earlier_ones_and_no_stump(
    tmp_path: Path, teacher: dinox_model.VisionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, teacher)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2, teacher)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_rotation_keeps_the_newest_whatever_is_asked(tmp_path: Path) -> None:
    for update in (10, 20, 30, 40, 100):
        (tmp_path / f"step-{update:08d}").mkdir()
    (tmp_path / "step-final").mkdir()
    rotate(tmp_path, keep_last=2, keep_every=20)
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step-00000020",
        "step-00000040",
        "step-00000100",
    ]
    rotate(tmp_path, keep_last=1, keep_every=None)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000100"]


def test_optimizer_state_survives(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    named = list(layer.named_parameters())
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    tensors = optimizer_tensors(optimizer, named)
    assert set(tensors) == {
        f"{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq", "step") for name in ("weight", "bias")
    }
    other = torch.optim.AdamW(layer.parameters(), fused=True)
    restore_optimizer(other, named, tensors)
    for name, value in optimizer_tensors(other, named).items():
        assert torch.equal(value, tensors[name])
    with pytest.raises(CheckpointError, match="not"):
        restore_optimizer(other, named, {"exp_avg.foreign": torch.ones(1)})


def test_files_are_safetensors(tmp_path: Path, teacher: dinox_model.VisionTransformer) -> None:
    folder = save(tmp_path, 1, teacher)
    assert set(load_file(folder / "train/student.safetensors")) == {"weight"}

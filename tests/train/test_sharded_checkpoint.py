"""Checkpoints of several ranks: what they wrote is read by any number of them, bit for bit, and damage is named."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dinox_model import ViTConfig, build
from dinox_train import checkpoint as checkpoints
from dinox_train import sharded_checkpoint
from dinox_train.checkpoint import CheckpointError, DamagedCheckpoint, open_checkpoint, save_checkpoint
from dinox_train.part import Held, Part, rows_of_rank
from tests.train.gloo_ranks import run_ranks

COUNT = 3
TINY = ViTConfig(width=32, num_layers=1, num_heads=2, mlp_hidden=64)


def whole() -> dict[str, dict[str, Tensor]]:
    """What a run has, and what is awkward: odd rows, fewer rows than ranks, numbers, bf16, integers, nothing at all."""
    random = torch.Generator().manual_seed(3)
    return {
        "student": {
            "backbone.odd": torch.randn(7, 5, generator=random),
            "backbone.token": torch.randn(1, 1, 6, generator=random),
            "backbone.two": torch.randn(2, generator=random),
            "backbone.one": torch.randn(1, generator=random),
            "backbone.none": torch.empty(1, 0, 4),
            "backbone.rounded": torch.randn(4, 3, generator=random).bfloat16(),
            "buffer": torch.arange(5),
        },
        "optimizer": {
            "exp_avg.backbone.odd": torch.randn(7, 5, generator=random),
            "step.backbone.odd": torch.tensor(17.0),
            "flag": torch.tensor([True, False]),
        },
    }


def is_shared_out(name: str) -> bool:
    return name.partition("backbone.")[2] != "" and not name.startswith("step")


def held_by(rank: int, count: int, tensors: dict[str, Tensor], *, fresh: bool = False) -> dict[str, Held]:
    """What a rank of fsdp holds; `fresh`: memory for it, with other values."""
    found: dict[str, Held] = {}
    for name, value in tensors.items():
        kept = torch.full_like(value, 3) if fresh else value
        if is_shared_out(name):
            first, rows = rows_of_rank(len(value), rank, count)
            # Without elements fully_shard holds no rows.
            found[name] = Part(kept[first : first + (rows if value.numel() else 0)].clone(), value.shape, first)
        else:
            found[name] = kept
    return found


def same(found: Held, wanted: Tensor) -> bool:
    if isinstance(found, Part):
        return not wanted.numel() or torch.equal(found.values, found.of(wanted))
    return found.dtype == wanted.dtype and torch.equal(found, wanted)


def assert_read(folder: Path, rank: int, count: int) -> None:
    for name, tensors in whole().items():
        for held in (held_by(rank, count, tensors, fresh=True), dict(held_by(0, 1, tensors, fresh=True))):
            sharded_checkpoint.read_into(folder, name, held)
            for key, value in tensors.items():
                assert same(held[key], value), (folder.name, name, key)


def what_three_do(rank: int, count: int, folder: Path, of_one: Path) -> None:
    """All that needs processes, in one start of them."""
    import os
    from concurrent.futures import ThreadPoolExecutor

    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    two, own = (distributed.new_group(ranks) for ranks in ([0, 1], [0, 1, 2]))
    assert not isinstance(own, int)
    tensors = whole()
    # --- three ranks with rows of their own, from a thread; two ranks; and three that hold the same (ddp)
    held = {name: held_by(rank, 3, named) for name, named in tensors.items()}
    with ThreadPoolExecutor(1) as thread:
        thread.submit(sharded_checkpoint.write, folder / "of-3", held, own).result()
    if not isinstance(two, int):  # a number where this rank is none of them
        sharded_checkpoint.write(folder / "of-2", {name: held_by(rank, 2, one) for name, one in tensors.items()}, two)
    sharded_checkpoint.write(folder / "same", tensors, None)
    distributed.barrier()
    for number in (3, 2):
        if rank < number:
            for source in (folder / "of-3", folder / "of-2", folder / "same", of_one):
                assert_read(source, rank, number)
    # --- DTensors, as torch shares them out
    mesh = init_device_mesh("cpu", (3,))
    plain = {"a": torch.arange(14.0).reshape(7, 2), "b": torch.arange(2.0)}
    sharded = {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in plain.items()}
    sharded_checkpoint.write(folder / "dtensors", {"x": sharded}, None)
    empty = {name: distribute_tensor(torch.zeros_like(value), mesh, [Shard(0)]) for name, value in plain.items()}
    sharded_checkpoint.read_into(folder / "dtensors", "x", empty)
    for name, value in plain.items():
        assert torch.equal(empty[name].full_tensor(), value)
    # --- replicas
    same_everywhere = {"a": plain["a"], "bf16": torch.zeros(3, dtype=torch.bfloat16), "number": torch.tensor(1.0)}
    assert sharded_checkpoint.digest_over_ranks(same_everywhere, None) is None
    strayed = {**same_everywhere, "number": torch.tensor(1.0 if rank != 2 else 1.0000001)}
    assert sharded_checkpoint.digest_over_ranks(strayed, None) == "rank 2 has another number than rank 0"
    # --- a full disk on one rank is an OSError on all
    if rank == 1:
        from torch.distributed.checkpoint import filesystem

        def full(*_: Any) -> Any:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        filesystem.FileSystem.create_stream = full  # type: ignore[method-assign]
    with pytest.raises(OSError, match="rank 1: No space left on device") as met:
        sharded_checkpoint.write(folder / "full", held, None)
    assert met.value.errno == errno.ENOSPC
    if rank == 0:
        (folder / "done").touch()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders that three ranks wrote, and `of-1`, which one process did."""
    folder = tmp_path_factory.mktemp("written")
    for name, tensors in whole().items():
        (folder / "of-1" / "train").mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "of-1" / "train" / f"{name}.safetensors")
    run_ranks(what_three_do, COUNT, folder, folder / "of-1")
    assert (folder / "done").exists()
    return folder


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    """`of-3`, to be harmed."""
    return Path(shutil.copytree(written / "of-3", tmp_path / "of-3"))


@pytest.mark.parametrize("name", ["of-3", "of-2", "same"])
def test_one_process_reads_what_many_wrote(written: Path, name: str) -> None:
    for file, tensors in whole().items():
        found = sharded_checkpoint.read(written / name, file)
        assert found.keys() == tensors.keys()
        assert all(same(found[key], value) for key, value in tensors.items())
        assert sharded_checkpoint.shapes(written / name, file) == {key: one.shape for key, one in tensors.items()}
    assert_read(written / name, 0, 1)
    assert sharded_checkpoint.shapes(written / "of-1", "student") == {
        key: one.shape for key, one in whole()["student"].items()
    }


def test_every_rank_writes_its_part_and_nobody_pickles(written: Path) -> None:
    for name, count in (("of-3", 3), ("of-2", 2), ("same", 3)):
        files = sorted(path.name for path in (written / name).rglob("*") if path.is_file())
        assert all(path.endswith(".safetensors") or path == "INDEX.json" for path in files), files
        ranks = {path[:11] for path in files if path.startswith("shard-")}
        assert ranks == {f"shard-{number:05d}" for number in range(1, count + 1)}
    index = json.loads((written / "of-3" / sharded_checkpoint.INDEX).read_bytes())
    parts = index["files"]["student"]["backbone.odd"]["parts"]
    assert [part[:2] for part in parts] == [[0, 3], [3, 3], [6, 1]]
    assert [index["shards"][part[2]][:11] for part in parts] == ["shard-00001", "shard-00002", "shard-00003"]


def test_torchs_own_reader_reads_them(written: Path) -> None:
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    wanted = whole()["student"]["backbone.odd"]
    found = {"student/backbone.odd": torch.zeros_like(wanted)}
    with pytest.warns(UserWarning, match="single process"):
        load(found, storage_reader=HuggingFaceStorageReader(str(written / "of-3" / "train" / "shards")), no_dist=True)
    assert torch.equal(found["student/backbone.odd"], wanted)


def test_what_does_not_fit_is_refused(written: Path) -> None:
    for folder in (written / "of-3", written / "of-1"):
        for tensors, said in (
            ({"backbone.od": torch.zeros(7, 5)}, "has no backbone.od"),
            ({"backbone.odd": torch.zeros(7, 4)}, r"backbone.odd has shape \(7, 5\), expected \(7, 4\)"),
            ({"backbone.odd": torch.zeros(7, 5).bfloat16()}, "backbone.odd is .*float32, expected .*bfloat16"),
        ):
            with pytest.raises(CheckpointError, match=said):
                sharded_checkpoint.read_into(folder, "student", tensors)


def test_damage_is_named(copy: Path, written: Path) -> None:
    first = copy / sharded_checkpoint.shards_of(copy, "student")[0]
    data = first.read_bytes()
    for harmed in (data[:-1], data[: len(data) // 2], data[:4], b"", None):
        first.unlink()
        if harmed is not None:
            first.write_bytes(harmed)
        with pytest.raises(DamagedCheckpoint, match=first.name):
            sharded_checkpoint.read(copy, "student")
        first.touch()
    first.write_bytes(data)
    file = copy / sharded_checkpoint.INDEX
    index = file.read_bytes()
    file.write_bytes(index[:-5])
    with pytest.raises(DamagedCheckpoint, match=r"INDEX\.json is not what was written"):
        sharded_checkpoint.read(copy, "student")
    changed = json.loads(index)
    del changed["files"]["student"]["backbone.odd"]["parts"][1]
    file.write_text(json.dumps(changed))
    with pytest.raises(DamagedCheckpoint, match=r"does not say where all of student/backbone\.odd is"):
        sharded_checkpoint.read(copy, "student")
    one_file = copy / "train" / "student.safetensors"
    shutil.rmtree(copy / "train" / "shards")
    for harm in (lambda: None, lambda: one_file.write_bytes(b"12345678")):
        harm()
        with pytest.raises(DamagedCheckpoint, match=r"student\.safetensors"):
            sharded_checkpoint.read_into(copy, "student", {"backbone.one": torch.zeros(1)})


def test_a_checkpoint_of_several_ranks(written: Path, tmp_path: Path) -> None:
    """`open_checkpoint` and `Checkpoint` know both versions."""
    folder = save_checkpoint(tmp_path, 4, teacher=build(TINY), tensors={}, state={"update": 4})
    shutil.copytree(written / "of-3" / "train" / "shards", folder / "train" / "shards")
    (folder / checkpoints.MANIFEST).unlink()
    manifest = checkpoints._manifest(folder, checkpoints.SHARDED_VERSION)
    (folder / checkpoints.MANIFEST).write_bytes(checkpoints._json(manifest))
    found = open_checkpoint(folder)
    assert (found.has("student"), found.has("gram_teacher")) == (True, False)
    for name, tensors in whole().items():
        read = found.tensors(name)
        assert all(same(read[key], value) for key, value in tensors.items())
    shape = build(TINY).patch_embed.weight.shape
    rows = Part(torch.zeros(8, shape[1]), shape, 8)
    sharded_checkpoint.read_file_into(folder, "model.safetensors", {"patch_embed.weight": rows})
    assert torch.equal(rows.values, build(TINY).patch_embed.weight[8:16])
    # A flipped bit in a shard of the optimizer: who reads the student alone need not know.
    file = folder / sharded_checkpoint.shards_of(folder, "optimizer")[0]
    file.write_bytes(file.read_bytes()[:-1] + b"\x00")
    only = open_checkpoint(folder, ("train/student.safetensors",))
    assert only.tensors("student").keys() == whole()["student"].keys()
    for names in (None, ("train/optimizer.safetensors",)):
        with pytest.raises(DamagedCheckpoint, match=file.name):
            open_checkpoint(folder, names)

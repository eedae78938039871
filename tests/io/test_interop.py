"""Our shards as a webdataset pipeline: every window of the side once, true pixels, damage told, no process idle."""

import pickle
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import dinox_io
from dinox_io.interop import collate, webdataset_pipeline

SHAPES = [(6, 16, 20), (3, 9, 20), (11, 16, 7), (1, 4, 4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_volume, write_set) -> Path:
    """Three shards: two with volumes of train, the middle one with one of each, the last with val alone."""
    folder = tmp_path_factory.mktemp("interop") / "set"
    volumes = [make_volume(number, shape) for number, shape in enumerate(SHAPES)]
    held_out = [make_volume(20, (5, 10, 10)), make_volume(21, (4, 10, 12))]
    sides = {volume.id: "val" for volume in held_out}
    write_set(folder, [volumes[:2], [held_out[0], *volumes[2:]], held_out[1:]], sides=sides)
    return folder


@pytest.fixture
def webdataset():
    return pytest.importorskip("webdataset")


@pytest.mark.parametrize(
    ("depth", "step", "edge"), [(3, 1, "clamp"), (5, 2, "reflect"), (3, 2, "error"), (1, 1, "clamp")]
)
@pytest.mark.parametrize("split", ["train", "val", None])
def test_each_window_once_and_as_the_set_reads_it(
    webdataset, folder: Path, depth: int, step: int, edge: str, split: str | None
) -> None:
    samples = list(webdataset_pipeline(folder, depth=depth, step=step, edge=edge, split=split, shuffle_buffer=4))
    with dinox_io.open_shards(folder, edge=edge) as shards:
        by_id = {volume.id: volume for volume in shards.volumes}
        table = shards.window_table(shards.volumes_of(split), depth, step)
        volume, center, _ = table.locate(np.arange(table.num_windows))
        expected = {f"{shards.volumes[v].id}/{c}" for v, c in zip(volume.tolist(), center.tolist(), strict=True)}
        assert Counter(sample["__key__"] for sample in samples) == Counter(expected)
        for sample in samples:
            record = by_id[sample["volume"]]
            true = shards.read_window(record, sample["center"], depth, step)
            assert sample["window"].dtype == np.int16
            np.testing.assert_array_equal(sample["window"], true)
            assert sample["spacing_mm"] == record.spacing_mm
            assert sample["__url__"].startswith(str(folder.resolve()))


def keys(pipeline) -> list[str]:
    return [sample["__key__"] for sample in pipeline]


def test_order(webdataset, folder: Path) -> None:
    in_order = keys(webdataset_pipeline(folder, shuffle_buffer=0))
    assert in_order == keys(webdataset_pipeline(folder, shuffle_buffer=0))
    assert [int(key.split("/")[1]) for key in in_order] == [z for shape in SHAPES for z in range(shape[0])]
    pipeline = webdataset_pipeline(folder, shuffle_buffer=30, seed=5)
    first, second = keys(pipeline), keys(pipeline)
    assert sorted(first) == sorted(second) == sorted(in_order)
    assert len({tuple(first), tuple(second), tuple(in_order)}) == 3, "a pass is shuffled, each in its own way"
    assert keys(webdataset_pipeline(folder, shuffle_buffer=30, seed=5)) == first
    assert keys(webdataset_pipeline(folder, shuffle_buffer=30, seed=6)) != first


def test_windows_do_not_share_memory(webdataset, folder: Path) -> None:
    samples = list(webdataset_pipeline(folder, shuffle_buffer=0))
    before = samples[1]["window"].copy()
    samples[0]["window"][:] = 0
    np.testing.assert_array_equal(samples[1]["window"], before)


def test_nodes_and_workers_share_the_shards(webdataset, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes: each window in one of them. Of three, one would have no shard of the side: refused, not empty."""
    whole = keys(webdataset_pipeline(folder, shuffle_buffer=0))
    for ranks, workers in ((("RANK", "0", "1"), ("WORLD_SIZE", "2")), (("WORKER", "0", "1"), ("NUM_WORKERS", "2"))):
        monkeypatch.setenv(*workers)
        parts = []
        for rank in ranks[1:]:
            monkeypatch.setenv(ranks[0], rank)
            # Pickled, as a worker process gets it.
            sent = pickle.dumps(webdataset_pipeline(folder, seed=3))
            parts.append(keys(pickle.loads(sent)))  # noqa: S301 (our own)
        assert all(parts)
        assert sorted(parts[0] + parts[1]) == sorted(whole)
        monkeypatch.setenv(workers[0], "3")
        monkeypatch.setenv(ranks[0], "2")
        with pytest.raises(ValueError, match="no shard"):
            keys(webdataset_pipeline(folder))
        monkeypatch.delenv(ranks[0])
        monkeypatch.delenv(workers[0])


def test_batches(webdataset, folder: Path) -> None:
    pipeline = webdataset_pipeline(folder).compose(webdataset.batched(8, collation_fn=collate))
    batches = list(pipeline)
    assert sum(len(batch["images"]) for batch in batches) == sum(shape[0] for shape in SHAPES)
    with dinox_io.open_shards(folder) as shards:
        by_id = {volume.id: volume for volume in shards.volumes}
        for batch in batches:
            b = len(batch["volume"])
            assert batch["images"].shape == (b, 3, *batch["sizes"].max(axis=0))
            assert (batch["sizes"].dtype, batch["center"].dtype) == (np.int32, np.int64)
            for image, size, key, center, spacing_mm in zip(
                batch["images"], batch["sizes"], batch["volume"], batch["center"], batch["spacing_mm"], strict=True
            ):
                y, x = size
                np.testing.assert_array_equal(image[:, :y, :x], shards.read_window(by_id[key], int(center)))
                assert (image[:, y:] == -1024).all()
                assert (image[:, :, x:] == -1024).all()
                assert tuple(spacing_mm) == by_id[key].spacing_mm
    first = batches[0]["images"].copy()
    batches[1]["images"][:] = 7
    np.testing.assert_array_equal(batches[0]["images"], first)


def with_bytes(folder: Path, copy: Path, name: str, offset: int, data: bytes) -> Path:
    shutil.copytree(folder, copy)
    with (copy / name).open("r+b") as file:
        file.seek(offset)
        file.write(data)
    return copy


def test_a_flipped_bit_of_a_frame_is_found_when_it_is_read(webdataset, folder: Path, tmp_path: Path) -> None:
    with dinox_io.open_shards(folder) as shards:
        volume = shards.volumes_of("train")[0]
        start = int(shards._index.frames(int(volume), 2, 3)[0])
        name, key = shards._files[int(shards._index.shard[volume])].name, shards.volumes[volume].id
    byte = (folder / name).read_bytes()[start + 30]
    damaged = with_bytes(folder, tmp_path / "set", name, start + 30, bytes([byte ^ 1]))
    with pytest.raises(dinox_io.ShardError) as raised:
        list(webdataset_pipeline(damaged, shuffle_buffer=0))
    assert (raised.value.file, raised.value.volume, raised.value.slice_index) == (name, key, 2)


@pytest.mark.parametrize("what", ["header", "size", "gzip"])
def test_a_shard_that_changed_since_it_was_opened(webdataset, folder: Path, tmp_path: Path, what: str) -> None:
    """A member that claims to be sparse, a cut, another format: told before webdataset's reader sees any of it."""
    copy = tmp_path / "set"
    shutil.copytree(folder, copy)
    pipeline = webdataset_pipeline(copy)
    shard = copy / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    if what == "header":
        at = data.index(b".hu16.zst\0") // 512 * 512
        data[at + 156 : at + 157] = b"S"
    elif what == "size":
        del data[-512:]
    else:
        data[:3] = b"\x1f\x8b\x08"
    shard.write_bytes(data)
    with pytest.raises(dinox_io.ShardError, match=r"shard-000000\.tar"):
        list(pipeline)


def test_a_volume_swapped_for_one_of_another_set(
    webdataset, folder: Path, tmp_path: Path, make_volume, write_set
) -> None:
    """A whole, valid shard of the same size in the place of another: the manifest's digests tell."""
    first, other = make_volume(1), make_volume(1)
    other.hu[[2, 3]] = other.hu[[3, 2]]
    write_set(tmp_path / "a", [[first]])
    write_set(tmp_path / "b", [[other]])
    pipeline = webdataset_pipeline(tmp_path / "a")
    shard, data = tmp_path / "a" / "shard-000000.tar", (tmp_path / "b" / "shard-000000.tar").read_bytes()
    assert len(data) == shard.stat().st_size
    shard.write_bytes(data)
    with pytest.raises(dinox_io.ShardError, match="is not the volume that the manifest names"):
        list(pipeline)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 2}, "odd"),
        ({"edge": "wrap"}, "edge"),
        ({"split": "test"}, "no volume"),
        ({"split": "middle"}, "split"),
        ({"shuffle_buffer": -1}, "shuffle_buffer"),
        ({"depth": 31, "edge": "error"}, "no window"),
    ],
)
def test_impossible_arguments(webdataset, folder: Path, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        webdataset_pipeline(folder, **settings)


def test_only_folders_of_this_machine(webdataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folder"):
        webdataset_pipeline("s3://bucket/set")
    with pytest.raises(dinox_io.ShardError):
        webdataset_pipeline(f"pipe:touch {tmp_path / 'ran'}")
    assert not (tmp_path / "ran").exists()


def test_without_webdataset_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("webdataset", "webdataset.filters"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"dinox\[webdataset\]"):
        webdataset_pipeline(folder)


def test_the_example_of_the_documentation(
    webdataset, repository: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (repository / "docs" / "other_trainers.md").read_text(encoding="utf-8")
    (source,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "webdataset" in block]
    (tmp_path / "shards").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(source, "docs/other_trainers.md", "exec"), names)  # noqa: S102 (the document's own example)
    assert names["seen"] == sum(shape[0] for shape in SHAPES)

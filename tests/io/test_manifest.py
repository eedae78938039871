"""The manifest: its own digest, its contents, growth, and the order in which a set is committed."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from dinox_io.canonical import canonical_json
from dinox_io.errors import ShardError
from dinox_io.manifest import (
    build_manifest,
    commit_set,
    dense_histogram,
    read_manifest,
    serialize_manifest,
    sparse_histogram,
)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def resign(manifest: dict) -> dict:
    """Someone edits a manifest and knows the format."""
    others = {key: value for key, value in manifest.items() if key != "self"}
    return others | {"self": hashlib.sha256(canonical_json(others)).hexdigest()}


def test_contents(tmp_path: Path, make_volume, write_set) -> None:
    volumes = [make_volume(1), make_volume(2, (4, 8, 8)), make_volume(3, (5, 8, 8), patient=1)]
    manifest = write_set(tmp_path / "set", [volumes[:2], volumes[2:]], sides={volumes[1].id: "val"})
    text = (tmp_path / "set" / "manifest.json").read_text(encoding="utf-8")
    assert json.loads(text) == manifest == read_manifest(tmp_path / "set")
    assert list(json.loads(text))[-1] == "self"
    others = json.dumps({k: v for k, v in manifest.items() if k != "self"}, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(others.encode()).hexdigest() == manifest["self"]
    assert [volume["id"] for volume in manifest["volumes"]] == sorted(volume.id for volume in volumes)
    assert manifest["encoding"] == "hu-int16"
    assert manifest["rejected"] == {"LOCALIZER": 2}
    assert manifest["splits"]["train"] == {
        "volumes": 2,
        "patients": 1,
        "slices": 11,
        "raw_bytes": 2 * (6 * 320 + 5 * 64),
    }
    assert manifest["splits"]["val"]["volumes"] == 1
    assert manifest["spacing_mm"]["z"] == {"min": 2.0, "median": 2.0, "max": 2.0}
    assert dense_histogram(manifest["hu_histogram"]).sum() == sum(volume.hu.size for volume in volumes)
    for shard in manifest["shards"]:
        data = (tmp_path / "set" / shard["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["size"], shard["sha256"])
    index = (tmp_path / "set" / "index.msgpack").read_bytes()
    assert hashlib.sha256(index).hexdigest() == manifest["index_sha256"]


def test_histogram_forms_agree() -> None:
    counts = np.zeros(4096, np.int64)
    for filled in ([], [0], [4095], [3, 9]):
        counts[:] = 0
        counts[filled] = 5
        np.testing.assert_array_equal(dense_histogram(sparse_histogram(counts)), counts)


def test_growth_keeps_the_shards_and_the_earlier_manifest(tmp_path: Path, make_volume, write_set) -> None:
    volumes = [make_volume(number) for number in range(4)]
    first = write_set(tmp_path / "grown", [volumes[:2]])
    before = tree(tmp_path / "grown")
    second = write_set(tmp_path / "grown", [volumes[2:]], previous=first)
    after = tree(tmp_path / "grown")
    assert after["shard-000000.tar"] == before["shard-000000.tar"]
    assert after[f"manifests/{first['self']}.json"] == before["manifest.json"]
    assert second["previous"] == first["self"]
    at_once = write_set(tmp_path / "once", [volumes])
    assert second["volumes"] == at_once["volumes"]
    assert second["hu_histogram"] == at_once["hu_histogram"]
    assert {k: v for k, v in second["counts"].items() if not k.startswith("shard")} == {
        k: v for k, v in at_once["counts"].items() if not k.startswith("shard")
    }


def test_committing_what_is_there_changes_nothing(tmp_path: Path, make_volume, write_set) -> None:
    first = write_set(tmp_path / "set", [[make_volume(1)]])
    grown = write_set(tmp_path / "set", [[make_volume(2)]], previous=first)
    before = tree(tmp_path / "set")
    assert write_set(tmp_path / "set", [], previous=grown) == grown
    assert tree(tmp_path / "set") == before
    (tmp_path / "set" / "index.msgpack").unlink()
    write_set(tmp_path / "set", [], previous=grown)
    assert tree(tmp_path / "set") == before


ABOUT = {"name": "Ward 7", "licence": "in house", "weights_may_be_released": "ask"}


def rebuilt(manifest: dict, **changes) -> dict:
    """build_manifest over what is there, as a pack does that finds nothing new."""
    named = ("options", "config_digest", "leaks", "packer", "sources")
    rest = {name: manifest[name] for name in named} | {"rejected_by_code": manifest["rejected"]} | changes
    sides = {volume["id"]: volume["split"] for volume in manifest["volumes"]}
    return build_manifest([], sides=sides, previous=manifest, **rest)


def test_what_the_set_was_made_with(tmp_path: Path, make_volume, write_set) -> None:
    tools = write_set(tmp_path / "set", [[make_volume(1)]])["tools"]
    assert {"dinox", "python", "numpy", "zstandard", "zstd", "xxhash", "pydicom"} <= tools.keys()
    assert tools["python"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert tools["numpy"] == np.__version__
    assert all(isinstance(version, str) and version for version in tools.values())


def test_other_versions_alone_change_nothing(tmp_path: Path, make_volume, write_set, monkeypatch) -> None:
    first = write_set(tmp_path / "set", [[make_volume(1)]])
    before = tree(tmp_path / "set")
    monkeypatch.setattr("dinox_io.manifest.tool_versions", lambda: {"dinox": "9.9"})
    commit_set(tmp_path / "set", rebuilt(first, packer="dinox_io 9.9"))
    assert tree(tmp_path / "set") == before
    grown = write_set(tmp_path / "set", [[make_volume(2)]], previous=first)
    assert grown["tools"] == {"dinox": "9.9"}


def test_a_set_of_an_older_version_is_as_it_was(tmp_path: Path, make_volume, write_set) -> None:
    """Without `tools`, `about` and `removed`: a run that adds nothing writes nothing, one that adds something may."""
    first = write_set(tmp_path / "set", [[make_volume(1)]])
    old = resign({key: value for key, value in first.items() if key not in ("tools", "about", "removed")})
    (tmp_path / "set" / "manifest.json").write_bytes(serialize_manifest(old))
    before = tree(tmp_path / "set")
    commit_set(tmp_path / "set", rebuilt(old))
    assert {name: data for name, data in tree(tmp_path / "set").items() if "manifests" not in name} == before
    assert write_set(tmp_path / "set", [[make_volume(2)]], previous=old)["removed"] is None


def test_a_description_is_kept_until_another_comes(tmp_path: Path, make_volume, write_set) -> None:
    folder = tmp_path / "set"
    first = write_set(folder, [[make_volume(1)]])
    assert first["about"] is None
    second = commit_set(folder, rebuilt(first, about=ABOUT))
    assert (second["about"], second["previous"]) == (ABOUT, first["self"])
    assert commit_set(folder, rebuilt(second)) == second
    assert commit_set(folder, rebuilt(second, about=dict(ABOUT))) == second
    third = write_set(folder, [[make_volume(2)]], previous=second)
    assert third["about"] == ABOUT
    fourth = commit_set(folder, rebuilt(third, about=ABOUT | {"version": "2"}))
    assert fourth["self"] != third["self"]
    assert read_manifest(folder)["about"]["version"] == "2"


@pytest.mark.parametrize("removed", [[], {"volumes": "1", "manifests": []}, {"volumes": 1, "manifests": ["x"]}, {}])
def test_a_malformed_note_of_removals_is_refused(tmp_path: Path, make_volume, write_set, removed: object) -> None:
    manifest = resign(write_set(tmp_path / "set", [[make_volume(1)]]) | {"removed": removed})
    (tmp_path / "set" / "manifest.json").write_bytes(serialize_manifest(manifest))
    with pytest.raises(ShardError, match="removed"):
        read_manifest(tmp_path / "set")


def test_commit_refuses_shards_that_are_not_the_manifests(tmp_path: Path, make_volume, write_set) -> None:
    manifest = write_set(tmp_path / "set", [[make_volume(1)], [make_volume(2)]])
    one, two = (tmp_path / "set" / f"shard-00000{number}.tar" for number in (0, 1))
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)
    with pytest.raises(ShardError):
        commit_set(tmp_path / "set", manifest)


def test_building_refuses(make_volume) -> None:
    rest = {"options": {}, "rejected_by_code": {}, "config_digest": "", "leaks": [], "packer": "", "sources": {}}
    with pytest.raises(ValueError, match="at least one volume"):
        build_manifest([], sides={}, previous=None, **rest)


def test_a_volume_needs_a_side_and_stands_once(tmp_path: Path, make_volume, write_set) -> None:
    volume = make_volume(1)
    with pytest.raises(ValueError, match="side 'left'"):
        write_set(tmp_path / "a", [[volume]], sides={volume.id: "left"})
    with pytest.raises(ValueError, match="two shards"):
        write_set(tmp_path / "b", [[volume], [volume]])


def test_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="not a set of shards"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "edit", [lambda text: text.replace('"train"', '"val"', 1), lambda text: text[: len(text) // 2]]
)
def test_an_edited_manifest_is_refused(tmp_path: Path, make_volume, write_set, edit) -> None:
    write_set(tmp_path / "set", [[make_volume(1)]])
    path = tmp_path / "set" / "manifest.json"
    path.write_text(edit(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(ShardError, match=r"manifest\.json"):
        read_manifest(tmp_path / "set")


@pytest.mark.parametrize(
    "edit",
    [
        {"version": 2},
        {"version": True},
        {"format": "other"},
        {"encoding": "hu-float32"},
        {"shards": []},
        {"shards": "x"},
        {"volumes": None},
        {"index_sha256": 5},
    ],
)
def test_a_signed_but_impossible_manifest_is_refused(tmp_path: Path, make_volume, write_set, edit: dict) -> None:
    manifest = write_set(tmp_path / "set", [[make_volume(1)]])
    (tmp_path / "set" / "manifest.json").write_bytes(serialize_manifest(resign(manifest | edit)))
    with pytest.raises(ShardError):
        read_manifest(tmp_path / "set")


@pytest.mark.parametrize(
    ("where", "key", "value"),
    [
        ("shards", "name", "../../etc/passwd"),
        ("shards", "name", "/abs.tar"),
        ("shards", "size", -1),
        ("shards", "size", 1 << 70),
        ("shards", "sha256", "short"),
        ("shards", "volumes", []),
        ("volumes", "id", "../x"),
        ("volumes", "shape", [1, 2]),
        ("volumes", "shape", [1, 2, "3"]),
        ("volumes", "split", "holdout"),
        ("volumes", "digest", None),
        ("volumes", "spacing_mm", [1, 2, None]),
    ],
)
def test_hostile_members_are_refused(tmp_path: Path, make_volume, write_set, where: str, key: str, value) -> None:
    manifest = write_set(tmp_path / "set", [[make_volume(1)]])
    manifest[where][0][key] = value
    (tmp_path / "set" / "manifest.json").write_bytes(serialize_manifest(resign(manifest)))
    with pytest.raises(ShardError):
        read_manifest(tmp_path / "set")


def test_unknown_members_are_ignored(tmp_path: Path, make_volume, write_set) -> None:
    manifest = resign(write_set(tmp_path / "set", [[make_volume(1)]]) | {"from_the_future": [1, {"x": None}]})
    (tmp_path / "set" / "manifest.json").write_bytes(serialize_manifest(manifest))
    assert read_manifest(tmp_path / "set") == manifest


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{" * 100000, b"[" * 100000, b'{"a":NaN}', b'{"a":1e999}', b"\xff\xfe", b'{"a":"\\ud800"}']
)
def test_json_that_is_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(ShardError):
        read_manifest(tmp_path)

"""infer.py: the features that training's preprocessing gives, in whole files, without anybody's name, and the clock."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import infer
import numpy as np
import pytest
import torch
from inference import encoding
from inference.encoding import Encoded, ahead
from inference.feature_file import ArraySpec, FeatureFile
from inference.meter import Meter
from safetensors import safe_open

import dinox_model
from dinox_io import ShardSet, VolumeRecord, open_shards
from dinox_io.window import window_slices
from dinox_model import VisionTransformer
from tests.io.conftest import MakeVolume, WriteSet, make_volume, write_set  # noqa: F401 (fixtures)
from tests.io.dicom_factory import expected_hu, write_series
from tests.io.kept_pools import Pools, pools  # noqa: F401 (a fixture)
from tests.io.small_packs import packed
from tests.model.compiled import PREPROCESS, Compiled, compiled  # noqa: F401 (a fixture)
from tests.model.foreign_weights import SMALL, perturbed

TOLERANCE = 1e-5
KEY = b"a key of the tests, long enough"


@pytest.fixture(autouse=True)
def kept_workers(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Starting Python for each command would take most of the time."""
    monkeypatch.setattr("inference.unpacked.WorkerPool", pools.lend)
    monkeypatch.setattr("dinox_io.pack.WorkerPool", pools.lend)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network's folder, with a window of its own."""
    model = perturbed(SMALL)
    model.preprocess = PREPROCESS
    folder = tmp_path_factory.mktemp("networks") / "net"
    dinox_model.save(model, folder)
    return folder


@pytest.fixture(scope="module")
def model(network: Path) -> VisionTransformer:
    return dinox_model.load(network)


@pytest.fixture
def folder(make_volume: MakeVolume, write_set: WriteSet, tmp_path: Path) -> Path:  # noqa: F811
    """A set: 7 slices of 40 x 60, 3 of 33 x 20 in val, and a single one of 9 x 9."""
    volumes = [make_volume(1, (7, 40, 60)), make_volume(2, (3, 33, 20)), make_volume(3, (1, 9, 9), patient=1)]
    write_set(tmp_path / "set", [volumes[:2], volumes[2:]], sides={volumes[1].id: "val"})
    return tmp_path / "set"


@pytest.fixture
def shards(folder: Path) -> Iterator[ShardSet]:
    with open_shards(folder) as opened:
        yield opened


def of_slices(shards: ShardSet, count: int) -> VolumeRecord:
    """The set's volume of so many slices."""
    return next(volume for volume in shards.volumes if volume.shape[0] == count)


def run(*words: object) -> int:
    return infer.main([str(word) for word in words])


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays and texts of a file."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as opened:
            every = dict(opened)
        texts = {name: str(value) for name, value in every.items() if value.dtype.kind == "U"}
        return {name: value for name, value in every.items() if name not in texts}, texts
    with safe_open(path, "np") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118


def check(
    path: Path, model: VisionTransformer, hu: np.ndarray, spacing_mm: Any, *, every: int = 1, step: int = 1,
    edge: str = "clamp",
) -> None:  # fmt: skip
    """A file beside `encode` of each window alone."""
    arrays, _ = read(path)
    centers = range(0, len(hu), every)
    assert arrays["slice"].tolist() == list(centers)
    for row, center in enumerate(centers):
        window = hu[window_slices(center, 3, step, len(hu), edge)]
        expected = dinox_model.encode(model, window[None], np.array([spacing_mm]))
        assert expected.cls is not None
        np.testing.assert_allclose(arrays["cls"][row], expected.cls[0], atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(arrays["patches"][row], expected.patches[0], atol=TOLERANCE, rtol=0)
        assert tuple(arrays["grid"]) == expected.grid


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(".") or path.suffix in (".tmp", ".zip")]


# ------------------------------------------------------------------------------------------ shards


def test_features_are_those_of_encode(
    network: Path, folder: Path, shards: ShardSet, model: VisionTransformer, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    words = [network, "--shards", folder, "--parts", "cls", "patches", "--batch-size", 2]
    assert run(*words, "--output", out) == 0
    said = capsys.readouterr().out
    assert "3 files written" in said
    assert "11 windows in" in said
    assert "a batch of 2: median" in said
    assert "peak memory: " in said
    for volume in shards.volumes:
        path = out / f"{volume.id}.safetensors"
        check(path, model, shards.read(volume, 0, volume.shape[0]), volume.spacing_mm)
        arrays, texts = read(path)
        assert arrays["z_mm"].tolist() == volume.z_positions_mm.tolist()
        assert (texts["volume"], texts["patient"], texts["split"]) == (volume.id, volume.patient, volume.split)
        assert json.loads(texts["spacing_mm"]) == list(volume.spacing_mm)
        assert (texts["format"], texts["depth"], texts["dtype"]) == ("dinox-features", "3", "fp32")
    assert run(*words, "--output", tmp_path / "npz", "--format", "npz") == 0
    for volume in shards.volumes:
        (ours, texts), (theirs, same) = (read(where / f"{volume.id}.{kind}") for where, kind in
                                         ((out, "safetensors"), (tmp_path / "npz", "npz")))  # fmt: skip
        assert texts == same
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    assert not leftovers(tmp_path)


def test_centres_steps_and_sides(
    network: Path, folder: Path, shards: ShardSet, model: VisionTransformer, tmp_path: Path
) -> None:
    words = [network, "--shards", folder, "--parts", "patches", "cls", "--every", 3]
    assert run(*words, "--step", 2, "--output", tmp_path / "step") == 0
    assert run(*words, "--step-mm", 3.9, "--output", tmp_path / "mm") == 0  # 2 slices of 2 mm
    first, side = of_slices(shards, 7), of_slices(shards, 3)
    for where in ("step", "mm"):
        path = tmp_path / where / f"{first.id}.safetensors"
        check(path, model, shards.read(first, 0, 7), first.spacing_mm, every=3, step=2)
        assert read(path)[1]["step"] == "2"
    assert run(network, "--shards", folder, "--split", "val", "--output", tmp_path / "val") == 0
    assert [path.stem for path in (tmp_path / "val").glob("*.safetensors")] == [side.id]
    assert read(tmp_path / "val" / f"{side.id}.safetensors")[0].keys() == {"cls", "slice", "z_mm", "grid"}


def test_a_stopped_run_goes_on_and_another_one_is_not_mixed_in(
    network: Path, folder: Path, shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, words = tmp_path / "out", [network, "--shards", folder, "--batch-size", 2]
    timed, calls = encoding.timed, []

    def stopped(*given: Any) -> Encoded:
        calls.append(len(given[1]))
        if len(calls) == 7:  # the last batch of the last volume
            raise KeyboardInterrupt
        return timed(*given)

    monkeypatch.setattr(encoding, "timed", stopped)
    assert run(*words, "--output", out) == 130
    assert max(calls) == 2
    done = [volume.id for volume in shards.volumes[:2]]
    assert sorted(path.stem for path in out.glob("*.safetensors")) == sorted(done)
    assert not leftovers(out)
    before = (out / f"{shards.volumes[0].id}.safetensors").read_bytes()
    assert run(*words, "--output", out) == 0
    assert f"1 file written to {out}, 2 were there already" in capsys.readouterr().out
    assert (out / f"{shards.volumes[0].id}.safetensors").read_bytes() == before
    assert run(*words, "--output", out, "--every", 2) == 1
    assert "made with another every: give another --output" in capsys.readouterr().err
    other = perturbed(SMALL, seed=1)
    dinox_model.save(other, tmp_path / "other")
    assert run(tmp_path / "other", *words[1:], "--output", out) == 1
    assert "made with another network" in capsys.readouterr().err


def test_damage_is_named_and_no_memory_said(
    network: Path, folder: Path, shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = folder / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    at = data.index(b"\x28\xb5\x2f\xfd") + 40
    data[at] ^= 1
    path.write_bytes(data)
    assert run(network, "--shards", folder, "--output", tmp_path / "out") == 1
    assert "error: shard-000001.tar" in capsys.readouterr().err
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == of_slices(shards, 1).index
    assert not leftovers(tmp_path / "out")

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(dinox_model, "encode", full)
    assert run(network, "--shape", "2,3,32,32", "--device", "cpu") == 1
    assert "cpu has too little memory for 2 windows at a time" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ DICOM and NIfTI


def everything(folder: Path) -> bytes:
    """Names and bytes of all that may be handed to anyone."""
    files = [path for path in folder.rglob("*") if path.is_file() and "private" not in path.parts]
    return b"".join(str(path.relative_to(folder)).encode() + path.read_bytes() for path in files)


def test_dicom_without_packing(
    network: Path, model: VisionTransformer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_series(tmp_path / "Doe Jane" / "a", 5)
    write_series(tmp_path / "Doe Jane" / "b", 4, series="9.8.7", patient="SECRET-7")
    (tmp_path / "key").write_bytes(KEY)
    out = tmp_path / "out"
    words = [network, "--input", tmp_path / "Doe Jane", "--parts", "cls", "patches", "--key-file", tmp_path / "key"]
    assert run(*words, "--output", out) == 0
    packed(tmp_path / "Doe Jane", tmp_path / "set", key_file=tmp_path / "key")
    assert run(network, "--shards", tmp_path / "set", "--output", tmp_path / "set" / "features") == 2
    assert not (tmp_path / "set" / "features").exists()
    with open_shards(tmp_path / "set") as shards:
        volumes = {volume.id: (shards.read(volume, 0, volume.shape[0]), volume) for volume in shards.volumes}
    assert {path.stem for path in out.glob("*.safetensors")} == volumes.keys()
    for name, (hu, volume) in volumes.items():
        check(out / f"{name}.safetensors", model, hu, volume.spacing_mm)
        arrays, texts = read(out / f"{name}.safetensors")
        assert arrays["z_mm"].tolist() == volume.z_positions_mm.tolist()
        assert texts["patient"] == volume.patient
    said = capsys.readouterr()
    shown = everything(out) + (said.out + said.err).replace(str(tmp_path), "").encode()
    assert not [word for word in (b"Doe", b"Jane", b"SECRET", b"9.8.7", b"1.2.3") if word in shown]
    sources = [json.loads(line) for line in (out / "private" / "sources.jsonl").read_text().splitlines()]
    assert {row["series"] for row in sources} == volumes.keys()
    assert (out / "private").stat().st_mode & 0o777 == 0o700
    assert not (out / "private" / "key").exists()


def test_a_key_of_its_own_is_kept_and_single_files_are_read(
    network: Path, model: VisionTransformer, tmp_path: Path
) -> None:
    files = write_series(tmp_path / "scan", 4)
    out = tmp_path / "out"
    words = [network, "--output", out, "--parts", "cls", "patches", "--input"]
    assert run(*words, files[2]) == 0
    (path,) = out.glob("*.safetensors")
    check(path, model, expected_hu(4)[2:3], (1.0, 0.7, 0.9))
    before = path.read_bytes()
    assert run(*words, files[2]) == 0
    assert list(out.glob("*.safetensors")) == [path]
    assert path.read_bytes() == before


def test_nifti_gives_what_dicom_gives(network: Path, model: VisionTransformer, tmp_path: Path) -> None:
    pytest.importorskip("nibabel", reason="needs the extra [nifti]")
    from tests.io.nifti_factory import as_dcm2niix, dcm2niix_affine, write_nifti

    hu = expected_hu(4)
    affine = dcm2niix_affine(hu.shape, (1.0, 0.7, 0.9), (-10.0, -20.0, 0.0))
    file = write_nifti(tmp_path / "scan.nii.gz", as_dcm2niix(hu), affine)
    assert run(network, "--input", file, "--output", tmp_path / "out", "--parts", "patches", "cls") == 0
    (path,) = (tmp_path / "out").glob("*.safetensors")
    check(path, model, hu, (1.0, 0.7, 0.9))


def test_what_is_refused_is_listed(network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "scans", tmp_path / "out"
    files = write_series(source / "gap", 6)
    files[3].unlink()
    words = [network, "--input", source, "--output", out]
    assert run(*words) == 1
    assert "SLICE_GAP: series" in capsys.readouterr().out
    write_series(source / "whole", 3, series="5.5")
    assert run(*words) == 3
    (row,) = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert row["code"] == "SLICE_GAP"
    assert len(list(out.glob("*.safetensors"))) == 1
    assert run(*words, "--split-gaps") == 0
    assert len(list(out.glob("*.safetensors"))) == 3
    (tmp_path / "empty").mkdir()
    assert run(network, "--input", tmp_path / "empty", "--output", tmp_path / "none") == 1


# ------------------------------------------------------------------------------------------ packages


def test_a_package_gives_the_same_and_takes_one_size(
    compiled: Compiled, folder: Path, shards: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    out = tmp_path / "out"
    words = [compiled.path, "--shards", folder, "--parts", "cls", "patches", "--batch-size", 4, "--output", out]
    assert run(*words) == 3
    said = capsys.readouterr().out
    assert f"volume {of_slices(shards, 3).id}: 33 x 20 pixels, and the package takes 48 x 64: left out" in said
    first = of_slices(shards, 7)  # 40 x 60 is 48 x 64 in whole patches
    assert [path.stem for path in out.glob("*.safetensors")] == [first.id]
    check(out / f"{first.id}.safetensors", compiled.model, shards.read(first, 0, 7), first.spacing_mm)
    assert run(compiled.path, "--shape", "3,3,48,64", "--batches", 2) == 0
    assert run(compiled.path, "--shape", "3,3,48,48") == 1
    assert run(compiled.path, "--shape", "3,3,48,64", "--dtype", "bf16") == 1
    assert "was compiled for fp32" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ the clock, and usage


@pytest.mark.parametrize(
    ("facts", "words", "said", "step"),
    [
        ({"step": 2}, (), "slices of a window are 2 apart, as in training", 2),
        ({"step_mm": 3.9}, (), "slices of a window are 3.9 mm apart, as in training", 2),  # slices of 2 mm
        (
            {"step": 2},
            ("--step", 1),
            "note: slices of a window are 1 apart as you ask; in training they were 2 apart",
            1,
        ),
        (
            {"step_mm": 3.9},
            ("--step", 2),
            "note: slices of a window are 2 apart as you ask; in training they were 3.9",
            2,
        ),
        ({"step": 2}, ("--step", 2), "", 2),
        ({}, (), "slices of a window are 1 apart\n", 1),
        ({}, ("--step", 2), "", 2),
    ],
)
def test_windows_are_cut_as_in_training_unless_asked_otherwise(
    tmp_path: Path, folder: Path, shards: ShardSet, capsys: pytest.CaptureFixture[str],
    facts: dict[str, Any], words: tuple[object, ...], said: str, step: int,
) -> None:  # fmt: skip
    model, volume = perturbed(SMALL), of_slices(shards, 7)
    model.preprocess = dinox_model.Preprocess(**facts)
    dinox_model.save(model, tmp_path / "own")
    ours = ("--shards", folder, "--parts", "cls", "patches", "--output", tmp_path / "out", "--every", 3)
    assert run(tmp_path / "own", *ours, *words) == 0
    printed = capsys.readouterr().out
    assert said in printed
    assert ("note:" in printed) == said.startswith("note:")
    path = tmp_path / "out" / f"{volume.id}.safetensors"
    check(path, dinox_model.load(tmp_path / "own"), shards.read(volume, 0, 7), volume.spacing_mm, every=3, step=step)


@pytest.mark.parametrize(("edge", "expected"), [(None, "clamp"), ("clamp", "clamp"), ("reflect", "reflect")])
def test_every_slice_has_features_and_its_window_the_edge_of_training(
    tmp_path: Path, folder: Path, shards: ShardSet, edge: str | None, expected: str
) -> None:
    model, volume = perturbed(SMALL), of_slices(shards, 7)
    model.preprocess = dinox_model.Preprocess(depth=3, step=2, edge=edge)
    dinox_model.save(model, tmp_path / "own")
    words = (tmp_path / "own", "--shards", folder, "--parts", "cls", "patches", "--output", tmp_path / "out")
    assert run(*words) == 0
    path, hu = tmp_path / "out" / f"{volume.id}.safetensors", shards.read(volume, 0, 7)
    check(path, dinox_model.load(tmp_path / "own"), hu, volume.spacing_mm, step=2, edge=expected)
    assert read(path)[1]["edge"] == expected
    model.preprocess = dinox_model.Preprocess(depth=3, step=2, edge="clamp")
    dinox_model.save(model, tmp_path / "clamped")
    assert run(tmp_path / "clamped", *words[1:]) == (0 if expected == "clamp" else 1), "edges are not mixed"


def test_random_windows_are_timed(network: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(network, "--shape", "2,3,32,48", "--batches", 4, "--dtype", "bf16", "--parts", "patches") == 0
    said = capsys.readouterr().out
    assert "runs on" in said
    assert "in bf16, windows of 3 slices" in said
    assert "8 windows in" in said
    assert "(4 batches)" in said
    assert run(network, "--shape", "2,5,32,48") == 1
    assert "windows of 3 slices, not 5" in capsys.readouterr().err


def test_the_clock_counts_whole_batches_behind_the_first() -> None:
    meter = Meter(4, "cpu")
    meter.begin_s -= 10
    meter.add(4, 9.0)
    assert "no second whole batch" in meter.lines()[1]
    for latency_s in (0.1, 0.2, 0.3):
        meter.add(4, latency_s)
    meter.add(1, 5.0)
    lines = meter.lines()
    assert lines[0].startswith("17 windows in 10.0 s: 1.7")
    assert lines[1].startswith("a batch of 4: median 200.0 ms, p95 290.0 ms")
    assert lines[1].endswith("(3 batches, the first one left out): 20.00 windows a second")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shards", "set"], "--shards needs --output"),
        (["--shape", "1,3,32,32", "--every", "2"], "--every means nothing with --shape"),
        (["--input", "x", "--output", "o", "--split", "val"], "--split means nothing with --input"),
        (["--shards", "s", "--output", "o", "--allow-tilt"], "--allow-tilt means nothing with --shards"),
        (["--shape", "1,3,32"], "is no shape"),
        (["--shards", "s", "--output", "o", "--every", "0"], "at least 1"),
        (["--shards", "s", "--output", "o", "--step", "2", "--step-mm", "1"], "not allowed with"),
        ([], "one of the arguments --shards --input --shape is required"),
    ],
)
def test_wrong_usage(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        run("net", *words)
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


def test_what_cannot_be_begun(network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--input", tmp_path / "nothing", "--output", tmp_path / "out"]
    assert run(network, *words) == 2
    assert "there is no" in capsys.readouterr().err
    assert run(network, "--input", tmp_path, "--output", tmp_path / "out", "--key-file", tmp_path / "no") == 2
    assert "the key file" in capsys.readouterr().err
    for nowhere in (tmp_path / "none", tmp_path / "none.pt2"):
        assert run(nowhere, "--shape", "1,3,32,32") == 2
        assert "no such file or folder" in capsys.readouterr().err
    assert run(network, "--shards", tmp_path / "none", "--output", tmp_path / "out") == 2
    assert "no such folder" in capsys.readouterr().err
    assert run(tmp_path, "--shape", "1,3,32,32") == 1
    assert capsys.readouterr().err.startswith("error: ")
    for changes, message in (({"in_channels": 2}, "odd number"), ({"cls_token": False}, "give --parts patches")):
        config = dinox_model.ViTConfig.from_dict(SMALL.to_dict() | changes)
        dinox_model.save(dinox_model.build(config), tmp_path / message)
        assert run(tmp_path / message, "--input", network, "--output", tmp_path / "out") == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_has_examples_and_exit_codes_and_needs_no_torch(repository: Path) -> None:
    tools = str(repository / "tools")
    code = (
        f"import sys; sys.path.insert(0, {tools!r}); import infer\n"
        "try:\n infer.main(['--help'])\nfinally:\n assert 'torch' not in sys.modules"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "examples:" in ran.stdout
    assert "exit code:" in ran.stdout


# ------------------------------------------------------------------------------------------ parts


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_a_file_is_whole_or_absent(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"v.{kind}"
    specs = {"a": ArraySpec((3, 2)), "b": ArraySpec((3,), "int64")}
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    with FeatureFile(path, specs, {"volume": "ü"}) as file:
        file.put("b", 0, np.arange(3))
        file.put("a", 1, values[1:])
        file.put("a", 0, values[:1])
        assert not path.exists()
    arrays, texts = read(path)
    assert np.array_equal(arrays["a"], values)
    assert arrays["b"].tolist() == [0, 1, 2]
    assert texts == {"format": "dinox-features", "volume": "ü"}
    for name, start, wrong in (
        ("a", 2, values),
        ("a", 0, values[:, :1]),
        ("b", 0, values),
        ("a", 0, values.astype(int)),
    ):
        with pytest.raises(ValueError, match=f"{name} is "), FeatureFile(tmp_path / f"w.{kind}", specs, {}) as file:
            file.put(name, start, wrong)
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_reading_is_ahead_by_a_few_items_only() -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 50:
            raise ValueError("damaged")
        return item * item

    results = ahead(work, range(100))
    for item in range(20):
        assert next(results) == item * item
        assert len(begun) <= item + 1 + encoding.READING_THREADS
    with pytest.raises(ValueError, match="damaged"):
        list(results)
    assert len(begun) <= 51 + encoding.READING_THREADS

"""Compiled packages: the same numbers without our Python, any number of images, and clear words where it cannot be."""

import dataclasses
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import dinox_model
from dinox_model import ViTFeatures
from dinox_model.__main__ import main
from dinox_model.execution import Execution, prepare
from dinox_model.export import autocast, export_package, exported_program
from dinox_model.package import FACTS, PackageError, PackageFacts, load_package, read_facts
from dinox_model.weights import read_preprocess
from tests.model.compiled import PREPROCESS, SIZE, Compiled, compiled  # noqa: F401 (a fixture)
from tests.model.foreign_weights import SMALL, perturbed

TOLERANCE = 1e-5

WITHOUT_US = """
import sys, warnings
warnings.simplefilter("error", UserWarning)

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("dinox_model", "dinox_io", "dinox_train", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Blocker())
try:
    import dinox_model
except ModuleNotFoundError:
    pass
else:
    sys.exit("the blocker lets dinox_model through")

import numpy, torch
package, images, output = sys.argv[1:]
run = torch._inductor.aoti_load_package(package)
given = numpy.load(images)
results = {name: [part.numpy() for part in run(torch.from_numpy(x))] for name, x in given.items()}
numpy.savez(output, **{f"{name}.{i}": part for name, parts in results.items() for i, part in enumerate(parts)})
"""


def images(count: int, size: tuple[int, int] = SIZE, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def parts_of(features: ViTFeatures) -> list[Tensor]:
    return [part for part in features[:3] if part is not None]


# ------------------------------------------------------------------------------------------ a package that is run


def test_it_runs_where_we_cannot_be_imported(compiled: Compiled, tmp_path: Path) -> None:  # noqa: F811
    given = {f"of{count}": images(count, seed=count) for count in (1, 2, 5)}
    np.savez(tmp_path / "images.npz", **{name: x.numpy() for name, x in given.items()})
    command = [sys.executable, "-I", "-c", WITHOUT_US, compiled.path, tmp_path / "images.npz", tmp_path / "out.npz"]
    ran = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    with np.load(tmp_path / "out.npz") as found, torch.no_grad():
        for name, x in given.items():
            expected = compiled.model(x)
            for place, part in enumerate((expected.cls, expected.registers, expected.patches)):
                np.testing.assert_allclose(found[f"{name}.{place}"], part.numpy(), atol=TOLERANCE, rtol=0)


def test_a_package_encodes_hu_as_training_does(compiled: Compiled) -> None:  # noqa: F811
    package = load_package(compiled.path)
    hu = np.random.default_rng(0).integers(-1024, 1500, (3, 3, 41, 60), dtype=np.int16)  # padded to 48 x 64
    spacing_mm = np.ones((3, 3))
    found, expected = package.encode(hu, spacing_mm), dinox_model.encode(compiled.model, hu, spacing_mm)
    assert found.grid == expected.grid == (3, 4)
    assert all(torch.allclose(*pair, atol=TOLERANCE, rtol=0) for pair in zip(found[:3], expected[:3], strict=True))
    with pytest.raises(ValueError, match="spacing_mm must be"):
        package.encode(hu, np.ones((2, 3)))
    with pytest.raises(TypeError, match="HU must be int16"):
        package.encode(hu.astype(np.float32), spacing_mm)


def test_the_folder_says_what_it_holds(compiled: Compiled) -> None:  # noqa: F811
    assert sorted(path.name for path in compiled.folder.iterdir()) == ["README.md", "model.pt2", "preprocess.json"]
    facts = read_facts(compiled.path)
    assert facts.outputs == ("cls", "registers", "patches")
    assert (facts.inputs, facts.size, facts.in_channels, facts.grid) == (("x",), SIZE, 3, (3, 4))
    assert (facts.device, facts.dtype, facts.torch) == ("cpu", "fp32", torch.__version__)
    assert facts.weights_bytes == sum(4 * tensor.numel() for tensor in compiled.model.parameters())
    assert facts.preprocess == read_preprocess(compiled.folder / "preprocess.json", 3) == PREPROCESS
    card = (compiled.folder / "README.md").read_text()
    assert 'aoti_load_package("model.pt2")' in card
    assert "cls, registers, patches = run(x)" in card


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (images(1, (48, 48)), r"takes \(b, 3, 48, 64\), not \(1, 3, 48, 48\)"),
        (images(1)[:, :2], r"not \(1, 2, 48, 64\)"),
        (images(1)[:0], r"not \(0, 3, 48, 64\)"),
        (images(1).double(), "x as float32 on cpu, not torch.float64"),
        (images(1).to("meta"), "not torch.float32 on meta"),
    ],
)
def test_other_input_is_refused_with_what_it_takes(compiled: Compiled, x: Tensor, message: str) -> None:  # noqa: F811
    with pytest.raises(PackageError, match=message):
        load_package(compiled.path)(x)


def test_input_in_any_layout_and_no_millimetres(compiled: Compiled) -> None:  # noqa: F811
    package, x = load_package(compiled.path), images(2)
    turned = x.to(memory_format=torch.channels_last)
    assert torch.equal(package(turned).patches, package(x).patches)
    with pytest.raises(PackageError, match="does not look at mm_per_pixel"):
        package(x, torch.ones(2, 2))


@pytest.mark.gpu
def test_a_package_for_cuda(tmp_path: Path) -> None:
    model = perturbed(SMALL).cuda()
    package = load_package(export_package(model, tmp_path / "out", size=SIZE, device="cuda"))
    for count in (1, 3):
        x = images(count).cuda()
        with torch.no_grad():
            expected = model(x)
        assert all(
            torch.allclose(*pair, atol=TOLERANCE, rtol=0) for pair in zip(package(x)[:3], expected[:3], strict=True)
        )


# ------------------------------------------------------------------------------------------ the graph


def test_networks_that_look_at_millimetres_take_them() -> None:
    config = dataclasses.replace(
        SMALL, positions="rope_mm", scale_conditioning=True, cls_token=False, num_registers=0, qk_norm=True
    )
    model = perturbed(config)
    exported, facts = exported_program(model, size=(32, 48), device="cpu", dtype="fp32")
    assert facts.inputs == ("x", "mm_per_pixel")
    assert facts.outputs == ("registers", "patches")
    for count in (1, 3):
        x, mm_per_pixel = images(count, (32, 48)), torch.rand(count, 2) + 0.5
        mm_per_pixel[0] = torch.nan
        with torch.no_grad():
            expected = model(x, mm_per_pixel=mm_per_pixel)
            registers, patches = exported.module()(x, mm_per_pixel)
        assert registers.shape == (count, 0, SMALL.width)
        assert torch.allclose(patches, expected.patches, atol=TOLERANCE, rtol=0)


def test_bf16_is_what_autocast_computes_and_its_weights_are_half_as_large() -> None:
    config = dataclasses.replace(SMALL, mlp="swiglu", positions="learned", learned_grid=(2, 2), qkv_bias="full")
    model = perturbed(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exported, facts = exported_program(model, size=(32, 48), device="cpu", dtype="bf16")
    whole = sum(4 * tensor.numel() for tensor in model.parameters())
    assert 0.5 * whole < facts.weights_bytes < 0.6 * whole
    with torch.no_grad():
        plain = model(images(3, (32, 48)))
        with autocast("cpu", "bf16"):
            expected = model(images(3, (32, 48)))
        found = exported.module()(images(3, (32, 48)))
    for ours, theirs, exact in zip(found, parts_of(expected), parts_of(plain), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs.float())
        assert not torch.equal(ours, exact)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_a_run_has_put_on_a_network_is_not_exported() -> None:
    model = perturbed(dataclasses.replace(SMALL, num_layers=1))
    prepare(model, Execution(checkpointing="block"))
    exported, _ = exported_program(model.train(), size=(16, 16), device="cpu", dtype="fp32")
    assert "forward" in vars(model.blocks[0])
    assert model.training
    with torch.no_grad():
        expected = model(images(2, (16, 16)))
        assert torch.equal(exported.module()(images(2, (16, 16)))[2], expected.patches)


# ------------------------------------------------------------------------------------------ refusals


def test_without_a_compiler_it_says_what_to_install(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from torch._inductor import config

    dinox_model.save(perturbed(SMALL), tmp_path / "net")
    with config.patch({"cpp.cxx": (None, str(tmp_path / "no-compiler"))}):  # monkeypatch leaves the name deleted
        assert main(["export", str(tmp_path / "net"), "--format", "pt2", "--output", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("export: a .pt2 is made by a C++ compiler, and torch finds none: install one")
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (40, 64)}, "multiples of the patch size, 16, not 40 x 64"),
        ({"size": (0, 64)}, "multiples of the patch size"),
        ({"device": "tpu"}, "device must be one of cpu, cuda"),
        ({"dtype": "fp16"}, "dtype must be one of fp32, bf16"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(PackageError, match=message):
        export_package(perturbed(SMALL), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="exists already"):
        export_package(perturbed(SMALL), tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_package_is_compiled_where_its_device_is(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="torch sees none here"):
        export_package(perturbed(SMALL), tmp_path / "out", device="cuda")


def test_options_of_packages_are_refused_with_other_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", str(tmp_path), "--output", str(tmp_path / "out"), "--format"]
    for option in (["--size", "224"], ["--device", "cpu"], ["--dtype", "bf16"]):
        with pytest.raises(SystemExit) as refused:
            main([*words, "hf", *option])
        assert refused.value.code == 2
        assert f"{option[0]} is for --format pt2" in capsys.readouterr().err
    with pytest.raises(SystemExit) as refused:
        main([*words, "pt2", "--size", "big"])
    assert refused.value.code == 2
    assert main([*words, "pt2", "--allow", "cls_norm"]) == 1
    assert "leave out --allow cls_norm" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ facts


def facts() -> PackageFacts:
    return PackageFacts(
        in_channels=3, patch_size=16, size=(32, 48), inputs=("x",), outputs=("cls", "registers", "patches"),
        device="cpu", dtype="fp32", weights_bytes=8, torch="2.13.0", preprocess=PREPROCESS,
    )  # fmt: skip


def archive(path: Path, document: object) -> Path:
    with zipfile.ZipFile(path, "w") as target:
        target.writestr("model/data/aotinductor/model/x.wrapper_metadata.json", json.dumps(document))
    return path


def test_facts_travel_and_are_read_without_running_anything(tmp_path: Path) -> None:
    assert PackageFacts.from_json(facts().to_json()) == facts()
    assert read_facts(archive(tmp_path / "a.pt2", {FACTS: facts().to_json()})) == facts()


def test_other_files_are_no_packages(tmp_path: Path) -> None:
    newer = json.loads(facts().to_json()) | {"version": 2}
    (tmp_path / "text.pt2").write_text("no archive")
    cases = {
        tmp_path / "missing.pt2": "no such file",
        tmp_path / "text.pt2": "damaged, or no package",
        archive(tmp_path / "b.pt2", {"other": "x"}): "no facts of ours",
        archive(tmp_path / "c.pt2", [1]): "no facts of ours",
        archive(tmp_path / "d.pt2", {FACTS: json.dumps(newer)}): "version 2; this dinox_model reads",
        archive(tmp_path / "e.pt2", {FACTS: "{}"}): "damaged",
    }
    for path, message in cases.items():
        with pytest.raises(PackageError, match=message):
            load_package(path)


def test_a_package_without_code_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pt2", {FACTS: facts().to_json()})
    with pytest.raises(PackageError, match=r"torch cannot load it \(compiled by torch 2.13.0, here is"):
        load_package(path)

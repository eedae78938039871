"""The table of tiles: which row is taken, what stands where there is none, and that the package's own is whole."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dinox_model.kernels import architecture, tiles
from dinox_model.kernels.language import INTERPRETED
from dinox_model.kernels.tiles import Instead, Tiles, instead, prefer, tiles_for
from dinox_model.kernels.traffic import Traffic

NEEDS_INTERPRETER = False
TABLE = {
    "product": [
        {"arch": ["gfx1151"], "head_dim": [128], "instead": "sdpa-flash", "because": "every tile spills"},
        {"arch": ["gfx1151"], "dtype": ["fp32"], "instead": "math", "because": "no matrix instructions"},
        {"arch": ["gfx1151", "gfx1100"], "sizes": {"BLOCK": 16}, "num_warps": 8},
        {"length": [None, 256], "sizes": {"BLOCK": 32}},
        {"length": [257, None], "triton": ["0.1"], "sizes": {"BLOCK": 1}},
        {"sizes": {"BLOCK": 64}, "num_stages": 2, "waves_per_eu": 2},
    ]
}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    file = tmp_path / "tiles.json"
    file.write_text(json.dumps(TABLE))
    monkeypatch.setattr(tiles, "TABLE", file)
    forget()
    yield file
    prefer({})
    monkeypatch.undo()
    forget()


def forget() -> None:
    tiles._read.cache_clear()
    tiles._find.cache_clear()


@pytest.mark.parametrize(
    ("asked", "block"),
    [
        ({"arch": "gfx1151", "dtype": "bf16", "head_dim": 64}, 16),
        ({"arch": "gfx1100", "dtype": "fp32", "head_dim": 128}, 16),
        ({"arch": "sm_90", "dtype": "bf16", "length": 256}, 32),
        ({"arch": "sm_90", "dtype": "bf16", "length": 257}, 64),
        ({"arch": "sm_90", "dtype": "bf16"}, 64),
        ({"arch": "sm_90", "dtype": "bf16", "head_dim": 128}, 64),
    ],
)
def test_the_first_row_that_fits_is_taken(table: Path, asked: dict[str, Any], block: int) -> None:
    found = tiles_for("product", **asked)
    assert found is not None
    assert found.sizes == {"BLOCK": block}
    assert instead("product", **asked) is None


def test_a_cell_without_tiles_names_what_runs_instead(table: Path) -> None:
    wide = {"arch": "gfx1151", "dtype": "bf16", "head_dim": 128}
    assert tiles_for("product", **wide) is None
    assert instead("product", **wide) == Instead("sdpa-flash", "every tile spills")


def test_no_row_at_all_is_none_and_nothing_instead(table: Path) -> None:
    table.write_text(json.dumps({"product": [{"arch": ["sm_90"], "sizes": {}}]}))
    forget()
    assert tiles_for("product", arch="sm_80", dtype="bf16") is None
    assert instead("product", arch="sm_80", dtype="bf16") is None


def test_an_unknown_kernel_is_refused_with_the_nearest(table: Path) -> None:
    with pytest.raises(ValueError, match=r"'prodct'.*'product'"):
        tiles_for("prodct", arch="sm_90", dtype="bf16")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"num_warps": 4}, "lacks sizes"),
        ({"sizes": {}, "num_wraps": 4}, "has num_wraps"),
        ({"instead": "math"}, "lacks because"),
        ({"instead": "math", "because": "x", "sizes": {}}, "has sizes"),
    ],
)
def test_a_damaged_row_is_refused(table: Path, row: Mapping[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"row 0: it {says}"):
        prefer({"product": [row]})
    table.write_text(json.dumps({"product": [row]}))
    forget()
    with pytest.raises(ValueError, match=f"product, row 0: it {says}"):
        tiles_for("product", arch="sm_90", dtype="bf16")


def test_rows_of_this_machine_come_first_until_they_are_taken_back(table: Path) -> None:
    asked = {"arch": "sm_90", "dtype": "bf16"}
    prefer({"product": [{"arch": ["sm_90"], "sizes": {"BLOCK": 128}}]})
    assert tiles_for("product", **asked) == Tiles(sizes={"BLOCK": 128})
    assert tiles_for("product", arch="sm_80", dtype="bf16") == Tiles(sizes={"BLOCK": 64}, num_stages=2, waves_per_eu=2)
    prefer({})
    assert tiles_for("product", **asked) != Tiles(sizes={"BLOCK": 128})


def test_arguments_of_a_launch_name_waves_only_where_they_are_set() -> None:
    assert Tiles(sizes={"BLOCK": 8}).arguments() == {
        "BLOCK": 8,
        "num_warps": 4,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }
    assert Tiles(sizes={}, waves_per_eu=2).arguments()["waves_per_eu"] == 2


def test_the_package_has_a_whole_table() -> None:
    assert tiles.table()
    for kernel in tiles.table():
        for arch in architecture.ARCHITECTURES:
            tiles_for(kernel, arch=arch, dtype="bf16", head_dim=64, length=1024)


def test_architecture_of_the_cpu_and_of_others() -> None:
    assert architecture.architecture(torch.device("cpu")) == ("interpreter" if INTERPRETED else "cpu")
    assert architecture.architecture(torch.device("mps")) == "mps"


def test_architecture_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    class Radeon:
        gcnArchName = "gfx942:sramecc+:xnack-"

    architecture._of_gpu.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert architecture.architecture(torch.device("cuda:0")) == "sm_90"
    monkeypatch.setattr(torch.version, "hip", "7.2")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Radeon)
    assert architecture.architecture(torch.device("cuda:1")) == "gfx942"
    architecture._of_gpu.cache_clear()


def test_traffic_adds_up_and_knows_its_floor() -> None:
    total = sum([Traffic(3, 1, 100), Traffic(5, 1, 0)], Traffic())
    assert total == Traffic(8, 2, 100)
    assert total.bytes == 10
    assert total.seconds(bytes_per_second=10, flops_per_second=50) == 2.0
    assert total.seconds(bytes_per_second=2, flops_per_second=50) == 5.0

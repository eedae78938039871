"""Real and derived series against `expected.json`: every case behaves as its `expect` says, from pack to open_shards.

tests/io/ground_truth.py holds what each case must give; `python -m tests.io.case_table` prints the table of them all.
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinox_io import open_shards
from dinox_io.pack import PackSettings, pack
from dinox_io.progress import ProgressReport
from dinox_io.series import SeriesRules
from tests.io.ground_truth import REJECTED_AS, SHORTFALLS, VISIBLE, behaves, packed, without_decoder
from tests.io.kept_pools import Pools, pools  # noqa: F401 (a fixture)


@pytest.fixture(autouse=True)
def kept_workers(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr("dinox_io.pack.WorkerPool", pools.lend)


def cases(shared_data: Path) -> list[dict[str, Any]]:
    return json.loads((shared_data / "expected.json").read_text())["cases"]


def test_every_case_behaves_as_expected(shared_data: Path, tmp_path: Path) -> None:
    wrong: list[str] = []
    missing_decoders = False
    for number, case in enumerate(cases(shared_data)):
        digests, files, exit_code = packed(case, shared_data, tmp_path / str(number))
        missing_decoders |= without_decoder(case, digests)
        if behaves(case, digests, files, exit_code) == (case["id"] in SHORTFALLS):
            wrong.append(f"{case['id']}: {digests=} {files=} {exit_code=}")
    assert not wrong
    if missing_decoders:
        pytest.skip("all else is right, but the decoders of dinox[dicom] are not installed")


def test_the_table_covers_what_must_be_rejected(shared_data: Path) -> None:
    assert {case["id"] for case in cases(shared_data) if case["expect"] == "reject"} == set(REJECTED_AS)
    assert set(VISIBLE) <= {case["id"] for case in cases(shared_data)}


def records(shared_data: Path, out: Path, case: str, **rules: Any) -> list[dict[str, Any]]:
    """The KEY.json of each volume of a case, read with plain tar."""
    import tarfile

    settings = PackSettings(inputs=(shared_data / case,), output=out, workers=1, rules=SeriesRules(**rules))
    pack(settings, ProgressReport(io.StringIO()))
    with tarfile.open(out / "shard-000000.tar") as tar:
        members = [member for member in tar if member.name.endswith(".json") and not member.name.startswith("__")]
        return [json.load(tar.extractfile(member)) for member in members]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("case", "fact", "value"),
    [
        ("derived/13_fractional_rescale", "rounded", True),
        ("derived/22_rows_bottom_to_top", "direction", [1, 0, 0, 0, -1, 0, 0, 0, 1]),
        ("derived/23_anisotropic_pixels", "spacing_mm", [1.0, 0.7, 0.9]),
        ("derived/24_monochrome1", "monochrome1", True),
        ("derived/34_trailing_bytes_in_pixeldata", "surplus_bytes", 9 * 64),
        ("derived/44_legacy_enhanced_multiframe", "multiframe", True),
        ("lidc_classic_uid_layout/LIDC-IDRI-0001", "padding_stored", -2000),
        ("lidc_classic_uid_layout/LIDC-IDRI-0002", "spacing_mm", [1.25, 0.681641, 0.681641]),
    ],
)
def test_what_was_decided_stands_in_the_record(
    shared_data: Path, tmp_path: Path, case: str, fact: str, value: object
) -> None:
    (record,) = records(shared_data, tmp_path, case)
    assert record[fact] == value


def test_saturation_is_counted(shared_data: Path, tmp_path: Path) -> None:
    (record,) = records(shared_data, tmp_path, "derived/14_int16_overflow")
    with open_shards(tmp_path) as shards:
        hu = shards.read(shards.volumes[0], 0, 9)
    assert record["saturated_voxels"] == int(np.count_nonzero(hu == 32767)) > 0


def test_flags_accept_what_the_default_refuses(shared_data: Path, tmp_path: Path) -> None:
    runs = records(shared_data, tmp_path / "gap", "derived/03_missing_middle_slice", split_gaps=True)
    assert sorted(record["shape"][0] for record in runs) == [3, 5] or sorted(r["shape"][0] for r in runs) == [4, 4]
    (record,) = records(shared_data, tmp_path / "tilt", "derived/21_gantry_tilt", allow_tilt=True)
    assert record["tilt_degrees"] == pytest.approx(12, abs=0.1)

"""The summary of a pack: counted as people do, what to look at first, and what will hurt the training."""

from pathlib import Path
from typing import Any

import pytest

from dinox_io.report import PackReport
from dinox_io.series import SeriesRules
from tests.io.dicom_factory import write_series
from tests.io.small_packs import KEY, packed, patients, same_process  # noqa: F401 (same_process is a fixture)

pytestmark = pytest.mark.usefixtures("same_process")


def run(source: Path, out: Path, **options: Any) -> PackReport:
    """Pack with the tests' key, in this process."""
    key = source.parent / "key"
    key.write_bytes(KEY)
    return packed(source, out, key_file=key, **options)


def said(report: PackReport) -> str:
    return "\n".join(report.lines("OUT"))


def test_the_summary_counts_as_people_do(tmp_path: Path) -> None:
    write_series(tmp_path / "in", 3)
    text = said(run(tmp_path / "in", tmp_path / "out", val_fraction=0.0))
    assert "Packed 1 new volume. The set in OUT now holds 1 volume of 1 patient, 3 slices, in 1 shard." in text
    assert "(1 patient)" in text
    assert " 0.0 MB" not in text
    assert "Warning" not in text
    again = run(tmp_path / "in", tmp_path / "out", val_fraction=0.0, preset="fast", rules=SeriesRules(min_slices=2))
    assert "Nothing new: the set in OUT holds 1 volume of 1 patient" in said(again)
    assert "Packed" not in said(again)
    assert "Other --preset, --min-slices than before: what is in the set already stays as it was packed." in said(again)
    same = run(tmp_path / "in", tmp_path / "out", val_fraction=0.0)
    assert "than before" not in said(same)


@pytest.mark.parametrize(("fraction", "side", "option"), [(1e-9, "val", "larger"), (0.999999999, "train", "smaller")])
def test_an_empty_side_is_warned_of(tmp_path: Path, fraction: float, side: str, option: str) -> None:
    write_series(tmp_path / "in", 3)
    text = said(run(tmp_path / "in", tmp_path / "out", val_fraction=fraction))
    assert f"Warning: no patient fell to {side}: a {option} --val-fraction" in text
    assert text.count("Warning") == 1


def test_volumes_on_no_side_are_explained(tmp_path: Path) -> None:
    source = patients(tmp_path / "in", 2, twins=True)
    for seed in range(64):
        report = run(source, tmp_path / f"out{seed}", val_fraction=0.5, split_seed=seed)
        if report.manifest and report.manifest["leaks"]:
            assert "On no side (none): volumes that are identical under patients of different sides" in said(report)
            return
        assert "On no side" not in said(report)
    pytest.fail("no seed parts the twins")


def test_what_to_look_at_stands_first_and_earlier_runs_apart(tmp_path: Path) -> None:
    source = patients(tmp_path / "in", 4)
    lines = run(source, tmp_path / "out").lines("OUT")
    heads = [" Rejected (look at these):", "       1 series TOO_FEW_SLICES: --min-slices lowers the limit"]
    place = lines.index(heads[0])
    assert lines[place : place + 3] == [*heads, " Skipped by rule:"]
    assert lines[place + 3].startswith("       1 series NOT_CT: ")
    assert lines[place + 4].startswith("       3 files  NOT_DICOM: ")
    assert not any("earlier" in line for line in lines)
    (tmp_path / "more").mkdir()
    (tmp_path / "more/other.txt").write_text("nothing more")
    lines = run(tmp_path / "more", tmp_path / "out").lines("OUT")
    assert " Rejected (look at these):" not in lines
    assert any(line.startswith("       1 file   NOT_DICOM: ") for line in lines)
    assert " Also from earlier runs: 1 series NOT_CT, 3 files NOT_DICOM, 1 series TOO_FEW_SLICES." in lines

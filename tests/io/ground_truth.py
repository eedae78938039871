"""What each case of the ground truth (expected.json) must give, and what packing it alone gives.

Nothing is listed as a shortfall: SHORTFALLS is where a case that cannot be satisfied yet would stand, with its reason.
"""

import io
import json
from pathlib import Path
from typing import Any

from dinox_io import open_shards
from dinox_io.hounsfield import volume_digest
from dinox_io.pack import PackSettings, pack
from dinox_io.progress import ProgressReport
from dinox_io.rules import RULES
from dinox_io.series import SeriesRules

SHORTFALLS: dict[str, str] = {}

REJECTED_AS = {
    "d2n_gantrytilting_001": "GANTRY_TILT",
    "d2n_sliceincrement_001": "SLICE_GAP",
    "pyd_J2K_pixelrep_mismatch": "GANTRY_TILT",
    "pyd_eCT_Supplemental": "PARAMETRIC_MAP",
    "nysbu_coronal": "NOT_AXIAL",
    "nysbu_sagittal": "NOT_AXIAL",
    "derived/03_missing_middle_slice": "SLICE_GAP",
    "derived/05_duplicate_different_pixels": "DUPLICATE_POSITION",
    "derived/08_mixed_matrix": "MIXED_MATRIX",
    "derived/10_truncated_file": "PIXELS_TRUNCATED",
    "derived/17_no_position": "NO_POSITION",
    "derived/20_variable_spacing": "VARIABLE_SPACING",
    "derived/21_gantry_tilt": "GANTRY_TILT",
    "derived/27_not_ct": "NOT_CT",
    "derived/28_two_slices": "TOO_FEW_SLICES",
    "derived/29_two_phases_one_series": "DUPLICATE_POSITION",
    "derived/31_no_rescale": "NO_RESCALE",
    "derived/35_no_pixel_spacing": "NO_PIXEL_SPACING",
}
"""The cases whose `expect` is reject, and the code that each must get."""

VISIBLE = {
    "derived/04_duplicate_same_pixels": {"DUPLICATE_DROPPED": 1},
    "derived/06_same_file_twice": {"DUPLICATE_DROPPED": 1},
    "derived/11_localizer_in_series": {"LOCALIZER_DROPPED": 1},
    "derived/26_junk_files": {"NOT_DICOM": 9},
    "pyd_dicomdir": {"DICOMDIR": 7, "LOCALIZER": 2, "NOT_CT": 3, "SLICE_GAP": 4},
}
"""Accepted cases in which something was left out: the files that each code stands for."""

DECODERS = ("DECODER_MISSING", "SYNTAX_UNSUPPORTED")


def packed(case: dict[str, Any], shared_data: Path, out: Path) -> tuple[list[str], dict[str, int], int]:
    """(digests of the set, files by code, exit code) of a case packed alone."""
    # Cases of one or two slices are "accept" only with the limit lowered; the single slice that must be refused for its
    # tilt must not be refused for being one.
    lowest = min([volume["shape"][0] for volume in case["expected_volumes"]] or [3])
    if case["id"] == "pyd_J2K_pixelrep_mismatch":
        lowest = 1
    settings = PackSettings(
        inputs=(shared_data / case["path"],), output=out, workers=1, rules=SeriesRules(min_slices=min(3, lowest))
    )
    report = pack(settings, ProgressReport(io.StringIO()))
    files: dict[str, int] = {}
    for line in (out / "rejected.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert set(row) == {"code", "reason", "series", "files", "hint"}
        files[row["code"]] = files.get(row["code"], 0) + row["files"]
    if report.manifest is None:
        return [], files, report.exit_code
    with open_shards(out, verify="always") as shards:
        for volume in shards.volumes:
            assert volume_digest(shards.read(volume, 0, volume.shape[0])) == volume.digest
        return sorted(volume.digest for volume in shards.volumes), files, report.exit_code


def behaves(case: dict[str, Any], digests: list[str], files: dict[str, int], exit_code: int) -> bool:
    """Whether what `packed` gave is what the case's `expect` says."""
    if case["id"] in REJECTED_AS:
        code = REJECTED_AS[case["id"]]
        return not digests and list(files) == [code] and exit_code == (1 if RULES[code].kind == "rejected" else 0)
    if without_decoder(case, digests):
        return len(files) == 1 and next(iter(files)) in DECODERS
    expected = sorted(volume["sha256_hu_i16le"] for volume in case["expected_volumes"])
    right_exit = exit_code == (3 if "SLICE_GAP" in files else 0)
    return digests == expected and files == VISIBLE.get(case["id"], {}) and right_exit


def without_decoder(case: dict[str, Any], digests: list[str]) -> bool:
    """Whether a case that needs the [dicom] extra gave nothing, as it may where that is not installed."""
    return not digests and case["id"] not in REJECTED_AS and "decoder" in case["expect"]

"""Every kind of fault of the ground truth on random scans, packed together: what comes out is exactly what must.

One pack holds a scan of each kind: a fault is told of where it is, and costs the others nothing.
"""

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinox_io import open_shards
from dinox_io.pack import PackSettings, pack
from dinox_io.privacy import pseudonym
from dinox_io.progress import ProgressReport
from dinox_io.rules import RULES
from dinox_io.series import SeriesRules
from tests.io import encoding_kinds, fault_kinds  # noqa: F401 (importing them fills the table)
from tests.io.fault_kind import KINDS, Expected
from tests.io.kept_pools import Pools, pools  # noqa: F401 (a fixture)
from tests.io.random_scan import FORMATS, SYNTAXES, make_scan

KEY = b"a key of the tests"


@pytest.fixture(autouse=True)
def kept_workers(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr("dinox_io.pack.WorkerPool", pools.lend)


def records(out: Path) -> dict[str, dict[str, Any]]:
    """Digest -> KEY.json of every volume of a set, by plain tar."""
    found = {}
    for shard in sorted(out.glob("shard-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar.getmembers()[1::2]:
                record = json.load(tar.extractfile(member))  # type: ignore[arg-type]
                found[record["sha256"]] = record
    return found


def digest(hu: np.ndarray) -> str:
    return hashlib.sha256(hu.astype("<i2").tobytes()).hexdigest()


def pack_and_compare(folder: Path, expected: dict[str, Expected], **rules: Any) -> list[str]:
    """Pack what lies in the folder; every difference to what was expected, by the name of the kind."""
    (folder / "key").write_bytes(KEY)
    out = folder / "out"
    settings = PackSettings(
        inputs=(folder / "in",), output=out, key_file=folder / "key", workers=1, rules=SeriesRules(**rules)
    )
    report = pack(settings, ProgressReport(io.StringIO()))
    wrong = compare_rows(out, expected)
    found = records(out)
    with open_shards(out, verify="always") as shards:
        pixels = {volume.digest: shards.read(volume, 0, volume.shape[0]) for volume in shards.volumes}
    for name, one in expected.items():
        for hu in one.volumes:
            chosen = closest(hu, one.tolerance_hu, pixels)
            if chosen is None:
                wrong.append(f"{name}: no volume holds these HU")
                continue
            wrong += [
                f"{name}: {fact} is {found[chosen][fact]}, not {value}"
                for fact, value in one.facts.items()
                if found[chosen][fact] != (pytest.approx(value, abs=0.01) if isinstance(value, float) else value)
            ]
            del pixels[chosen]
    wrong += [f"a volume that nobody expected: {found[digest]['series']}" for digest in pixels]
    codes = {code for one in expected.values() for _, code in one.rows}
    if report.exit_code != (3 if any(RULES[code].kind == "rejected" for code in codes) else 0):
        wrong.append(f"exit code {report.exit_code}")
    return wrong


def closest(hu: np.ndarray, tolerance_hu: int, pixels: dict[str, np.ndarray]) -> str | None:
    """The digest of the volume with these HU; of lossy ones, of one that is as near as that."""
    if not tolerance_hu:
        return digest(hu) if digest(hu) in pixels else None
    near = [
        name
        for name, other in pixels.items()
        if other.shape == hu.shape and np.abs(other.astype(int) - hu).max() <= tolerance_hu
    ]
    return near[0] if near else None


def compare_rows(out: Path, expected: dict[str, Expected]) -> list[str]:
    found: dict[tuple[str | None, str], int] = {}
    for line in (out / "rejected.jsonl").read_text().splitlines():
        row = json.loads(line)
        found[row["series"], row["code"]] = found.get((row["series"], row["code"]), 0) + row["files"]
    wanted: dict[tuple[str | None, str], int] = {}
    kind_of: dict[str | None, str] = {}
    for name, one in expected.items():
        for (uid, code), files in one.rows.items():
            series = pseudonym(KEY, "series", uid) if uid else None
            wanted[series, code] = wanted.get((series, code), 0) + files
            kind_of[series] = name if uid else "files of no series"
    differ = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    return [f"{kind_of.get(k[0], k[0])}: {found.get(k)} files {k[1]}, not {wanted.get(k)}" for k in differ]


def differences(tmp_path: Path, syntax: str, seed: str, format_name: str | None = None) -> list[str]:
    """Every kind in one encoding, those of the same rules in one pack."""
    wrong: list[str] = []
    groups: dict[str, dict[str, Any]] = {json.dumps(kind.rules): kind.rules for kind in KINDS.values()}
    for number, rules in enumerate(groups.values()):
        folder = tmp_path / str(number)
        expected = {
            name: kind.make(make_scan(f"{seed} {name}", syntax, FORMATS.get(format_name or "")), folder / "in" / name)
            for name, kind in KINDS.items()
            if kind.rules == rules and kind.syntax in (None, syntax)
        }
        wrong += pack_and_compare(folder, expected, **rules)
    return wrong


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda uid: uid.name)
def test_every_kind_does_what_it_must(tmp_path: Path, syntax: str) -> None:
    assert differences(tmp_path, syntax, "1") == []


@pytest.mark.fault
@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda uid: uid.name)
def test_every_kind_in_every_encoding(tmp_path: Path, syntax: str, format_name: str) -> None:
    for seed in "23":
        assert differences(tmp_path / seed, syntax, seed, format_name) == []


def test_every_case_of_the_ground_truth_is_of_a_kind(shared_data: Path) -> None:
    cases = {case["id"] for case in json.loads((shared_data / "expected.json").read_text())["cases"]}
    of_kinds = {start for kind in KINDS.values() for start in kind.cases}
    assert [case for case in sorted(cases) if not case.startswith(tuple(of_kinds))] == []
    assert [start for start in sorted(of_kinds) if not any(case.startswith(start) for case in cases)] == []

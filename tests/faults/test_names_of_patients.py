"""F44: what identifies a patient is in none of what may be shown: the set, the run, the report, what is printed."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pydicom.dataset import Dataset

from tests.io.dicom_factory import write_series

pytestmark = pytest.mark.usefixtures("tiny_preset")
CANARY = "ZZPHI"


def mark(_: int, dataset: Dataset) -> None:
    for name in ("PatientComments", "StudyDescription", "SeriesDescription"):
        setattr(dataset, name, f"{CANARY} {name}")
    dataset.PatientName = f"{CANARY}^A"
    dataset.StationName = dataset.InstitutionName = dataset.ProtocolName = dataset.AccessionNumber = dataset.StudyID = (
        CANARY
    )
    dataset.PatientBirthDate = "19420228"
    dataset.private_block(0x0011, CANARY, create=True).add_new(1, "LO", CANARY)


def test_from_the_files_to_the_report_and_the_errors(
    tmp_path: Path, repository: Path, train: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    source, packed, run = tmp_path / CANARY, tmp_path / "set", tmp_path / "run"
    for number in range(3):
        series = f"1.2.{number}.19420228"
        write_series(source / f"{CANARY} {number}", 6, change=mark, series=series, patient=f"{CANARY}-{number}")
    command = [sys.executable, str(repository / "tools/pack_shards.py"), str(source), "--output", str(packed)]
    subprocess.run(command, check=True)

    def run_it(*more: str) -> int:
        return train(run, f"data.shards={packed}", "evaluate.windows=4", "train.batch_size=2", *more)

    assert run_it("train.updates=2") == 0
    shard = packed / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    for place in range(1200, len(data) - 2048, 97):
        data[place] ^= 1
    shard.write_bytes(data)
    assert run_it("train.updates=9") == 1
    said = capfd.readouterr()
    names = [str(path.relative_to(tmp_path)) for folder in (packed, run) for path in folder.rglob("*")]
    private = {str(path) for path in (packed / "private").rglob("*")}
    for text in (said.out, said.err, *names):
        assert CANARY not in text.replace(str(source), "")
    for folder in (packed, run):
        for path in folder.rglob("*"):
            if path.is_file() and str(path) not in private:
                content = path.read_bytes()
                assert CANARY.encode() not in content, path
                assert b"19420228" not in content, path
    assert any(CANARY.encode() in Path(path).read_bytes() for path in private if Path(path).is_file())

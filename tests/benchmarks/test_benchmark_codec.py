"""codec.py from end to end on a tiny phantom, without peers; and the cases that it finds."""

import sys
from pathlib import Path

import cases
import codec
import numpy as np
import our_codecs
import pytest
import result
from harness import Worker

from dinox_io import filters


@pytest.fixture(scope="module")
def tiny() -> list[cases.Case]:
    return cases.phantom(quick=True, side=48)


def test_quick_without_peers(
    tiny: list[cases.Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(codec, "load_cases", lambda folders, *, quick: tiny)
    assert codec.main(["--quick", "--output", str(tmp_path / "codec.json")]) == 0
    made = result.read(tmp_path / "codec.json")
    figures = {figure.name: figure.value for figure in made.figures}
    assert figures["size hilp"] > figures["size hilp fast"] > 1
    assert figures["hilp NumPy / raw zstd 3"] > 0
    assert ("hilp C / raw zstd 3" in figures) == (filters.tier() == "c")
    assert "no peers were measured: --peers was not given" in made.notes
    assert made.data[0]["name"] == "phantom 0 soft 5 mm"
    numpy_tier = next(one for one in made.contenders if one["name"] == "hilp (NumPy)")
    assert "DINOX_FILTERS=numpy" in numpy_tier["facts"]["filters"]
    assert "size: pooled ratio of the default" in capsys.readouterr().out


def test_the_size_counts_every_byte(tiny: list[cases.Case], tmp_path: Path) -> None:
    from dinox_io.shard import encode_volume

    cases.write_arrays(tiny, tmp_path / "data")
    bodies = [encode_volume(case.volume, filter="hilp", level=1).body for case in tiny]
    seek_headers = 17 * len(tiny)  # of each volume's seek table, beside its entries
    assert our_codecs.tables(str(tmp_path / "data"))["hilp"]() == sum(map(len, bodies)) - seek_headers


def test_a_decoder_that_is_wrong_is_not_timed(
    tiny: list[cases.Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases.write_arrays(tiny, tmp_path / "data")
    setups = our_codecs.contenders(str(tmp_path / "data"))

    def wrong(self: object, frame: bytes, out: np.ndarray, checksum: int | None) -> None:
        out[:] = 1

    monkeypatch.setattr(our_codecs.SliceDecoder, "decode_into", wrong)
    with pytest.raises(ValueError, match="does not give back"):
        setups["hilp"]()


def test_cases_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "SIDE", 32)
    folder = cases.write_phantom(tmp_path / "two", series=2, side=32, slices=4)
    found = cases.from_folders([folder])
    assert [case.name for case in found] == ["two 1", "two 2"]
    assert {case.volume.hu.shape for case in found} == {(4, 32, 32), (8, 32, 32)}
    assert found[0].described() == cases.from_folders([folder])[0].described()
    monkeypatch.setattr(cases, "SIDE", 64)
    with pytest.raises(cases.CasesError, match="holds no series of 64 x 64"):
        cases.from_folders([folder])
    with pytest.raises(cases.CasesError, match="there is no"):
        cases.from_folders([tmp_path / "nowhere"])


def test_no_such_peers(
    tiny: list[cases.Case], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(codec, "load_cases", lambda folders, *, quick: tiny)
    assert codec.main(["--quick", "--peers", "/nowhere/python"]) == 2
    assert "does not start" in capsys.readouterr().err


def test_the_server_of_the_numpy_tier(tiny: list[cases.Case], tmp_path: Path) -> None:
    cases.write_arrays(tiny, tmp_path / "data")
    ours = {"data": str(tmp_path / "data")}
    variables = {"DINOX_FILTERS": "numpy"}
    with Worker(sys.executable, "our_codecs", ours, environment="dinox", variables=variables) as worker:
        assert worker.table("hilp") == our_codecs.tables(**ours)["hilp"]()

"""pack.py from end to end on little data; its sampler, its tiny series and its watch over memory."""

import hashlib
import json
import sys
from pathlib import Path

import cases
import machine
import pack
import pack_parsing
import pack_scale
import process_memory
import pytest
import result
import tiny_series


def test_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = cases.phantom(quick=True, side=48)
    monkeypatch.setattr(pack, "load_cases", lambda folders, *, quick: tiny)
    monkeypatch.setattr(pack, "COPY_BYTES", 1 << 20)
    (tmp_path / "scratch").mkdir()
    given = ["speed", "--quick", "--output", str(tmp_path / "pack.json"), "--scratch", str(tmp_path / "scratch")]
    assert pack.main(given) == 0
    made = result.read(tmp_path / "pack.json")
    figures = {figure.name: figure.value for figure in made.figures}
    assert figures["pack / frames alone"] > 0
    assert made.contenders[0]["facts"]["packed_bytes"] > 0
    assert not list((tmp_path / "scratch").iterdir())


def test_parsing(tmp_path: Path) -> None:
    made = pack_parsing.run([], tmp_path, quick=True)
    shares = [figure.value for figure in made.figures if figure.name.startswith("share of ")]
    assert 50 < sum(shares) <= 150  # medians of shares that add up to 100 in each round
    assert any("pydicom parses each file" in note for note in made.notes)
    assert not list(tmp_path.iterdir())


def test_parsing_without_series(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("no DICOM")
    (tmp_path / "out").mkdir()
    given = ["parsing", "--quick", "--data", str(tmp_path / "text.txt"), "--scratch", str(tmp_path / "out")]
    assert pack.main(given) == 2
    assert "no series in these folders can be packed" in capsys.readouterr().err


BUSY = """
import time
def work(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
"""


def test_the_sampler_finds_where_time_goes() -> None:
    parts = {}
    for path in (
        "site/pydicom/reader.py",
        "site/pydicom/pixels/decoders/base.py",
        "house/dinox_io/codec.py",
        "house/dinox_io/about.py",
        "elsewhere.py",
    ):
        exec(compile(BUSY, path, "exec"), scope := {})  # noqa: S102 (a stack that lies in files of these names)
        parts[path] = scope["work"]
    with pack_parsing.StackSampler() as sampler:
        for work, seconds in zip(parts.values(), (0.4, 0.1, 0.2, 0.1, 0.1), strict=True):
            work(seconds)
    found = dict(sampler.seconds)
    assert found.pop("pydicom") == pytest.approx(0.4, abs=0.08)
    assert found.pop("decompressing pixels") == pytest.approx(0.1, abs=0.08)
    assert found.pop("filter and zstd") == pytest.approx(0.2, abs=0.08)
    assert found.pop("the rest of dinox") == pytest.approx(0.1, abs=0.08)
    assert found.pop("outside of dinox") == pytest.approx(0.1, abs=0.08)
    assert not found


def test_a_long_call_into_c_counts_in_full() -> None:
    data = bytes(60_000_000)
    with pack_parsing.StackSampler() as sampler:
        hashlib.sha3_512(data)
    assert sampler.seconds["outside of dinox"] > 0.02
    assert list(sampler.seconds) == ["outside of dinox"]


def test_what_halving_a_share_takes() -> None:
    # 60 of 100: to be 30 % of what then remains, it must fall to 40 · 3 / 7 = 17.1.
    assert pack_parsing.halving(0.6) == (
        "pydicom takes 60 % of the time. To halve that share it would have to be 3.5 times as fast, and packing would "
        "take 43 % less time; without it, 60 %"
    )
    assert "no time" in pack_parsing.halving(0.0)


def test_tiny_series_are_all_different(tmp_path: Path) -> None:
    assert tiny_series.write(tmp_path / "in", 5) == 20
    found = cases.series_of([tmp_path / "in"])
    volumes = [cases.volumes_of(one)[0] for one in found]
    assert [len(one) for one in volumes] == [1] * 5
    assert {one[0].hu.shape for one in volumes} == {(4, 32, 32)}
    assert len({one[0].hu.tobytes() for one in volumes}) == 5
    assert len({one.patient for one in found}) == 3


def test_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_scale, "REPEATS", 1)
    made = pack_scale.run([2, 6], 0, [1], tmp_path, quick=True)
    figures = {figure.name: figure.value for figure in made.figures}
    assert figures["time: 6 tiny series, 1 worker"] > 0
    assert figures["peak USS of a worker: 6 tiny series, 1 worker"] > 1
    assert {target.text for target in made.targets} == {
        "scale: linear in series, 2 to 6 tiny series, 1 worker",
        "scale: memory of a worker flat, 2 to 6 tiny series, 1 worker",
    }
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("code", "packed", "said"), [(2, 2, "ended with 2"), (0, 0, "of 2 series 0"), (0, 1, "of 2 series 1")]
)
def test_a_pack_that_is_not_whole_is_not_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, packed: int, said: str
) -> None:
    def run(command: list[str], environment: dict[str, str]) -> process_memory.Ran:
        output = Path(command[command.index("--output") + 1])
        output.mkdir()
        if packed:
            (output / "manifest.json").write_text(json.dumps({"volumes": [{}] * packed}))
        return process_memory.Ran(code, 1.0, process_memory.Peaks(), "what it said")

    monkeypatch.setattr(process_memory, "run", run)
    with pytest.raises(pack_scale.PackFailed, match=f"{said}.*what it said"):
        pack_scale.run([2], 0, [1], tmp_path, quick=True)


ALLOCATING = """
import subprocess, sys, time
mib = int(sys.argv[1])
block = bytearray(mib << 20)
child = subprocess.Popen([sys.executable, "-c", "import time; b = bytearray(90 << 20); time.sleep(1.2)"])
time.sleep(0.8)
child.wait()
print("said")
sys.exit(3)
"""


def test_memory_of_a_command_and_its_children() -> None:
    ran = process_memory.run([sys.executable, "-c", ALLOCATING, "40"], machine.child_environment(ours=True))
    assert ran.code == 3
    assert ran.said == "said\n"
    assert ran.seconds > 0.8
    assert 40 << 20 < ran.peaks.parent_uss_bytes < 80 << 20
    assert 90 << 20 < ran.peaks.worker_uss_bytes < 130 << 20
    assert ran.peaks.total_uss_bytes > 130 << 20

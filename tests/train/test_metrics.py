"""metrics.jsonl: each update once, torn lines dropped, nothing that is not JSON."""

import json
import math
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinox_train import metrics
from dinox_train.metrics import LineFile, drop_after, read_lines


def test_lines_are_in_the_file_at_once_and_numbers_are_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = LineFile(path, 0)
    lines.write({"update": 1, "loss": 0.5})
    assert read_lines(path) == [{"update": 1, "loss": 0.5}]
    lines.write({"update": 2, "loss": math.nan, "grad_norm": math.inf})
    lines.close()
    assert [json.loads(line) for line in path.read_text().splitlines()][1] == {
        "update": 2,
        "loss": None,
        "grad_norm": None,
    }


def test_resuming_drops_later_and_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"update": {update}}}\n' for update in range(1, 6)) + '{"update": 6, "lo')
    lines = LineFile(path, 3)
    lines.write({"update": 4})
    lines.close()
    assert [line["update"] for line in read_lines(path)] == [1, 2, 3, 4]


def test_a_broken_line_in_the_middle_is_an_error_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"update": 1}\nrubbish\n{"update": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        read_lines(path)


def lines_of(updates: list[int]) -> bytes:
    return b"".join(b'{"update": %d, "text": "%s"}\n' % (update, b"x" * (update % 7)) for update in updates)


STEPS = st.lists(st.sampled_from([-1, 0, 1, 1, 1, 2]), max_size=40)
ENDS = st.sampled_from([b"", b"\n", b'{"upd', b'{"update": 3}', b'{"update": 99}'])


@given(STEPS, st.integers(0, 45), ENDS, st.sampled_from([3, 10, 64, 1 << 20]))
def test_what_stays_is_what_reading_all_of_it_would_keep(steps: list[int], keep: int, end: bytes, block: int) -> None:
    updates, most = [], 0
    for step in steps:  # a line may stand one update later than one after it
        updates.append(max(most + step, most - 1, 0))
        most = max(most, updates[-1])
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_BLOCK_BYTES", block)
        path = Path(folder) / "metrics.jsonl"
        path.write_bytes(lines_of(updates) + end)
        expected = [line for line in read_lines(path) if line["update"] <= keep]
        lines = LineFile(path, keep)
        lines.write({"update": 1000})
        lines.close()
        assert read_lines(path) == [*expected, {"update": 1000}]
        assert path.read_bytes().count(b"\n") == len(expected) + 1


def test_a_long_file_is_neither_read_nor_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines_of(list(range(1, 200_001))))
    looked = []
    object_of = metrics.object_of
    monkeypatch.setattr(metrics, "object_of", lambda *given: (looked.append(1), object_of(*given))[1])
    inode = path.stat().st_ino
    tracemalloc.start()
    drop_after(path, 199_500)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 << 20
    assert len(looked) < 510
    assert path.stat().st_ino == inode
    monkeypatch.undo()
    assert [line["update"] for line in read_lines(path)] == list(range(1, 199_501))


@pytest.mark.parametrize(
    ("first", "third", "place"), [(b', "version": 2', b'{"update": 3}', 1), (b"", b"rubbish", 3), (b"", b"7", 3)]
)
def test_a_file_that_is_none_of_ours_is_left_alone(tmp_path: Path, first: bytes, third: bytes, place: int) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content := b'{"update": 1%s}\n{"update": 2}\n%s\n{"update": 4}\n' % (first, third))
    with pytest.raises(ValueError, match=rf"metrics\.jsonl:{place}: "):
        LineFile(path, 2)
    assert path.read_bytes() == content

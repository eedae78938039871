"""metrics.jsonl: each update once, torn lines dropped, nothing that is not JSON."""

import json
import math
from pathlib import Path

import pytest

from dinox_train.metrics import LineFile, read_lines


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

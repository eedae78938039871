"""What is kept of a long file: exact for few lines, true bounds and means for many, the same however it was read."""

import json
import math
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinox_train.report import columns as module
from dinox_train.report.columns import Columns, trailing_mean
from dinox_train.report.kept import keep, kept
from dinox_train.report.tail import LineTail


def lines_of(n: int, seed: int = 0) -> list[dict]:
    generator = np.random.default_rng(seed)
    values, there = generator.normal(size=n), generator.random(n) > 0.2
    return [
        {"update": i + 1, "loss": float(values[i]) if there[i] else None, "stage_s": {"wait": float(i)}, "name": "x"}
        for i in range(n)
    ]


def said(columns: Columns) -> list:
    """Everything that can be asked."""
    found = [len(columns), columns.names]
    for name in columns.names:
        x, y = columns.curve(name)
        places, mean, over = columns.mean_curve(name)
        found += [x.tolist(), str(y.tolist()), places.tolist(), str(mean.tolist()), over]
        found += [columns.first(name), columns.last(name), columns.last_place(name), columns.largest(name)]
        found += [columns.now(name), columns.mean(name)]
    return found


def test_few_lines_are_kept_as_they_are() -> None:
    lines = lines_of(300)
    columns = Columns.of(lines)
    x, y = columns.curve("loss")
    assert x.tolist() == list(range(1, 301))
    expected = [math.nan if line["loss"] is None else line["loss"] for line in lines]
    np.testing.assert_array_equal(y, expected)
    present = [line["loss"] for line in lines if line["loss"] is not None]
    assert (columns.first("loss"), columns.last("loss")) == (present[0], present[-1])
    assert columns.last_place("loss") == max(line["update"] for line in lines if line["loss"] is not None)
    assert columns.largest("loss") == max(present)
    assert columns.mean("loss") == pytest.approx(np.mean(present))
    recent = [line["loss"] for line in lines[-20:] if line["loss"] is not None]
    assert columns.now("loss") == pytest.approx(np.mean(recent))
    assert columns.names == ["loss", "stage_s.wait", "update"]
    assert columns.mean_curve("loss")[2] == 6


@given(n=st.integers(0, 400), cuts=st.lists(st.integers(0, 400), max_size=6), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_it_does_not_matter_how_many_lines_come_at_a_time(n: int, cuts: list[int], seed: int) -> None:
    lines = lines_of(n, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BUCKETS", 16)
        at_once, by_parts = Columns.of(lines), Columns()
        ends = [0, *sorted(min(cut, n) for cut in cuts), n]
        for begin, end in pairwise(ends):
            by_parts.add(lines[begin:end])
            said(by_parts)  # asking changes nothing
        assert said(by_parts) == said(at_once)


@given(n=st.integers(17, 900), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_many_lines_keep_their_extremes_their_places_and_their_means(n: int, seed: int) -> None:
    lines = lines_of(n, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BUCKETS", 16)
        columns = Columns.of(lines)
        x, y = columns.curve("loss")
        assert len(x) <= 2 * 17
        by_update = {line["update"]: line["loss"] for line in lines}
        finite = np.isfinite(y)
        assert [by_update[int(place)] for place in x[finite]] == y[finite].tolist()
        assert (np.diff(x) > 0).all()
        present = [line["loss"] for line in lines if line["loss"] is not None]
        assert (np.nanmin(y), np.nanmax(y), columns.largest("loss")) == (min(present), max(present), max(present))
        assert columns.mean("loss") == pytest.approx(np.mean(present))
        assert (columns.first("loss"), columns.last("loss")) == (present[0], present[-1])
        places, mean, _ = columns.mean_curve("update")
        assert places[-1] == n
        assert (mean <= places + 1e-9).all()
        # The last lines, to whole buckets: at least those asked for, at most two buckets more.
        assert n - columns.now("update") * 2 + n <= 2 * (max(20, n // 20) + 2 * n / 8)


@given(n=st.integers(1, 50), window=st.integers(1, 12), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_the_trailing_mean_agrees_with_a_loop(n: int, window: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    number = generator.integers(0, 3, n).astype(float)
    total = np.where(number > 0, generator.normal(size=n), 0.0)
    for place, value in enumerate(trailing_mean(total, number, window)):
        part = slice(max(0, place - window + 1), place + 1)
        count = number[part].sum()
        assert value == pytest.approx(total[part].sum() / count) if count else np.isnan(value)


def test_lines_without_a_place_and_values_that_are_no_numbers_are_left_out() -> None:
    columns = Columns.of([{"loss": 1.0}, {"update": 1, "loss": math.inf, "applied": True, "shares": [1, 2]}])
    assert len(columns) == 1
    assert columns.names == ["applied", "update"]
    assert columns.now("applied") == 1.0
    assert columns.now("loss") is None
    assert columns.curve("nothing")[0].tolist() == [1]
    assert Columns().curve("loss")[0].tolist() == []


# --- reading on -------------------------------------------------------------------------------------------------------


def read(tail: LineTail) -> tuple[bool, list[int]]:
    return tail.begins_anew(), [line["update"] for block in tail.blocks() for line in block]


def write(path: Path, updates: range, mode: str = "a") -> None:
    with path.open(mode) as file:
        file.write("".join(json.dumps({"update": update, "text": "a" * 50}) + "\n" for update in updates))


def test_a_tail_hands_out_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinox_train.report.tail.BLOCK_BYTES", 100)
    path = tmp_path / "metrics.jsonl"
    tail = LineTail(path)
    assert read(tail) == (False, [])
    write(path, range(5))
    assert read(tail) == (True, [0, 1, 2, 3, 4])
    assert read(tail) == (False, [])
    write(path, range(5, 7))
    with path.open("a") as file:
        file.write('{"update": 7, "te')
    assert read(tail) == (False, [5, 6])
    with path.open("a") as file:
        file.write('xt": "b"}\n')
    assert read(tail) == (False, [7])


def test_a_tail_begins_anew_with_a_file_that_was_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = LineTail(path)
    write(path, range(9))
    assert read(tail) == (True, list(range(9)))
    write(path, range(4), "w")  # shorter, as after a kill
    assert read(tail) == (True, list(range(4)))
    text = path.read_text()
    path.write_text(text.replace("a" * 50, "b" * 50) + text)  # the same file, longer, but not what it was
    assert read(tail) == (True, [0, 1, 2, 3, 0, 1, 2, 3])
    path.with_name("new").write_bytes(path.read_bytes())
    path.with_name("new").rename(path)  # another file of the same content
    assert read(tail) == (True, [0, 1, 2, 3, 0, 1, 2, 3])
    path.unlink()
    assert read(tail) == (True, [])
    assert read(tail) == (False, [])


def test_a_tail_names_a_broken_line_each_time(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = LineTail(path)
    write(path, range(3))
    read(tail)
    with path.open("a") as file:
        file.write("no JSON\n")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"metrics\.jsonl:4: not a JSON object"):
            read(tail)


# --- kept for the next process ----------------------------------------------------------------------------------------


@given(n=st.integers(0, 300), cut=st.integers(0, 300), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_what_was_kept_goes_on_as_if_it_had_been_read(n: int, cut: int, seed: int) -> None:
    lines = lines_of(n, seed)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BUCKETS", 16)
        columns, path = Columns.of(lines[:cut]), Path(folder) / "kept.npz"
        keep(path, columns.facts(), columns.arrays())
        found = kept(path)
        assert found is not None
        again = Columns.restored(*found)
        assert said(again) == said(columns)
        again.add(lines[cut:])
        assert said(again) == said(Columns.of(lines))


def test_what_is_not_whole_or_of_another_version_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "kept.npz"
    assert kept(path) is None
    keep(path, {"a": 1}, {"b": np.arange(1000.0)})
    whole = path.read_bytes()
    assert kept(path) is not None
    for content in (b"", whole[:-30], whole[:600] + b"?" + whole[601:], b"no archive", b"PK" + whole[2:90]):
        path.write_bytes(content)
        assert kept(path) is None
    keep(path, {"version": 0}, {})
    assert kept(path) is None
    keep(tmp_path / "no folder" / "kept.npz", {}, {})  # as where there is no room

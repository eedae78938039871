"""The journal of a pack that is under way (private/packing.jsonl): what a killed run had finished.

    first line      what the run is known again by, and the number of its first shard
    each line more  a finished shard, what became of each series up to there, and which series closed it

Invariant: a line is on disk before the next shard is begun, and after the shard that it is about. A torn last line is
no line. A mark stands for a series whose outcome may be taken over: it is made of all that the outcome depends on;
"" stands for an outcome that another try may change (a worker that crashed, a file that could not be read).
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dinox_io.canonical import canonical_json
from dinox_io.errors import ShardError
from dinox_io.manifest import dense_histogram, sparse_histogram
from dinox_io.shard import ShardSummary, VolumeSummary
from dinox_io.volume import Rejection


@dataclass(frozen=True, kw_only=True)
class FinishedShard:
    """A shard, and what was known when it was closed."""

    summary: ShardSummary
    series: tuple[tuple[str, tuple[Rejection, ...]], ...]
    """(mark, rows of the report) of each series since the shard before, in order, that was done with then."""
    closed_by: str | None
    """Mark of the series whose volume did not fit any more; None: there was none left."""
    between_series: bool
    """False: that series has volumes in this shard too."""


def journal_line(shard: FinishedShard) -> bytes:
    """The line of a shard, with its end."""
    summary = {**asdict(shard.summary), "histogram": sparse_histogram(shard.summary.histogram)}
    series = [[mark, [asdict(row) for row in rows]] for mark, rows in shard.series]
    line = {
        "shard": summary,
        "series": series,
        "closed_by": shard.closed_by,
        "between_series": shard.between_series,
    }
    return canonical_json(line) + b"\n"


def append_line(journal: Path, shard: FinishedShard) -> None:
    """Add a shard to a journal, durably. OSError."""
    with journal.open("ab") as file:
        file.write(journal_line(shard))
        file.flush()
        os.fsync(file.fileno())


def first_number(journal: Path) -> int | None:
    """The number of the first shard that the run of this journal may have written; None without a readable journal."""
    return _first_number(next(_lines(journal), {}))


def _first_number(head: Mapping[str, Any]) -> int | None:
    first = head.get("first_shard")
    return first if type(first) is int else None


def read_journal(journal: Path) -> tuple[dict[str, Any], list[FinishedShard]]:
    """The first line and the shards, as far as they can be read; ({}, []) without a readable journal."""
    lines = _lines(journal)
    head = next(lines, {})
    shards: list[FinishedShard] = []
    if _first_number(head) is None:
        return {}, []
    for line in lines:
        try:
            shards.append(_shard(line))
        except (KeyError, TypeError, ValueError, ShardError):
            break
    return head, shards


def _lines(journal: Path) -> Iterator[dict[str, Any]]:
    try:
        data = journal.read_bytes()
    except OSError:
        return
    for line in data.split(b"\n")[:-1]:
        try:
            value = json.loads(line)
        except ValueError:
            return
        if not isinstance(value, dict):
            return
        yield value


def _shard(line: Mapping[str, Any]) -> FinishedShard:
    summary = dict(line["shard"])
    volumes = tuple(VolumeSummary(**_tuples(volume)) for volume in summary.pop("volumes"))
    histogram = dense_histogram(summary.pop("histogram"))
    return FinishedShard(
        summary=ShardSummary(**summary, volumes=volumes, histogram=histogram),
        series=tuple((mark, tuple(Rejection(**row) for row in rows)) for mark, rows in line["series"]),
        closed_by=line["closed_by"],
        between_series=line["between_series"],
    )


def _tuples(members: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in members.items()}


def taken_over(shards: Sequence[FinishedShard], marks: Sequence[str]) -> tuple[list[FinishedShard], int]:
    """The longest beginning of `shards` that a run over series of these `marks` would write again, byte for byte.

    Returns those shards, and the number of series that they settle. Whether their files are still whole is not looked
    at here.
    """
    settled = position = taken = 0
    for number, shard in enumerate(shards, start=1):
        series = [mark for mark, _ in shard.series]
        if not all(series) or series != list(marks[position : position + len(series)]):
            break
        position += len(series)
        # Another series next, or one more, might still have fitted in.
        if shard.closed_by != (marks[position] if position < len(marks) else None):
            break
        if shard.between_series:
            taken, settled = number, position
    return list(shards[:taken]), settled

"""Packing small made-up inputs in the process of the test, and stopping it before any change to the disk."""

import contextlib
import errno
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dinox_io.merge import merge
from dinox_io.pack import pack
from dinox_io.part import Part
from dinox_io.progress import ProgressReport
from dinox_io.report import PackReport
from dinox_io.settings import PackSettings
from tests.io.dicom_factory import set_pixels, stored_slice, write_series

KEY = b"a key of the tests"
CHANGES = ("replace", "unlink", "rmdir", "link", "chmod", "mkdir", "fsync")


class SameProcess:
    """Stands in for a WorkerPool: the tasks run here, one after the other, when their result is wanted."""

    def __init__(self, count: int) -> None:
        assert count > 0

    def __enter__(self) -> "SameProcess":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, function: Callable[[Any], Any], arguments: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        for argument in arguments:
            yield argument, function(argument)


@pytest.fixture
def same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """`pack` starts no process."""
    monkeypatch.setattr("dinox_io.pack.WorkerPool", SameProcess)


def settings(source: Path, out: Path, **options: Any) -> PackSettings:
    """With the tests' key, and shards of one or two of the series of `patients`."""
    key = out.parent / "key"
    if not key.exists():
        key.write_bytes(KEY)
    return PackSettings(inputs=(source,), output=out, **{"key_file": key, "shard_bytes": 24_000, **options})


def packed(source: Path, out: Path, said: io.StringIO | None = None, **options: Any) -> PackReport:
    """Pack `source`; `said` gets what progress says."""
    return pack(settings(source, out, **options), ProgressReport(said or io.StringIO()))


def packed_in_parts(source: Path, out: Path, of: int, **options: Any) -> PackReport:
    """Pack N parts and merge them."""
    for number in range(1, of + 1):
        packed(source, out, part=Part(number, of), **options)
    return merged(source, out, **options)


def merged(source: Path, out: Path, **options: Any) -> PackReport:
    """`--merge`."""
    return merge(settings(source, out, **options), ProgressReport(io.StringIO()))


def contents(out: Path) -> dict[str, bytes]:
    """Every file but the locks, by its name."""
    files = (path for path in sorted(out.rglob("*")) if path.is_file() and path.name != "lock")
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def facts(out: Path) -> dict[str, Any]:
    """What must not depend on how a set was packed: volumes, digests, sides, leaks, rows."""
    found: dict[str, Any] = {
        name: (out / name).read_bytes() for name in ("rejected.jsonl", "private/sources.jsonl") if (out / name).exists()
    }
    if (out / "manifest.json").exists():
        manifest = json.loads((out / "manifest.json").read_bytes())
        names = ("volumes", "splits", "leaks", "rejected", "options", "sources", "spacing_mm", "hu_histogram", "about")
        found |= {name: manifest[name] for name in names}
    return found


def patients(folder: Path, count: int, *, twins: bool = False) -> Path:
    """Series of as many patients (4 or 5 slices of 40 x 30), one that is too short, an MR, and files of no series.

    `twins`: the series of two patients have the same pixels.
    """
    for number in range(count):
        seed = 100 * (number if not twins or number > 1 else 0)
        write_series(
            folder / f"s{number}", 4 + (number > 1) * number % 2, series=f"1.7.{number}", patient=f"P{number}",
            change=lambda z, dataset, seed=seed: set_pixels(dataset, stored_slice(z + seed, 40, 30)),
        )  # fmt: skip
    write_series(folder / "short", 2, series="1.9", patient="P0")
    write_series(folder / "mr", 2, series="1.8", change=lambda _, dataset: setattr(dataset, "Modality", "MR"))
    for number in range(3):
        (folder / f"note{number}.txt").write_text("nothing")
    return folder


class Stopped(BaseException):
    """As good as a SIGKILL: nothing that follows changes the disk."""


@contextlib.contextmanager
def disk_full_at(change: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it, the `change`-th change to the disk fails for want of room, and no other."""
    count = 0

    def failing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == change:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*arguments, **named)

        return call

    with monkeypatch.context() as patch:
        for name in ("replace", "link", "fsync"):
            patch.setattr(os, name, failing(getattr(os, name)))
        yield


@contextlib.contextmanager
def stopped_before(change: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Within it, the process 'dies' before its `change`-th change to the disk; yields [changes so far].

    A change is a call of os.fsync, os.replace, …; from then on each of them raises `Stopped`.
    """
    count = [0]

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            count[0] += 1
            if count[0] >= change:
                raise Stopped
            return function(*arguments, **named)

        return call

    with monkeypatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, watched(getattr(os, name)))
        with contextlib.suppress(Stopped):
            yield count

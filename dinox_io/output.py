"""The folder that a set is packed into: its lock, its private part, what a killed run left, and the next shard's name.

Invariant: one packer at a time. Nothing is removed but what a packer's own journal says it was writing: shards that no
manifest lists are deleted only if they are at or beyond the number at which the interrupted run began.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dinox_io.atomic import fsync_folder, write_atomically
from dinox_io.errors import ShardError
from dinox_io.manifest import EARLIER_FOLDER, MANIFEST_NAME, commit_set, read_manifest
from dinox_io.storage import LocalFile

REJECTED_NAME = "rejected.jsonl"
SOURCES_NAME = "sources.jsonl"
_JOURNAL_NAME = "packing.json"
_SHARD = re.compile(r"shard-(\d{6,})\.tar")


class PackError(Exception):
    """Packing cannot begin or go on: what, where, and what to do. Exit code 2."""


class OutputFolder:
    """OUT while a packer holds it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.private = path / "private"
        self.rejected = path / REJECTED_NAME
        self.sources = self.private / SOURCES_NAME
        self.previous: dict[str, Any] | None = None
        """The manifest that stands in the folder, or None."""

    @contextlib.contextmanager
    def held(self) -> Iterator["OutputFolder"]:
        """Make the folder, lock it against a second packer, clean up after a killed one.

        Raises PackError; any ShardError within becomes one too: the set is damaged.
        """
        with explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self.private.mkdir(mode=0o700, exist_ok=True)
            self.private.chmod(0o700)
            lock = (self.private / "lock").open("w")
        with lock, self._damage_said():
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise PackError(
                    f"another packer is at work on {self.path}: wait until it ends, or give another --output"
                ) from None
            self.previous = self._read_previous()
            with explained(self.path):
                self._clean_up()
            yield self

    def _read_previous(self) -> dict[str, Any] | None:
        if not (self.path / MANIFEST_NAME).exists():
            return None
        manifest = read_manifest(self.path)
        for shard in manifest["shards"]:
            # Found here, before any work; their contents are compared when the set is committed.
            with contextlib.closing(LocalFile(self.path / shard["name"])) as file:
                if file.size != shard["size"]:
                    raise ShardError(f"has {file.size} bytes where the manifest says {shard['size']}", file=file.name)
        return manifest

    @contextlib.contextmanager
    def _damage_said(self) -> Iterator[None]:
        try:
            yield
        except ShardError as error:
            raise PackError(
                f"the set in {self.path} is damaged, and is left as it is: {error}. "
                "Restore the file from a copy, or give another --output"
            ) from error

    def _clean_up(self) -> None:
        for folder in (self.path, self.private, self.path / EARLIER_FOLDER):
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink()
        listed = {shard["name"] for shard in self.previous["shards"]} if self.previous else set()
        unlisted = [name for name in self._shard_numbers() if name not in listed]
        first = self._journal()
        for name in unlisted:
            if first is None or self._shard_numbers()[name] < first:
                raise PackError(
                    f"{self.path / name} is in no manifest, and no packing was interrupted here: "
                    "move it away (or restore manifest.json), then run again"
                )
            (self.path / name).unlink()

    def _shard_numbers(self) -> dict[str, int]:
        matches = (_SHARD.fullmatch(path.name) for path in self.path.iterdir())
        return {match.group(): int(match.group(1)) for match in matches if match}

    def _journal(self) -> int | None:
        try:
            return int(json.loads((self.private / _JOURNAL_NAME).read_text())["first_shard"])
        except (OSError, ValueError, KeyError):
            return None

    def begin(self) -> int:
        """Note in the journal that shards will be written; returns the number of the first one."""
        first = 1 + max(self._shard_numbers().values(), default=-1)
        with explained(self.path):
            write_atomically(self.private / _JOURNAL_NAME, json.dumps({"first_shard": first}).encode())
        return first

    def commit(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Make `manifest` that of the set, as `commit_set` does; no journal is needed any more."""
        with explained(self.path):
            complete = commit_set(self.path, manifest)
            (self.private / _JOURNAL_NAME).unlink(missing_ok=True)
            fsync_folder(self.private)
        return complete

    def shard_path(self, number: int) -> Path:
        """Where shard `number` stands."""
        return self.path / f"shard-{number:06d}.tar"

    def read_rows(self, path: Path) -> list[dict[str, Any]]:
        """The objects of a JSONL file of this folder; none if it is not there. Raises PackError if it is damaged."""
        try:
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except FileNotFoundError:
            return []
        except ValueError:
            raise PackError(f"{path} is damaged (a line is no JSON): restore it or move it away") from None

    def write_rows(self, path: Path, rows: Iterable[dict[str, Any]], *, mode: int) -> None:
        """Replace a JSONL file, unless it has these very rows. Text that is no Unicode (file names) is escaped."""
        lines = [json.dumps(row, ensure_ascii=mode == 0o600, separators=(", ", ": ")) for row in rows]
        data = "".join(line + "\n" for line in lines).encode()
        if not path.exists() or path.read_bytes() != data:
            with explained(self.path):
                write_atomically(path, data)
                path.chmod(mode)


@contextlib.contextmanager
def explained(folder: Path, wanted_bytes: int = 0) -> Iterator[None]:
    """Turn an OSError of writing under `folder` into a PackError that says what to do."""
    try:
        yield
    except OSError as error:
        raise PackError(_explanation(folder, error, wanted_bytes)) from error


def _explanation(folder: Path, error: OSError, wanted_bytes: int) -> str:
    again = "; the set as it was before is whole. Then run the same command again"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        need = f"{wanted_bytes:,} bytes were to be written, " if wanted_bytes else ""
        return f"no space left for {folder} ({os.strerror(error.errno)}): {need}{free:,} are free. Make room{again}"
    reason = os.strerror(error.errno) if error.errno else type(error).__name__
    return f"cannot write to {folder}: {reason}. Check its permissions and the disk{again}"

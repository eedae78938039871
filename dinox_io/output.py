"""The folder that a set is packed into: its lock, its private part, what a killed run left, and how a set is committed.

Invariant: one packer at a time. Nothing is removed but what a packer's own journal says it was writing: shards that no
manifest lists are deleted only if they are at or beyond the number at which the interrupted run began.

A commit changes the manifest and the rows of the report together, in this order:

    1. read the shards (headers, KEY.json, seek tables) against the new manifest: nothing is changed before
    2. the new rows under names of their own, then private/commit.json, which names the manifest that they belong to
    3. the manifest (see manifest.py)
    4. the rows take their place, merged part folders go, then the packing journal, then private/commit.json

Killed before 3, the set and its rows are the old ones: the next run throws the new rows away. Killed after 3, it does
step 4 first. Where there is no volume, and so no manifest, writing private/commit.json takes the place of step 3.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dinox_io.atomic import fsync_folder, write_atomically
from dinox_io.canonical import canonical_json
from dinox_io.errors import ShardError
from dinox_io.journal import FinishedShard, first_number, journal_line, read_journal
from dinox_io.manifest import EARLIER_FOLDER, MANIFEST_NAME, complete_set, read_manifest, write_set
from dinox_io.storage import LocalFile

REJECTED_NAME = "rejected.jsonl"
SOURCES_NAME = "sources.jsonl"
PART_FOLDER = re.compile(r"part-(\d{1,9})-of-(\d{1,9})")
_SHARD = re.compile(r"shard-(\d{6,})\.tar")
_FILE = re.compile(r"(private/)?[a-z]+\.jsonl?")
_BESIDE_A_SET = frozenset({"labels", "private", "lost+found"})

Rows = Sequence[Mapping[str, Any]]


class PackError(Exception):
    """Packing cannot begin or go on: what, where, and what to do. Exit code 2."""


class OutputFolder:
    """OUT while a packer holds it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.private = path / "private"
        self.rejected = path / REJECTED_NAME
        self.sources = self.private / SOURCES_NAME
        self.journal = self.private / "packing.jsonl"
        self._commit_note = self.private / "commit.json"
        self.previous: dict[str, Any] | None = None
        """The manifest that stands in the folder, or None."""

    @contextlib.contextmanager
    def held(self, *, keep_interrupted: bool = False) -> Iterator["OutputFolder"]:
        """Make the folder, lock it against a second packer, finish or clean up what a killed one left.

        Args:
            keep_interrupted: leave the finished shards that the journal of an interrupted pack lists, and the journal.

        Raises PackError; any ShardError within becomes one too: the set is damaged.
        """
        check_folder(self.path)
        with explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self.private.mkdir(mode=0o700, exist_ok=True)
            self.private.chmod(0o700)
        with self.locked(), self._damage_said():
            self.previous = self._read_previous()
            with explained(self.path):
                self._recover()
                # A killed --remove is completed first: the shards that it wrote or replaced are in no manifest either.
                from dinox_io import remove  # it is built on this file

                remove.finish_interrupted(self)
                self._clean_up(keep_interrupted)
            yield self

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock only. PackError if another packer has it."""
        with explained(self.path):
            lock = (self.private / "lock").open("w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise PackError(
                    f"another packer is at work on {self.path}: wait until it ends, or give another --output"
                ) from None
            yield

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

    # -------------------------------------------------------------------------------------- after a kill

    def _recover(self) -> None:
        note = self.pending_commit()
        if note is not None and note["manifest"] in (None, (self.previous or {"self": None})["self"]):
            if self.previous is not None:  # killed before the index was written, it is the one of before
                write_set(self.path, *complete_set(self.path, self.previous))
            self._finish_commit(note)
        self._forget_commit()

    def pending_commit(self) -> dict[str, Any] | None:
        """What an interrupted commit noted: {manifest, files, remove}; None if there is none (or it was torn)."""
        try:
            note = json.loads(self._commit_note.read_bytes())
        except (OSError, ValueError):
            return None
        known = isinstance(note, dict) and note.keys() == {"manifest", "files", "remove"}
        # Names of our own only: a note that someone edited must not lead out of the folder.
        ours = known and all(map(_FILE.fullmatch, note["files"])) and all(map(PART_FOLDER.fullmatch, note["remove"]))
        return note if ours else None

    def _clean_up(self, keep_interrupted: bool) -> None:
        for folder in (self.path, self.private, self.path / EARLIER_FOLDER):
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink()
        numbers = self._unlisted()
        first = first_number(self.journal)
        stranger = next((name for name in numbers if first is None or numbers[name] < first), None)
        if stranger is not None:
            raise PackError(
                f"{self.path / stranger} is in no manifest, and no packing was interrupted here: "
                "move it away (or restore manifest.json), then run again"
            )
        kept = {shard.summary.name for shard in self.interrupted()[1]} if keep_interrupted else set()
        for name in numbers.keys() - kept:
            (self.path / name).unlink()
        if not keep_interrupted:
            self.journal.unlink(missing_ok=True)

    def _shard_numbers(self) -> dict[str, int]:
        matches = (_SHARD.fullmatch(path.name) for path in self.path.iterdir())
        return {match.group(): int(match.group(1)) for match in matches if match}

    def interrupted(self) -> tuple[dict[str, Any], list[FinishedShard]]:
        """The head of an interrupted pack's journal, and the shards it had finished, in order; ({}, []) if none."""
        return read_journal(self.journal)

    def _unlisted(self) -> dict[str, int]:
        listed = {shard["name"] for shard in self.previous["shards"]} if self.previous else set()
        return {name: number for name, number in self._shard_numbers().items() if name not in listed}

    def drop_unlisted(self) -> None:
        """Delete the shards that this run has written, and its journal: it ends without a commit."""
        self.drop_shards(self._unlisted())
        self.journal.unlink(missing_ok=True)

    def drop_shards(self, names: Iterable[str]) -> None:
        """Delete shards of an interrupted run that are not taken over; never one that the manifest lists."""
        with explained(self.path):
            for name in set(names) & self._unlisted().keys():
                (self.path / name).unlink()

    # ------------------------------------------------------------------------------------------- writing

    def begin(
        self, head: Mapping[str, Any] | None = None, *, first: int | None = None, shards: Iterable[FinishedShard] = ()
    ) -> int:
        """Begin the journal, which notes that shards will be written; returns the number of the first one.

        Args:
            head: what an interrupted run is known again by; without one, its shards are always thrown away.
            first, shards: of an interrupted run that is gone on with: its first number, and what is kept of it.
        """
        if first is None:
            first = 1 + max(self._shard_numbers().values(), default=-1)
        lines = [canonical_json({**(head or {}), "first_shard": first}) + b"\n", *map(journal_line, shards)]
        with explained(self.path):
            write_atomically(self.journal, b"".join(lines))
        return first

    def commit(
        self, manifest: dict[str, Any] | None, files: Mapping[Path, bytes] | None = None, *, remove: Sequence[str] = ()
    ) -> dict[str, Any] | None:
        """Make `manifest` that of the set and `files` what they say, both or neither; see the top of this file.

        Args:
            manifest: as build_manifest gives it; None where there is no volume. files: contents of files of this
            folder; those in private/ get mode 0600, others 0644. remove: names of folders that go with the commit.

        Returns the manifest as it was written. Raises PackError, or ShardError if the shards are not what it says.
        """
        complete, index = (None, b"") if manifest is None else complete_set(self.path, manifest)
        note = {"manifest": complete and complete["self"], "files": [], "remove": list(remove)}
        with explained(self.path):
            try:
                note["files"] += [str(path.relative_to(self.path)) for path in self._stage(files or {})]
                write_atomically(self._commit_note, canonical_json(note))
                if complete is not None:
                    write_set(self.path, complete, index)
            except OSError:  # a full disk, say: once the manifest stands, the next run completes the rest
                if complete is None or not self._stands(complete):
                    self._forget_commit()
                raise
            self._finish_commit(note)
        return complete

    def _stage(self, files: Mapping[Path, bytes]) -> Iterator[Path]:
        for path, data in files.items():
            if not path.exists() or path.read_bytes() != data:
                staged = _staged(path)
                write_atomically(staged, data)
                staged.chmod(0o600 if path.parent == self.private else 0o644)
                yield path

    def _stands(self, complete: Mapping[str, Any]) -> bool:
        target = self.path / MANIFEST_NAME
        return target.exists() and read_manifest(self.path)["self"] == complete["self"]

    def _forget_commit(self) -> None:
        self._commit_note.unlink(missing_ok=True)
        for folder in (self.path, self.private):
            for leftover in folder.glob(".*.next"):
                leftover.unlink()

    def _finish_commit(self, note: Mapping[str, Any]) -> None:
        for name in note["files"]:
            path = self.path / name
            with contextlib.suppress(FileNotFoundError):  # it has its place already
                _staged(path).replace(path)
        fsync_folder(self.path)
        fsync_folder(self.private)
        for name in note["remove"]:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(self.path / name)
        self.journal.unlink(missing_ok=True)
        self._commit_note.unlink(missing_ok=True)
        fsync_folder(self.private)

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

    def write_rows(self, path: Path, rows: Rows, *, mode: int) -> None:
        """Replace a JSONL file by itself, unless it has these very rows. In private/ (0600) it is escaped to ASCII."""
        data = row_bytes(rows, ascii_only=mode == 0o600)
        if not path.exists() or path.read_bytes() != data:
            with explained(self.path):
                write_atomically(path, data)
                path.chmod(mode)


def check_folder(path: Path) -> None:
    """PackError unless a set may be packed into `path`: it is new or empty, or a packer has been at work in it.

    Labels, a private folder and hidden files do not count: they may be there before a set is.
    """
    with explained(path):
        above = _that_exists(path)
        if not above.is_dir():
            inside = "" if above == path else f", so there can be no {path}"
            raise PackError(f"{above} is a file{inside}: --output needs a folder")
        if above != path or (path / MANIFEST_NAME).exists() or (path / "private" / "lock").exists():
            return
        names = [entry.name for entry in path.iterdir() if not entry.name.startswith(".")]
    if any(PART_FOLDER.fullmatch(name) or _SHARD.fullmatch(name) for name in names):
        return  # of an array job; or of a set without its manifest, which is said once its journal has been read
    strangers = len(set(names) - _BESIDE_A_SET)
    if strangers:
        noun = "1 file or folder that is" if strangers == 1 else f"{strangers} files or folders that are"
        raise PackError(f"{path} holds {noun} not of a set: give --output a new or empty folder, or a set")


def _that_exists(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    return next((one for one in (path, *path.absolute().parents) if one.exists()), path)


def _staged(path: Path) -> Path:
    return path.with_name(f".{path.name}.next")


def row_bytes(rows: Iterable[Mapping[str, Any]], *, ascii_only: bool) -> bytes:
    """A JSONL file. `ascii_only` escapes the rest: names of files need not be Unicode."""
    return "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows).encode()


@contextlib.contextmanager
def explained(folder: Path, wanted_bytes: int = 0) -> Iterator[None]:
    """Turn an OSError of writing under `folder` into a PackError that says what to do."""
    try:
        yield
    except OSError as error:
        raise PackError(_explanation(folder, error, wanted_bytes)) from error


def _explanation(folder: Path, error: OSError, wanted_bytes: int) -> str:
    before = "; the set as it was before is whole" if (folder / MANIFEST_NAME).is_file() else ""
    again = f"{before}. Then run the same command again"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        need = f"{wanted_bytes:,} bytes were to be written, " if wanted_bytes else ""
        return f"no space left for {folder} ({os.strerror(error.errno)}): {need}{free:,} are free. Make room{again}"
    reason = os.strerror(error.errno) if error.errno else type(error).__name__
    above = _that_exists(folder)
    what = f"write to {folder}" if above == folder else f"make {folder} in {above}"
    return f"cannot {what}: {reason}. Check its permissions and the disk{again}"

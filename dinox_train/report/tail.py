"""What was appended to a JSON-lines file since the last look, so that a report costs what is new, not what there is.

Invariant: what was handed out since `begins_anew` last was true is the file's whole content, up to its last newline.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dinox_train.metrics import object_of

BLOCK_BYTES = 1 << 22
KNOWN_BYTES = 1 << 12
"""So many before the place are compared: a file that was written anew is not mistaken for one that grew."""


class LineTail:
    """Reads a file of lines on, from where it was read to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = self._lines = 0
        self._known = b""
        self._inode = -1

    @property
    def offset(self) -> int:
        """Up to which byte the file was read."""
        return self._offset

    def facts(self) -> dict[str, Any]:
        """Up to where the file was read, as JSON values."""
        return {"offset": self._offset, "lines": self._lines, "known": self._known.decode("latin-1")}

    def go_on(self, facts: Mapping[str, Any]) -> None:
        """Be where `facts` were taken; `begins_anew` says whether the file is the same up to there."""
        self._offset, self._lines, self._known = facts["offset"], facts["lines"], facts["known"].encode("latin-1")
        with suppress(FileNotFoundError):
            self._inode = self.path.stat().st_ino

    def begins_anew(self) -> bool:
        """Whether the file is not the one that was read, or not any more: then `blocks` starts at its beginning."""
        try:
            inode = self.path.stat().st_ino
            with self.path.open("rb") as file:
                file.seek(self._offset - len(self._known))
                grew = inode == self._inode and file.read(len(self._known)) == self._known
        except FileNotFoundError:
            inode, grew = -1, self._inode == -1
        if not grew:
            self._offset, self._lines, self._known, self._inode = 0, 0, b"", inode
        return not grew

    def blocks(self) -> Iterator[list[dict[str, Any]]]:
        """The objects of the lines that are new, in order, some at a time; a last line without its newline is left.

        Raises ValueError for a line that is no object, or one of another version (file and line number).
        """
        if self._inode == -1:
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            rest = b""
            while block := file.read(BLOCK_BYTES):
                whole, newline, rest = (rest + block).rpartition(b"\n")
                if not newline:
                    continue
                lines = whole.split(b"\n")
                numbered = enumerate(lines, self._lines + 1)
                found = [object_of(self.path, number, line) for number, line in numbered if line.strip()]
                self._offset += len(whole) + 1
                self._lines += len(lines)
                self._known = (whole + b"\n")[-KNOWN_BYTES:]
                yield found

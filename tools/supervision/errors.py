"""What a trainer said last: its standard error (RUN/stderr.log), its log, and how far it came."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

LARGEST_BYTES = 8 * 2**20
_TAIL_BYTES = 65536
_LOGGED = re.compile(rb"^\S+ \S+ ERROR (.*)$", re.MULTILINE)
_KIND = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?=:)")


class ErrorStream:
    """RUN/stderr.log, to which a trainer writes its standard error, and from which it is shown here.

    A file, not a pipe: a trainer must not wait for its supervisor, and the last words of a crash stay.
    """

    def __init__(self, folder: Path) -> None:
        """Raises OSError."""
        self._log, self._path = folder / "train.log", folder / "stderr.log"
        if self._path.exists() and self._path.stat().st_size > LARGEST_BYTES:
            self._path.replace(self._path.with_name("stderr.log.1"))
        self._begin = self._shown = self._path.stat().st_size if self._path.exists() else 0
        self._log_begin = self._log.stat().st_size if self._log.exists() else 0

    def open(self) -> BinaryIO:
        """The file, to hand to a process. Raises OSError."""
        return os.fdopen(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb")

    def show(self) -> None:
        """Write what is new to this process's own standard error; a closed terminal is no reason to end."""
        with suppress(OSError), self._path.open("rb") as file:
            file.seek(self._shown)
            while piece := file.read(_TAIL_BYTES):
                self._shown += len(piece)
                sys.stderr.buffer.write(piece)
            sys.stderr.buffer.flush()

    def last(self) -> str:
        """The error that ended the process, in its words: the end of a traceback or `error: …`, else the last ERROR of
        train.log, else the last line of all; empty where it said nothing.
        """
        spoken = _tail(self._path, self._begin)
        lines = [line for line in spoken.decode(errors="replace").splitlines() if line.strip()]
        raised = "Traceback (most recent call last):" in lines
        if lines and (raised or any(line.startswith("error: ") for line in lines)):
            named = [line for line in lines if line.startswith("error: ")]
            return lines[-1] if raised else named[-1]
        logged = _LOGGED.findall(_tail(self._log, self._log_begin))
        if logged:
            return logged[-1].decode(errors="replace")
        return lines[-1] if lines else ""


def fingerprint(text: str) -> str:
    """An error's kind and a digest of its words, without addresses and numbers: equal for the same error, and nothing
    of a path or a name in it. Empty for no text.
    """
    if not text.strip():
        return ""
    plain = re.sub(r"0x[0-9a-fA-F]+|\d+", "0", text.strip())
    kind = _KIND.match(plain)
    digest = hashlib.sha256(plain.encode()).hexdigest()[:12]
    return f"{kind.group() if kind else 'error'} {digest}"


def updates_done(folder: Path) -> int:
    """The update of the last whole line of RUN/metrics.jsonl; 0 where there is none."""
    for line in reversed(_tail(folder / "metrics.jsonl", 0).splitlines()):
        with suppress(ValueError, TypeError, KeyError):
            return int(json.loads(line)["update"])
    return 0


def _tail(path: Path, begin: int) -> bytes:
    """The last bytes of a file, none from before `begin` (where the file is still that long); empty where missing."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(begin if begin <= size else 0, size - _TAIL_BYTES))
            return file.read()
    except OSError:
        return b""

"""RUN/.report.npz: what a report knew of metrics.jsonl, so that a process that resumes a long run reads on from there.

Invariant: it only spares work. It is used where the file's bytes before the place that was read to are those that were
there then, else the file is read from its beginning; the page is the same either way.
"""

from __future__ import annotations

import io
import json
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from dinox_io.atomic import write_atomically

NAME = ".report.npz"
VERSION = 1
EVERY_BYTES = 1 << 26
"""Of lines between two times that it is written: reading so many takes seconds, writing this some hundredths of one."""


def keep(path: Path, facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Write facts (as JSON) and arrays, whole or not at all; without room on the disk nothing is kept."""
    words = np.frombuffer(json.dumps({"version": VERSION, **facts}).encode(), np.uint8)
    content = io.BytesIO()
    np.savez(content, facts=words, **arrays)  # type: ignore[arg-type] # numpy's own stub
    with suppress(OSError):
        write_atomically(path, content.getvalue())


def kept(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """What `keep` wrote; None where there is nothing, something else, or what another version wrote."""
    try:
        with np.load(io.BytesIO(path.read_bytes())) as file:
            arrays = dict(file)
            facts = json.loads(arrays.pop("facts").tobytes())
            return (facts, arrays) if facts["version"] == VERSION else None
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile):
        return None

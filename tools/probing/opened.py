"""The ledger of the test side: one line each time a probe opened it, written before anything of it is read.

It lies beside the set (SET.test-openings.jsonl), since it is the set's test side that is used up, whatever run looks.
Invariant: lines are only added, each synced before the test side is opened.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dinox_io import ShardSet
from probing.errors import ProbeError

SUFFIX = ".test-openings.jsonl"


def ledger_of(folder: Path) -> Path:
    """Where the ledger of the set in `folder` lies."""
    folder = folder.resolve()
    return folder.with_name(folder.name + SUFFIX)


def digest_of_test_side(shards: ShardSet) -> str:
    """sha256 over the sorted digests of the test side's volumes: the same when the other sides grow."""
    digests = sorted(volume.digest for volume in shards.volumes if volume.split == "test")
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def open_test(path: Path, shards: ShardSet, network: str, tasks: Sequence[str], labels: str) -> int:
    """Note that the test side is opened, and return how often it was before: this very set, or this test side.

    Raises ProbeError where the ledger is damaged or cannot be written: an opening that nobody can count is none.
    """
    line = {
        "version": 1,
        "set": shards.digest,
        "test": digest_of_test_side(shards),
        "network": network,
        "labels": labels,
        "tasks": list(tasks),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        with path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            before = [_parsed(text, path, number) for number, text in enumerate(file.read().splitlines(), start=1)]
            file.write(json.dumps(line, sort_keys=True).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ProbeError(
            f"{path}: {error.strerror}. The test side is opened only where that can be noted; --ledger FILE names "
            "another place for its ledger"
        ) from None
    return sum(one["set"] == line["set"] or one["test"] == line["test"] for one in before)


def _parsed(text: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        found = json.loads(text)
        if isinstance(found, dict) and isinstance(found.get("set"), str) and isinstance(found.get("test"), str):
            return found
    except ValueError:
        pass
    raise ProbeError(f"{path}: line {number} is no opening of a test side; restore the ledger from a copy")

"""What was measured and tuned on this machine, kept from run to run in the user's cache folder.

One JSON file for each machine and version (`Facts.key`). Invariant: it is a cache: missing, damaged, of another machine
or not writable, everything is measured anew and nothing else happens. Written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinox_train.platform.facts import Facts

FOLDER = "DINOX_CACHE"
"""Environment: another folder than `$XDG_CACHE_HOME/dinox` (`~/.cache/dinox`), on a node whose home is read-only, say.
"""


class Kept:
    """The measurements of one machine and version."""

    def __init__(self, facts: Facts, environment: Mapping[str, str] = os.environ) -> None:
        self._machine = facts.key()
        digest = hashlib.sha256(json.dumps(self._machine, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = cache_folder(environment)
        self.path = self.folder / f"platform-{digest}.json"

    def get(self, name: str) -> Any:
        """What was kept under `name`; None: nothing."""
        return self._read().get(name)

    def names(self) -> tuple[str, ...]:
        """Under which names something was kept."""
        return tuple(self._read())

    def put(self, name: str, value: Any) -> None:
        """Keep a JSON value. A folder that cannot be written keeps nothing, and raises nothing."""
        values = self._read() | {name: value}
        text = json.dumps({"machine": self._machine, "values": values}, indent=1, sort_keys=True)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.folder, prefix=".", suffix=".tmp", delete=False) as file:
                file.write(text + "\n")
            Path(file.name).replace(self.path)
        except OSError:
            return

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        fits = isinstance(found, dict) and found.get("machine") == self._machine
        return found["values"] if fits and isinstance(found.get("values"), dict) else {}


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where measurements are kept."""
    if environment.get(FOLDER):
        return Path(environment[FOLDER])
    base = environment.get("XDG_CACHE_HOME") or Path(environment.get("HOME", "~")).expanduser() / ".cache"
    return Path(base) / "dinox"

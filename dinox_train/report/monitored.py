"""What tools/monitor.py left beside a run: figures of each checkpoint it looked at, and its pictures.

RUN/monitor/step-XXXXXXXX/   figures.json  attention.png  pca.png
    attention_over_time.png  pca_over_time.png
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dinox_train.report.columns import Columns

FIGURES = "figures.json"
OVER_TIME = ("pca_over_time", "attention_over_time")
OF_A_STEP = ("pca", "attention")


class Monitored:
    """All looks at a run so far; each is read once, unless it was written anew."""

    def __init__(self) -> None:
        self._folder = Path()
        self._looks: dict[Path, tuple[tuple[int, int, int], dict[str, Any] | None]] = {}

    def read(self, folder: Path) -> list[str]:
        """Look at RUN/monitor; returns what could not be read there, in words."""
        self._folder = folder
        unread: list[str] = []
        looks: dict[Path, tuple[tuple[int, int, int], dict[str, Any] | None]] = {}
        for path in sorted(folder.glob(f"step-*/{FIGURES}")):
            try:
                stat = path.stat()
                known = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
                before = self._looks.get(path)
                looks[path] = before if before and before[0] == known else (known, _figures(path))
            except FileNotFoundError:
                continue  # the monitor is writing it anew
            except OSError as error:
                unread.append(str(error))
                continue
            if looks[path][1] is None:
                unread.append(f"{path}: not the figures of a monitor")
        self._looks = looks
        return unread

    @property
    def figures(self) -> list[dict[str, Any]]:
        """Of each look, by update."""
        return sorted((found for _, found in self._looks.values() if found), key=lambda found: found["update"])

    @property
    def columns(self) -> Columns:
        """The numbers of all looks, over updates."""
        return Columns.of(self.figures)

    @property
    def pictures(self) -> list[tuple[str, Path]]:
        """Names and files of the pictures: of the newest look, then over time. Not all need be there."""
        newest = [path.parent for path, (_, found) in self._looks.items() if found][-1:]
        found = [(name, folder / f"{name}.png") for folder in newest for name in OF_A_STEP]
        return found + [(name, self._folder / f"{name}.png") for name in OVER_TIME]


def _figures(path: Path) -> dict[str, Any] | None:
    """None where it is something else."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        return None
    update = found.get("update") if isinstance(found, dict) else None
    return found if isinstance(update, int) and not isinstance(update, bool) else None

"""What tools/monitor.py left beside a run: figures of each checkpoint it looked at, and its pictures.

RUN/monitor/step-XXXXXXXX/   figures.json  attention.png  pca.png
    attention_over_time.png  pca_over_time.png  over_time.json: of which looks those two are

Invariant: looks at checkpoints that a rollback undid stay on disk and are shown nowhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dinox_train.branch import of_this_run
from dinox_train.report.columns import Columns

FIGURES = "figures.json"
OVER_TIME = ("pca_over_time", "attention_over_time")
OVER_TIME_LOOKS = "over_time.json"
OF_A_STEP = ("pca", "attention")


class Monitored:
    """All looks at a run so far; each is read once, unless it was written anew."""

    figures: list[dict[str, Any]]
    """Of each look at the run as it is now, by update."""

    def __init__(self) -> None:
        self._folder, self.figures = Path(), []
        self._looks: dict[Path, tuple[tuple[int, int, int], dict[str, Any] | None]] = {}

    def read(self, folder: Path) -> list[str]:
        """Look at RUN/monitor, and at RUN/checkpoints beside it; returns what could not be read there, in words."""
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
        found = sorted((one for _, one in looks.values() if one), key=lambda one: one["update"])
        self.figures = of_this_run(found, folder.parent / "checkpoints")
        return unread

    @property
    def columns(self) -> Columns:
        """The numbers of all looks, over updates."""
        return Columns.of(self.figures)

    @property
    def pictures(self) -> list[tuple[str, Path]]:
        """Names and files of the pictures: of the newest look, then over time. Not all need be there."""
        newest = [path.parent for path, (_, look) in self._looks.items() if look and look in self.figures[-1:]]
        found = [(name, folder / f"{name}.png") for folder in newest for name in OF_A_STEP]
        over_time = OVER_TIME if self._over_time_is_of_this_run() else ()
        return found + [(name, self._folder / f"{name}.png") for name in over_time]

    def _over_time_is_of_this_run(self) -> bool:
        """Until a monitor has drawn those pictures anew, they show what a rollback undid."""
        shown = [[look["update"], look["checkpoint"]["digest"]] for look in self.figures]
        try:
            drawn = json.loads((self._folder / OVER_TIME_LOOKS).read_bytes())["looks"]
            return all(look in shown for look in drawn)
        except (OSError, ValueError, KeyError, TypeError):
            return len(shown) == sum(look is not None for _, look in self._looks.values())


def _figures(path: Path) -> dict[str, Any] | None:
    """None where it is something else. What a look from before it was noted lacks is added."""
    try:
        found = {"went_back_to": [], "checkpoint": {"digest": None}, **json.loads(path.read_bytes())}
        updates = [found["update"], *found["went_back_to"]]
        return found if all(type(update) is int for update in updates) and "digest" in found["checkpoint"] else None
    except (ValueError, KeyError, TypeError):
        return None

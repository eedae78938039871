"""The numbers of metrics.jsonl, shown by other programs: TensorBoard, trackio, wandb, as `log.sinks` names them.

Each is written by a thread beside the run, into the run folder, and sends nothing over the network unless the user has
set its own variables otherwise. metrics.jsonl stays the truth: a sink that fails is an event, and the run goes on.

A run that resumes, or goes back, does updates again. TensorBoard is told to forget the first ones. The other two cannot
forget: after a resume, which gives the same numbers again, they keep what they had; after a rollback, which does not,
they are given the new ones beside the first.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any, Protocol

from dinox_io.atomic import write_atomically

Line = Mapping[str, Any]
_MOST_WAITING = 4096
_END_S = 30.0
"""So long the end of a run waits for its sinks."""
PROJECT = "dinox"


class Sink(Protocol):
    """Where the numbers of updates go."""

    def write(self, update: int, numbers: Mapping[str, float]) -> None:
        """Show the numbers of one update."""
        ...

    def close(self) -> None:
        """Bring what was written to the disk."""
        ...


class TensorBoard:
    """RUN/tensorboard/, for `tensorboard --logdir RUN/tensorboard`."""

    def __init__(self, folder: Path, _kept: dict[str, Any]) -> None:
        self._folder, self._writer, self._last = folder / "tensorboard", None, 0

    def write(self, update: int, numbers: Mapping[str, float]) -> None:
        if self._writer is None or update <= self._last:
            self.close()
            writer = import_module("torch.utils.tensorboard").SummaryWriter
            self._writer = writer(log_dir=str(self._folder), purge_step=update)
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, update)
        self._last = update

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _Unforgetting:
    """Which updates a sink is given that cannot take any back."""

    def __init__(self, kept: dict[str, Any]) -> None:
        self._kept, self._last = kept, 0

    def _wants(self, update: int) -> bool:
        """Whether it has no number of this update yet, or those of before a rollback.

        `moved` is by how much updates have to be moved so as to be all different: they always rise.
        """
        kept, newest = self._kept, self._kept.get("update", 0)
        if update <= self._last:  # within a process, only a rollback leads back
            kept["moved"] = kept.get("moved", 0) + newest - update + 1
            kept["update"] = newest = update - 1
        self._last = update
        return update > newest


class Wandb(_Unforgetting):
    """RUN/wandb/, offline unless WANDB_MODE says otherwise; `wandb sync` sends it, if that is wished.

    Its steps have to rise, so they are moved; the charts run over a number of our own, `update`.
    """

    def __init__(self, folder: Path, kept: dict[str, Any]) -> None:
        for name, value in (
            ("WANDB_MODE", "offline"),
            ("WANDB_ERROR_REPORTING", "false"),
            ("WANDB_DISABLE_GIT", "true"),
            ("WANDB_DISABLE_CODE", "true"),
            ("WANDB_CONSOLE", "off"),
            ("WANDB_SILENT", "true"),
        ):
            os.environ.setdefault(name, value)
        super().__init__(kept)
        wandb = import_module("wandb")
        quiet = {"x_disable_stats": True, "x_disable_meta": True, "x_disable_machine_info": True}
        settings = wandb.Settings(**quiet, x_save_requirements=False)
        where = {"project": PROJECT, "dir": str(folder), "name": folder.name}
        self._run = wandb.init(id=kept["id"], resume="allow", settings=settings, **where)
        self._run.define_metric("update")
        self._run.define_metric("*", step_metric="update")

    def write(self, update: int, numbers: Mapping[str, float]) -> None:
        if self._wants(update):
            self._run.log({"update": update, **numbers}, step=update + self._kept.get("moved", 0))

    def close(self) -> None:
        self._run.finish()


class Trackio(_Unforgetting):
    """RUN/trackio/ (or TRACKIO_DIR), for `TRACKIO_DIR=RUN/trackio trackio show`. Its steps may be any."""

    def __init__(self, folder: Path, kept: dict[str, Any]) -> None:
        for name, value in (
            ("TRACKIO_DIR", str((folder / "trackio").absolute())),
            ("HF_HUB_DISABLE_TELEMETRY", "1"),
            ("GRADIO_ANALYTICS_ENABLED", "False"),
        ):
            os.environ.setdefault(name, value)
        super().__init__(kept)
        self._trackio = import_module("trackio")
        name = f"{folder.name}-{kept['id']}"
        quiet = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}  # system.jsonl has the machine
        self._run = self._trackio.init(project=PROJECT, name=name, resume="allow", **quiet)

    def write(self, update: int, numbers: Mapping[str, float]) -> None:
        if self._wants(update):
            self._trackio.log(dict(numbers), step=update)

    def close(self) -> None:
        self._trackio.finish()


SINKS: Mapping[str, Callable[[Path, dict[str, Any]], Sink]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
}


def check_installed(names: Sequence[str]) -> None:
    """Raises ValueError for a sink whose package is not installed."""
    for name in names:
        if not _is_installed(name):
            raise ValueError(
                f"log.sinks: the package {name} is not installed: pip install 'dinox[log]', or take {name} out of "
                "log.sinks (metrics.jsonl and report.html need none of them)."
            )


def _is_installed(name: str) -> bool:
    try:
        return name in sys.modules or importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def numbers_of(line: Line) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl: `stage_s/wait` and `set_shares/0` for what is within another; what is
    null, or no number, is left out."""
    found: dict[str, float] = {}
    for name, value in line.items():
        if name in ("version", "update"):
            continue
        if isinstance(value, Mapping):
            found |= {f"{name}/{key}": inner for key, inner in numbers_of(value).items()}
        elif isinstance(value, list | tuple):
            found |= {
                f"{name}/{key}": inner
                for key, inner in numbers_of({str(at): one for at, one in enumerate(value)}).items()
            }
        elif isinstance(value, int | float):
            found[str(name)] = float(value)
    return found


class Sinks:
    """The sinks of a run, and the thread that writes them."""

    def __init__(self, names: Sequence[str], folder: Path, tell: Callable[[str, str], None]) -> None:
        """tell: takes an event and its text, from any thread."""
        self._folder, self._tell, self._file = folder, tell, folder / "sinks.json"
        self._opened: dict[str, Sink] = {}
        self._names, self._stopped = list(names), False
        self._kept = _read(self._file, names)
        self._waiting: Queue[Line | None] = Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._work, name="dinox-sinks", daemon=True)
        self._thread.start()

    def put(self, line: Line) -> None:
        """Have a line of metrics.jsonl shown; never waits."""
        if self._stopped:
            return
        try:
            self._waiting.put_nowait(line)
        except Full:
            self._stopped = True
            self._tell("sink failed", f"{', '.join(self._names)}: slower than training by {_MOST_WAITING} updates")

    def close(self) -> None:
        """Wait, half a minute at most, until what was put is written."""
        try:
            self._waiting.put(None, timeout=_END_S)
        except Full:
            return
        self._thread.join(_END_S)

    def _work(self) -> None:
        going = True
        while going:
            lines = [self._waiting.get(), *self._all_waiting()]
            going = None not in lines
            for line in lines:
                if line is not None:
                    self._each(lambda name, line=line: self._write(name, line))
            if self._names and lines != [None]:
                self._each(lambda _name: write_atomically(self._file, json.dumps(self._kept, indent=1).encode()))
        self._each(lambda name: self._opened[name].close() if name in self._opened else None)

    def _all_waiting(self) -> list[Line | None]:
        found = []
        try:
            while True:
                found.append(self._waiting.get_nowait())
        except Empty:
            return found

    def _write(self, name: str, line: Line) -> None:
        if name not in self._opened:
            self._opened[name] = SINKS[name](self._folder, self._kept[name])
        self._opened[name].write(line["update"], numbers_of(line))
        self._kept[name]["update"] = max(line["update"], self._kept[name].get("update", 0))

    def _each(self, do: Callable[[str], None]) -> None:
        """Do something for each sink; one that fails is told, and done with."""
        for name in list(self._names):
            try:
                do(name)
            except Exception as error:
                self._names.remove(name)
                kind = type(error).__name__
                self._tell("sink failed", f"{name}: {kind}: {error}. RUN/metrics.jsonl holds every number all the same")


def _read(file: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What was kept of each sink: its run's id, and the newest update that it has."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        kept = {}
    kept = kept if isinstance(kept, dict) else {}
    return {**kept, **{name: kept.get(name) or {"id": secrets.token_hex(4)} for name in names}}

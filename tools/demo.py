#!/usr/bin/env python3
"""The whole way in one command: DICOM files, shards, a verified set, a training run that is interrupted and resumes.

Everything is done by the programs that you would call yourself; each command is printed before it runs. Running it
again on the same folder goes on where it stopped, and says so where nothing is left to do. To begin anew, delete it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
# Phantoms have nothing to hide: a key that everybody knows gives everybody the same split.
PHANTOM_KEY = b"phantoms have no secrets to keep\n"
PHANTOM_SPLIT = ["--val-fraction", "0.25", "--split-seed", "4"]
PHANTOM_FULL = ["--patients", "12", "--size", "256"]
PHANTOM_SHORT = ["--patients", "4", "--size", "128", "--slices", "24"]
SHORT_SETTINGS = ["train.updates=12", "checkpoint.every=4", "evaluate.every=6"]
SOME_REJECTED = 3
POLL_S = 0.2
PATIENCE_S = 120


class DemoError(RuntimeError):
    """A stage failed; the message says which and how, what the program itself said stands above."""


class Stopped(Exception):
    """The demo was told to end, and the program that ran has ended."""


class Program:
    """A program of the repository, in a session of its own, that is told to end at most once.

    The terminal's Ctrl-C therefore reaches the demo alone, which passes it on. A trainer that got it from both would
    take the second one for "at once", and lose the updates since its last checkpoint.
    """

    def __init__(self, command: list[str], folder: Path) -> None:
        self.process = subprocess.Popen(command, cwd=folder, start_new_session=True)
        self._told = False

    def tell(self, number: int) -> None:
        """Send it a signal, unless it was sent one before."""
        if not self._told:
            self._told = True
            self.process.send_signal(number)

    def kill(self) -> None:
        """End it and what it started, at once; nothing where it has ended. Does not wait: signal handlers may not."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


class Stop:
    """Notes a signal that ends the demo, and passes it on to the program that runs: neither dies with work unsaved."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._program: Program | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Ctrl-C, SIGTERM and the closing of the terminal are noted within; one that is ignored (nohup) stays so."""
        wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        numbers = [number for number in wanted if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        again = self.received is not None
        self.received = self.received or signal.Signals(number)
        # Only a person asks twice. A SIGTERM to a whole group comes twice too: from its sender, and from make.
        if self._program and again and number == signal.SIGINT:
            self._program.kill()
        else:
            self._pass_on()

    def _pass_on(self) -> None:
        if self._program:
            self._program.tell(signal.SIGINT if self.received == signal.SIGINT else signal.SIGTERM)

    def start(self, command: list[str], folder: Path) -> Program:
        """Start a program. Raises Stopped where the demo was told to end before."""
        self.check()
        self._program = Program(command, folder)
        if self.received:
            self._pass_on()
        return self._program

    def check(self) -> None:
        """Raises Stopped where the demo was told to end."""
        if self.received:
            raise Stopped


@dataclass
class Demo:
    """One demo: where it writes, what it calls, how long its stages took."""

    folder: Path
    data: Path | None
    short: bool
    repository: Path
    stop: Stop = field(default_factory=Stop)
    took_s: dict[str, float] = field(default_factory=dict)

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    @property
    def run_folder(self) -> Path:
        return self.folder / "run"

    @property
    def config(self) -> Path:
        return self.repository / "configs" / "demo.yaml"

    @property
    def updates(self) -> int:
        """Updates of the finished run."""
        if self.short:
            return int(SHORT_SETTINGS[0].partition("=")[2])
        return int(yaml.safe_load(self.config.read_text(encoding="utf-8"))["train"]["updates"])

    def python(self, *arguments: str | Path) -> list[str]:
        return [sys.executable, *map(str, arguments)]

    def tool(self, name: str, *arguments: str | Path) -> list[str]:
        return self.python(self.repository / "tools" / name, *arguments)

    def train_command(self) -> list[str]:
        settings = SHORT_SETTINGS if self.short else []
        places = [f"data.shards={self.shards}", f"run.folder={self.run_folder}"]
        return self.python("-m", "dinox_train", "--config", self.config, *places, *settings)


def heading(text: str) -> None:
    """Announce a stage."""
    print(f"\n== {text}", flush=True)


def start(demo: Demo, command: list[str]) -> Program:
    """Start a program with its output in view, and print what is called."""
    print(f"$ {shlex.join(command)}", flush=True)
    return demo.stop.start(command, demo.repository)


def wait(demo: Demo, program: Program, meanwhile: Callable[[], None] = lambda: None) -> int:
    """Its exit code; `meanwhile` is called again and again. Raises Stopped where the demo was told to end meanwhile."""
    limit_s = None
    try:
        while (code := program.process.poll()) is None:
            meanwhile()
            if demo.stop.received and limit_s is None:
                limit_s = time.monotonic() + PATIENCE_S
                with contextlib.suppress(OSError):  # the terminal may be gone
                    print(f"\ndemo: it gets {PATIENCE_S} s to save its work; Ctrl-C again ends it at once.", flush=True)
            if limit_s is not None and time.monotonic() > limit_s:
                program.kill()
            time.sleep(POLL_S)
    finally:
        program.kill()
        program.process.wait()
    demo.stop.check()
    return code


def stage(demo: Demo, name: str, command: list[str], allowed: Sequence[int] = (0,)) -> int:
    """Run a program to its end. Raises DemoError where its exit code is not an allowed one."""
    begin = time.monotonic()
    code = wait(demo, start(demo, command))
    demo.took_s[name] = time.monotonic() - begin
    if code not in allowed:
        raise DemoError(f"the stage “{name}” failed with exit code {code}; what it said stands above.")
    return code


def make_phantom(demo: Demo) -> Path:
    """Stage 1: DICOM files to work with."""
    heading("1 of 4: a phantom CT study (DICOM files such as a scanner exports; nobody in it exists)")
    folder = demo.folder / "phantom"
    options = PHANTOM_SHORT if demo.short else PHANTOM_FULL
    stage(demo, "phantom", demo.tool("make_phantom.py", folder, *options))
    return folder / "dicom"


def pack(demo: Demo, source: Path) -> None:
    """Stage 2: DICOM to shards."""
    heading("2 of 4: pack the DICOM files into shards of Hounsfield units")
    options: list[str | Path] = []
    if demo.data is None:
        key = demo.folder / "phantom.key"
        key.write_bytes(PHANTOM_KEY)
        options = ["--key-file", key, *PHANTOM_SPLIT]
    command = demo.tool("pack_shards.py", source, "--output", demo.shards, *options)
    if stage(demo, "pack", command, allowed=(0, SOME_REJECTED)) == SOME_REJECTED:
        print(
            f"Exit code {SOME_REJECTED}: some of it is no CT volume that could be trusted, and was left out. Expected"
        )
        print("here: a scanner's export holds more than volumes." if demo.data is None else "with files as they come.")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file; none where it is not there. A line that is being written is left out."""
    if not path.is_file():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.split(b"\n") if line.strip()]


def last_update(demo: Demo) -> int:
    """The last update whose line is in the run's metrics, 0 before the first."""
    lines = read_lines(demo.run_folder / "metrics.jsonl")
    return lines[-1]["update"] if lines else 0


def train_until(demo: Demo, update: int, number: signal.Signals) -> None:
    """Train, and interrupt the trainer when `update` is in its metrics. Raises DemoError where it ends otherwise."""
    begin = time.monotonic()
    program = start(demo, demo.train_command())

    def interrupt() -> None:
        if last_update(demo) >= update:
            program.tell(number)

    code = wait(demo, program, interrupt)
    demo.took_s["train"] = demo.took_s.get("train", 0.0) + time.monotonic() - begin
    if sys.stdout.isatty():
        print("\033[?25h", end="")  # a killed progress bar cannot give the cursor back
    after = f"after update {last_update(demo)} of {demo.updates}"
    expected = 128 + number if number == signal.SIGTERM else -number
    if code == expected:
        print(f"Interrupted with {number.name} {after}, exit code {code}, as it should be.", flush=True)
    elif code == 0:
        print(f"The run was done before {number.name} reached it.", flush=True)
    else:
        raise DemoError(f"the trainer ended with exit code {code} {after}, {expected} was expected; see above.")


def train(demo: Demo) -> None:
    """Stage 4: a run that is interrupted, and resumes by the same command."""
    heading(f"4 of 4: train a small network, {demo.updates} updates; it is interrupted on the way and resumes")
    plan = [(demo.updates // 2, signal.SIGTERM)]
    if not demo.short:
        plan.append((3 * demo.updates // 4, signal.SIGKILL))
    for update, number in plan:
        if last_update(demo) < update:
            train_until(demo, update, number)
            print("The same command goes on from the last checkpoint:", flush=True)
    before_s = demo.took_s.get("train", 0.0)
    stage(demo, "train", demo.train_command())
    demo.took_s["train"] += before_s


def figures(lines: Sequence[dict[str, Any]]) -> list[str]:
    """What the metrics say, in a few lines; a figure that nobody measured is left out."""

    def series(name: str) -> list[float]:
        return [line[name] for line in lines if line.get(name) is not None]

    said = []
    for name, what in (("loss", "loss"), ("loss_val", "loss on the validation patients"), ("knn_z", "knn_z")):
        values = series(name)
        if values:
            said.append(f"{what}: {values[0]:.3f} at first, {values[-1]:.3f} at last")
    speed, waits = sorted(series("images_per_s")), series("data_wait_fraction")
    if speed:
        said.append(f"images per second: {speed[len(speed) // 2]:.1f} (median)")
    if waits:
        said.append(f"waiting for data: {100 * sum(waits) / len(waits):.1f} % of the time")
    return said


def show(path: Path) -> str:
    """A path as short as it can be written from here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def summary(demo: Demo) -> None:
    """What was made, and what to do next."""
    heading("What was made")
    places = [(demo.shards, "the shards"), (demo.run_folder / "checkpoints", "the trained network")]
    places.append((demo.run_folder / "report.html", "open this in a browser: curves and pictures"))
    if demo.data is None:
        places.insert(0, (demo.folder / "phantom", "DICOM files, and the labels of their nodules"))
    for path, what in places:
        if path.exists():
            print(f"  {show(path)}: {what}")
    for line in figures(read_lines(demo.run_folder / "metrics.jsonl")):
        print(f"  {line}")
    print("  time: " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in demo.took_s.items()))
    print("  (knn_z: how well a slice's features tell its height in the body, on patients held out; 1 is perfect.")
    print("  So few updates on so few patients show that everything works, not what a network can learn.)")
    python = show(Path(sys.executable))
    print(
        "\nYour own CT scans, the same way:\n"
        "  make demo DATA=/path/to/dicom\n"
        f"or step by step, with a larger network (from {show(demo.repository)}):\n"
        f"  {python} tools/pack_shards.py /path/to/dicom --output shards\n"
        f"  {python} tools/verify_shards.py shards\n"
        f"  {python} -m dinox_train --config configs/vit_s.yaml data.shards=shards run.folder=runs/first\n"
        f"To begin this demo anew, delete {show(demo.folder)}.",
        flush=True,
    )


def work(demo: Demo) -> None:
    """All stages. Raises DemoError."""
    demo.folder.mkdir(parents=True, exist_ok=True)
    if demo.data is None:
        source = make_phantom(demo)
    else:
        heading(f"1 of 4: your files in {demo.data} (read only)")
        source = demo.data
    pack(demo, source)
    heading("3 of 4: verify the shards (every byte is read and hashed)")
    stage(demo, "verify", demo.tool("verify_shards.py", demo.shards))
    train(demo)
    summary(demo)


def workspace(folder: Path, data: Path | None, short: bool) -> Path:
    """Where a demo writes: different data and forms never share a set or a run."""
    if data is not None:
        folder = folder / f"own-{hashlib.sha256(os.fsencode(data)).hexdigest()[:8]}"
    return folder / "short" if short else folder


def parse_arguments(arguments: Sequence[str] | None, repository: Path) -> Demo:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="exit code: 0 done, 1 a stage failed, 2 usage, 130 or 143 interrupted"
    )
    parser.add_argument("--data", type=Path, help="a folder with your own DICOM files, instead of the phantom")
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where to write (default: demo)")
    parser.add_argument("--short", action="store_true", help="a small phantom and few updates: is everything in place?")
    values = parser.parse_args(arguments)
    data = values.data.expanduser().resolve() if values.data else None
    if data is not None and not data.exists():
        parser.error(f"--data {values.data}: there is no such file or folder")
    folder = workspace(values.folder.expanduser().resolve(), data, values.short)
    return Demo(folder=folder, data=data, short=values.short, repository=repository)


def main(arguments: Sequence[str] | None = None, repository: Path = REPOSITORY) -> int:
    """Run the demo with the programs of `repository`; returns the exit code."""
    demo = parse_arguments(arguments, repository)
    try:
        with demo.stop.listening():
            work(demo)
    except DemoError as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    except Stopped:
        print("\ndemo: interrupted; the same command goes on from here.", file=sys.stderr)
        return 128 + (demo.stop.received or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())

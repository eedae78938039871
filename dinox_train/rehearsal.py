"""A rehearsal: a run in small, killed once and resumed, beside the same run undisturbed, and a verdict.

    RUN-rehearsal/
        config.yaml                  what both runs are: the user's own, with fewer images and updates
        killed/ straight/            their run folders
        killed.log straight.log      what they printed
        rehearsal.json               the checks, the verdict, and figures

Invariant: the run folder of the configuration is neither read nor written; the trainer under test is the real one, a
process of its own, and the kill is SIGKILL.
"""

from __future__ import annotations

import fcntl
import json
import math
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dinox_io.atomic import write_atomically
from dinox_train.checkpoint import list_checkpoints
from dinox_train.config import Config, ConfigError, to_yaml, validate
from dinox_train.metrics import VARYING, read_lines
from dinox_train.parallel import launched

REPORT = "rehearsal.json"
EXIT_PASSED, EXIT_FAILED = 0, 1
CERTAINTY = 3.0
"""The loss falls where its slope is so many standard errors below 0: by chance, one in a thousand."""
_POLL_S = 0.02
_EXACT_ON_GPU = ("update", "stage", "applied", "images", "views", "tokens", "epoch", "lr", "weight_decay", "set_shares")
"""What has nothing to do with the device's arithmetic: which windows, which schedule."""


class RehearsalFailed(RuntimeError):
    """A rehearsal that cannot go on: what, and where to look."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    passed: bool
    words: str


def rehearse(config: Config, say: Callable[[str], None] = print) -> int:
    """Try the run that `config` (with its section `rehearsal`) describes; return 0 if it passed, 1 if not.

    Raises ConfigError where the rehearsal is no configuration, or another one is at work in its folder.
    """
    assert config.rehearsal is not None, "the caller looks whether a rehearsal is wanted"
    if launched()[1] > 1:
        raise ConfigError("rehearsal: it tries a run in one process; start it without torchrun")
    begin, folder = time.monotonic(), Path(config.run.folder.rstrip("/") + "-rehearsal")
    small = rehearsed(config, folder)
    deadline = begin + 60 * config.rehearsal.minutes
    checks: list[Check] = []
    figures: dict[str, Any] = {}
    with _alone_in(folder):
        for name in ("killed", "straight"):
            shutil.rmtree(folder / name, ignore_errors=True)
            (folder / f"{name}.log").unlink(missing_ok=True)
        write_atomically(folder / "config.yaml", to_yaml(small).encode())
        try:
            for check in _checks(small, config, folder, deadline, figures):
                checks.append(check)
                say(_in_words(check))
        except RehearsalFailed as error:
            checks.append(Check("runs", False, str(error)))
            say(_in_words(checks[-1]))
        passed = all(check.passed for check in checks)
        report = {
            "passed": passed,
            "checks": [asdict(check) for check in checks],
            "updates": small.train.updates,
            "batch_size": small.train.batch_size,
            "seconds": time.monotonic() - begin,
            **figures,
        }
        write_atomically(folder / REPORT, json.dumps(report, indent=1, allow_nan=False).encode() + b"\n")
    say(_verdict(checks, report, config, folder / REPORT))
    return EXIT_PASSED if passed else EXIT_FAILED


def rehearsed(config: Config, folder: Path) -> Config:
    """The small run: micro-batches as large as the real run's, two of them an update at most, of its first stage."""
    assert config.rehearsal is not None
    tree = config.model_dump()
    accumulation = config.train.accumulation
    if config.stages:
        first = tree["stages"][0]
        accumulation = first.pop("train").get("accumulation", accumulation)
        tree["stages"] = ({**first, "updates": None},)
    pieces = min(accumulation, 2)
    updates = config.rehearsal.updates
    tree["train"] |= {
        "updates": updates,
        "batch_size": config.train.batch_size // accumulation * pieces,
        "accumulation": pieces,
    }
    tree["schedule"]["updates"] = updates
    tree["checkpoint"]["every"] = min(config.checkpoint.every, updates // 4)
    tree["rehearsal"] = None
    tree["events"]["command"], tree["log"]["sinks"] = None, ()  # a rehearsal is nobody's news
    tree["run"]["folder"] = str(folder / "straight")
    return validate(tree)


def _checks(small: Config, real: Config, folder: Path, deadline: float, figures: dict[str, Any]) -> Iterator[Check]:
    """One check after the other, as soon as it is known. Raises RehearsalFailed where a run ends otherwise."""
    updates = small.train.updates
    with _child(folder, "killed") as child:
        figures["killed_at"] = _killed_after(child, folder, updates // 2 + 1, deadline)
    yield Check("killed", True, f"SIGKILL after update {figures['killed_at']} of {updates}")
    with _child(folder, "killed") as child:
        _ended(child, folder / "killed.log", deadline)
    yield Check("resumed", True, "the same command went on, from its newest checkpoint, to the end")
    with _child(folder, "straight") as child:
        _ended(child, folder / "straight.log", deadline)
    lines = read_lines(folder / "straight" / "metrics.jsonl")
    figures |= _figures(lines, real)
    masked = [line["update"] for line in lines if not line["applied"]]
    words = f"not in updates {masked[:5]}" if masked else f"in all {len(lines)} updates"
    yield Check("finite", not masked, f"loss and gradient were finite {words}")
    if not masked:
        yield loss_falls([line["loss"] for line in lines])
    assert real.rehearsal is not None
    exact = small.deterministic or _device_of(folder) == "cpu"
    yield same_lines(folder / "killed", folder / "straight", None if exact else real.rehearsal.tolerance)
    yield same_tensors(folder / "killed", folder / "straight", None if exact else real.rehearsal.tolerance)


def loss_falls(losses: Sequence[float]) -> Check:
    """Whether a straight line through the losses falls by more than the scatter around it explains."""
    count, quarter = len(losses), max(len(losses) // 4, 1)
    at = [index - (count - 1) / 2 for index in range(count)]
    spread = sum(x * x for x in at)
    mean = statistics.fmean(losses)
    slope = sum(x * y for x, y in zip(at, losses, strict=True)) / spread
    rest = sum((y - mean - slope * x) ** 2 for x, y in zip(at, losses, strict=True))
    error = math.sqrt(rest / (count - 2) / spread)
    first, last = statistics.fmean(losses[:quarter]), statistics.fmean(losses[-quarter:])
    words = f"from {first:.4f} (first {quarter} updates) to {last:.4f} (last {quarter})"
    if slope < -CERTAINTY * error:
        return Check("loss", True, f"the loss falls, {words}")
    return Check(
        "loss",
        False,
        f"the loss does not fall by more than it scatters, {words}: look at optimizer.learning_rate, at "
        "RUN-rehearsal/straight/pictures/views.png, and at rehearsal.updates, which may be too few",
    )


def same_lines(resumed: Path, straight: Path, tolerance: float | None) -> Check:
    """Whether each update's line is the same in both runs; tolerance: of the losses, None: bit for bit."""
    one, other = (read_lines(folder / "metrics.jsonl") for folder in (resumed, straight))
    if [line["update"] for line in one] != [line["update"] for line in other]:
        return Check("lines", False, f"the resumed run has {len(one)} lines, the undisturbed one {len(other)}")
    largest = 0.0
    for line, beside in zip(one, other, strict=True):
        names = (line.keys() | beside.keys()) - VARYING if tolerance is None else _EXACT_ON_GPU
        wrong = sorted(name for name in names if line.get(name) != beside.get(name))
        if wrong:
            return Check("lines", False, f"update {line['update']} of the resumed run differs in {', '.join(wrong)}")
        if tolerance is not None:
            pair = (line["loss"] or math.inf, beside["loss"] or math.inf)
            difference = abs(pair[0] - pair[1]) / abs(pair[1]) if math.isfinite(pair[0] - pair[1]) else math.inf
            largest = max(largest, difference)
    if tolerance is None:
        return Check("lines", True, f"the {len(one)} lines of the resumed run are those of the undisturbed one")
    words = (
        f"the losses of the resumed run are within {largest:.2g} of the undisturbed one's ({tolerance:g} is allowed)"
    )
    return Check("lines", largest <= tolerance, words)


def same_tensors(resumed: Path, straight: Path, tolerance: float | None) -> Check:
    """Whether the last checkpoints hold the same tensors; tolerance: of each file's norm, None: bit for bit."""
    last = [list_checkpoints(folder / "checkpoints")[-1] for folder in (resumed, straight)]
    largest, count = (0.0, ""), 0
    for file in sorted(last[1].rglob("*.safetensors")):
        one, other = load_file(last[0] / file.relative_to(last[1])), load_file(file)
        count += len(other)
        if one.keys() != other.keys():
            return Check("tensors", False, f"{file.name} of the resumed run holds other tensors")
        differing = [name for name in other if not torch.equal(one[name], other[name])]
        if tolerance is None and differing:
            return Check("tensors", False, f"{file.name} of the resumed run differs, in {differing[0]} for one")
        apart = sum(float((one[name].double() - other[name].double()).square().sum()) for name in differing)
        whole = sum(float(value.double().square().sum()) for value in other.values())
        # Averages of gradients differ more than what is learnt: only weights are held to the tolerance.
        if file.stem != "optimizer" and whole:
            largest = max(largest, (math.sqrt(apart / whole), file.name))
    if tolerance is None:
        return Check("tensors", True, f"the {count} tensors of the resumed run are those of the undisturbed one")
    words = f"the weights of the resumed run are within {largest[0]:.2g} of the undisturbed one's"
    return Check("tensors", largest[0] <= tolerance, f"{words} ({tolerance:g} is allowed)")


# --- children ----------------------------------------------------------------------------------------------------


@contextmanager
def _child(folder: Path, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """A trainer of the small run in folder/name; it does not outlive this."""
    command = [sys.executable, "-m", "dinox_train", "--config", str(folder / "config.yaml")]
    with (folder / f"{name}.log").open("ab") as output:
        child = subprocess.Popen([*command, f"run.folder={folder / name}"], stdout=output, stderr=subprocess.STDOUT)
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def _killed_after(child: subprocess.Popen[bytes], folder: Path, update: int, deadline: float) -> int:
    """Kill the child once the line of `update` is written; the update that it had reached."""
    metrics = folder / "killed" / "metrics.jsonl"
    while not (lines := read_lines(metrics)) or lines[-1]["update"] < update:
        code = child.poll()
        if code == 0:
            raise RehearsalFailed("the run was done before it could be killed: raise rehearsal.updates")
        if code is not None:
            raise _died(code, folder / "killed.log")
        _check_time(deadline, folder / "killed.log")
        time.sleep(_POLL_S)
    child.send_signal(signal.SIGKILL)
    if child.wait() != -signal.SIGKILL:
        raise RehearsalFailed("the run was done before it could be killed: raise rehearsal.updates")
    return int(read_lines(metrics)[-1]["update"])


def _ended(child: subprocess.Popen[bytes], log: Path, deadline: float) -> None:
    """Wait until the child is done."""
    while (code := child.poll()) is None:
        _check_time(deadline, log)
        time.sleep(_POLL_S)
    if code:
        raise _died(code, log)


def _died(code: int, log: Path) -> RehearsalFailed:
    return RehearsalFailed(f"the trainer ended with exit code {code}: {last_words(log)}")


def last_words(log: Path) -> str:
    """The last lines of a log, on one, and where all of it is."""
    return " | ".join(log.read_text(errors="replace").strip().splitlines()[-3:]) + f" (all of it: {log})"


def _check_time(deadline: float, log: Path) -> None:
    if time.monotonic() > deadline:
        raise RehearsalFailed(f"it took longer than rehearsal.minutes: see {log} for how far it came")


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{folder}: another rehearsal is at work there; wait for it or stop it.") from None
        yield


# --- words -------------------------------------------------------------------------------------------------------


def _device_of(folder: Path) -> str:
    return json.loads((folder / "straight" / "env.json").read_text())["device"].partition(":")[0]


def _figures(lines: Sequence[dict[str, Any]], real: Config) -> dict[str, Any]:
    """Of the second half of a run, by when everything is warm."""
    warm = lines[len(lines) // 2 :]
    images_per_s = statistics.median(line["images_per_s"] for line in warm)
    return {
        "images_per_s": images_per_s,
        "data_wait_fraction": statistics.median(line["data_wait_fraction"] for line in warm),
        "memory_bytes": max(line["memory_bytes"] for line in warm),
        "hours_of_the_run": real.train.updates * real.train.batch_size / images_per_s / 3600,
    }


def _in_words(check: Check) -> str:
    return f"{'ok  ' if check.passed else 'FAIL'} {check.name}: {check.words}"


def _verdict(checks: Sequence[Check], report: dict[str, Any], config: Config, file: Path) -> str:
    failed = [check for check in checks if not check.passed]
    if failed:
        return f"rehearsal: FAIL, {failed[0].words}\nreport: {file}"
    speed = (
        f"{report['images_per_s']:.1f} images/s, data wait {report['data_wait_fraction']:.1%}, memory "
        f"{report['memory_bytes'] / 2**30:.1f} GiB; at this speed the {config.train.updates:,} updates of the run take "
        f"{report['hours_of_the_run']:.1f} hours"
    )
    stages = " Only the first stage was tried." if len(config.stages) > 1 else ""
    return f"{speed}\nrehearsal: PASS in {report['seconds']:.0f} s.{stages}\nreport: {file}"

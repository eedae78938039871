"""Hours of training with kills at random moments, beside the same run undisturbed. `--help` says how."""

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_EXAMPLES = """\
examples:
  python tools/soak.py                              2 hours of training and 20 kills at least, in soak/
  python tools/soak.py --minutes 30                 of them, half an hour now; the same command goes on
  python tools/soak.py --folder long --hours 24 --kills 100 data.shards=/data/shards

FOLDER/disturbed is trained and killed (SIGKILL) at random moments until both numbers are reached, and then to its end.
FOLDER/undisturbed is then the same run without a kill. Every line and every tensor of the two must be equal, bit for
bit, and the undisturbed one's memory must not grow. FOLDER/soak.json says how far it is, and in the end the verdict.

exit code: 0 passed; 1 failed (it says what); 2 wrong usage; 3 --minutes are over, and there is more to do; 130 stopped
           with Ctrl-C, and the same command goes on
"""
EXIT_PASSED, EXIT_FAILED, EXIT_UNFINISHED, EXIT_INTERRUPTED = 0, 1, 3, 130
GROWTH_SHARE, GROWTH_BYTES = 0.05, 32 << 20
"""By the larger of these, a share and a number of bytes, memory may seem to grow from a quarter of the run to its end.
"""
_ENDLESS = 2**31 - 1
_POLL_S = 0.05


@dataclass
class State:
    """How far a soak is; what stands in soak.json."""

    overrides: list[str]
    config: str
    seconds: float = 0.0
    """Of training in disturbed/, starts included."""
    kills: list[int] = field(default_factory=list)
    """The updates that were done at each."""
    updates: int | None = None
    """Where both runs end; None until the last kill."""
    stops: int = 0
    """How often this program was stopped while undisturbed/ trained; it went on from a checkpoint then."""
    verdict: dict[str, Any] | None = None


class SoakFailed(RuntimeError):
    """What did not hold."""


class Soak:
    """One folder's soak."""

    def __init__(self, folder: Path, state: State, end_s: float) -> None:
        """end_s: of time.monotonic(), when this session is over."""
        self.folder, self.state, self._end_s = folder, state, end_s

    def kill_at_random(self, hours: float, kills: int, between_s: float) -> bool:
        """Train and kill until there are enough of both; False where the session ended first."""
        state = self.state
        while state.updates is None:
            if self.over:
                return False
            wait_s = random.Random(len(state.kills)).uniform(0.1, 1.9) * between_s
            began, before = time.monotonic(), state.seconds
            with self._trainer("disturbed", _ENDLESS) as child:
                while time.monotonic() - began < wait_s and not self.over:
                    self._alive(child, "disturbed")
                    time.sleep(_POLL_S)
                child.kill()
                child.wait()
            state.seconds = before + time.monotonic() - began
            state.kills.append(self.done("disturbed"))
            if state.seconds >= 3600 * hours and len(state.kills) >= kills and state.kills[-1] > 0:
                state.updates = state.kills[-1] + 5
            self.keep()
            self._say(f"kill {len(state.kills)} after update {state.kills[-1]}; {state.seconds / 3600:.2f} hours")
        return True

    def finish(self, name: str) -> bool:
        """Train to the end; False where the session ended first."""
        assert self.state.updates is not None
        with self._trainer(name, self.state.updates) as child:
            try:
                while child.poll() is None and not self.over:
                    time.sleep(_POLL_S)
            finally:
                if stopped := child.poll() is None:
                    self.state.stops += name == "undisturbed"
                    self.keep()
                    child.send_signal(signal.SIGTERM)
                    child.wait()
            if stopped:
                return False
            if child.returncode:
                raise self._died(child.returncode, name)
        return True

    def judge(self) -> dict[str, Any]:
        """Both runs side by side."""
        from dinox_train.metrics import read_lines
        from dinox_train.rehearsal import same_lines, same_tensors

        runs = self.folder / "disturbed", self.folder / "undisturbed"
        checks = [same_lines(*runs, None), same_tensors(*runs, None)]
        grown = memory_growth([line["host_memory_bytes"] for line in read_lines(runs[1] / "metrics.jsonl")])
        return {
            "passed": all(check.passed for check in checks) and grown["passed"],
            "checks": [asdict(check) for check in checks],
            "memory": grown,
            "hours": self.state.seconds / 3600,
            "kills": len(self.state.kills),
            "updates": self.state.updates,
            "stops_of_the_undisturbed": self.state.stops,
        }

    def keep(self) -> None:
        """Write soak.json."""
        from dinox_io.atomic import write_atomically

        write_atomically(self.folder / "soak.json", json.dumps(asdict(self.state), indent=1).encode() + b"\n")

    @property
    def over(self) -> bool:
        return time.monotonic() >= self._end_s

    def done(self, name: str) -> int:
        """Updates that stand in a run's lines."""
        from dinox_train.metrics import read_lines

        lines = read_lines(self.folder / name / "metrics.jsonl")
        return int(lines[-1]["update"]) if lines else 0

    def _trainer(self, name: str, updates: int) -> "_Trainer":
        given = [f"run.folder={self.folder / name}", f"train.updates={updates}", f"schedule.updates={_ENDLESS}"]
        command = [sys.executable, "-m", "dinox_train", "--config", self.state.config]
        return _Trainer([*command, *self.state.overrides, "device=cpu", *given], self.folder / f"{name}.log")

    def _alive(self, child: "subprocess.Popen[bytes]", name: str) -> None:
        if child.poll() is not None:
            raise self._died(child.returncode, name)

    def _died(self, code: int, name: str) -> SoakFailed:
        from dinox_train.rehearsal import last_words

        words = last_words(self.folder / f"{name}.log")
        return SoakFailed(f"{name}: the trainer ended by itself with exit code {code}: {words}")

    def _say(self, words: str) -> None:
        print(words, flush=True)


class _Trainer:
    """A trainer in a process of its own, that does not outlive this."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._command, self._log = command, log

    def __enter__(self) -> "subprocess.Popen[bytes]":
        with self._log.open("ab") as output:
            # A session of its own: Ctrl-C is for this program, which tells the trainer what it means for it.
            self._child = subprocess.Popen(
                self._command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        return self._child

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.wait()


def memory_growth(figures: Sequence[int]) -> dict[str, Any]:
    """Whether resident memory (bytes, one an update) grows, from a quarter of the run to its end.

    By the median of the eighth after that quarter beside that of the last eighth.
    """
    import statistics

    quarter, eighth = len(figures) // 4, max(len(figures) // 8, 1)
    early = statistics.median(figures[quarter : quarter + eighth])
    late = statistics.median(figures[-eighth:])
    return {
        "passed": late - early <= max(GROWTH_SHARE * early, GROWTH_BYTES),
        "early_bytes": early,
        "late_bytes": late,
        "bytes_per_update": (late - early) / max(len(figures) - quarter - eighth, 1),
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        description="Train for hours, kill the trainer at random, and compare with the same run undisturbed.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--folder", type=Path, default=Path("soak"), help="where it works, and goes on (soak)")
    command.add_argument("--config", default="configs/demo.yaml", help="of both runs (configs/demo.yaml)")
    command.add_argument("--hours", type=_positive, default=2.0, help="of training that is killed, in sum (2)")
    command.add_argument("--kills", type=int, default=20, help="at least so many (20)")
    command.add_argument("--minutes", type=_positive, help="of this session; without: to the end")
    command.add_argument("overrides", nargs="*", metavar="a.b=value", help="as of dinox_train; data.shards is fake")
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    options = parser().parse_args(arguments)
    if options.kills < 1:
        parser().error("--kills must be at least 1")
    end_s = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    options.folder.mkdir(parents=True, exist_ok=True)
    given = ["data.shards=fake", "evaluate.every=1000", "evaluate.windows=32", *options.overrides]
    state = State(overrides=given, config=options.config)
    file = options.folder / "soak.json"
    if file.exists():
        state = State(**json.loads(file.read_bytes()))
        if (state.overrides, state.config) != (given, options.config):
            parser().error(f"{file} is of another configuration: give that one, or another --folder")
    if state.verdict is not None:
        return _told(state.verdict)
    soak = Soak(options.folder, state, end_s)
    soak.keep()
    try:
        between_s = 3600 * options.hours / options.kills
        done = soak.kill_at_random(options.hours, options.kills, between_s)
        if not (done and soak.finish("disturbed") and soak.finish("undisturbed")):
            print(f"not done yet: {state.seconds / 3600:.2f} hours, {len(state.kills)} kills; the same command goes on")
            return EXIT_UNFINISHED
        state.verdict = soak.judge()
        soak.keep()
    except SoakFailed as error:
        print(f"soak: FAIL, {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return EXIT_INTERRUPTED
    return _told(state.verdict)


def _told(verdict: dict[str, Any]) -> int:
    memory = verdict["memory"]
    for check in verdict["checks"]:
        print(f"{'ok  ' if check['passed'] else 'FAIL'} {check['name']}: {check['words']}")
    sizes = f"{memory['early_bytes'] / 2**20:.0f} MiB early, {memory['late_bytes'] / 2**20:.0f} MiB at the end"
    print(f"{'ok  ' if memory['passed'] else 'FAIL'} memory: {sizes}, {memory['bytes_per_update']:.0f} bytes an update")
    words = f"{verdict['hours']:.2f} hours, {verdict['kills']} kills, {verdict['updates']} updates"
    print(f"soak: {'PASS' if verdict['passed'] else 'FAIL'}, {words}")
    return EXIT_PASSED if verdict["passed"] else EXIT_FAILED


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return value


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, and no trainer is left behind
    sys.exit(main())

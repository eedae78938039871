#!/usr/bin/env python3
"""Look at a run's checkpoints from beside it: attention, patch colours, retrieval, drift. `--help` says how."""

import argparse
import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from monitoring.process import step_aside

_EXAMPLES = """\
examples:
  python tools/monitor.py runs/large                                   follow a run until it ends
  python tools/monitor.py runs/large --once                            what is new since the last time, and no more
  python tools/monitor.py runs/large --device cuda:1 --every 300
  python tools/monitor.py /mnt/runs/large --shards /data/shards --output large-seen        from another machine

Only RUN/checkpoints is read (and whether the run still lives), each file verified by its hash. A checkpoint that is
rotated away while it is read is passed over, a damaged one is told and passed over, and one that was looked at is not
looked at again. OUTPUT/step-XXXXXXXX gets figures.json, attention.png and pca.png, and OUTPUT the pictures of the same
slices over time; docs/monitoring.md says what the figures mean. slices.json keeps which slices: of patients that the
run does not train on, where it has such.

The process has the lowest priority for cores and disk, holds one network at a time, waits where memory is short, and is
the first that the kernel ends where it runs out. On the CPU, its default, it leaves the training's GPU alone.

exit code: 0 the run is over, or --once is; 3 the same, and a damaged checkpoint was passed over; 1 the set is damaged,
           or a checkpoint cannot be read; 2 wrong usage, or another set; 130 interrupted, and the same command goes on
"""
EXIT_DONE, EXIT_ERROR, EXIT_USAGE, EXIT_DAMAGED, EXIT_INTERRUPTED = 0, 1, 2, 3, 130


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        description="Look at a run's checkpoints from beside it, without disturbing it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    command.add_argument(
        "--shards", metavar="S", nargs="+", help="where the run's sets lie, in their order (default: where it has them)"
    )
    command.add_argument("--other-set", action="store_true", help="--shards names another set than the run's")
    command.add_argument("--output", metavar="OUTPUT", type=Path, help="where looks are written (default: RUN/monitor)")
    command.add_argument("--device", metavar="D", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    command.add_argument(
        "--threads", metavar="N", type=_count, default=1, help="cores to work on, at most (default: %(default)s)"
    )
    when = command.add_mutually_exclusive_group()
    when.add_argument(
        "--every",
        metavar="SECONDS",
        type=_positive,
        default=60.0,
        help="between two looks for what is new (default: 60)",
    )
    when.add_argument("--once", action="store_true", help="look at what is new, and end")
    command.add_argument(
        "--patience-minutes",
        metavar="M",
        type=_positive,
        default=60.0,
        help="silence of the run after which it is no longer followed (default: %(default)g)",
    )
    group = command.add_argument_group("chosen once for OUTPUT, and kept in its slices.json")
    group.add_argument("--slices", metavar="N", type=_count, help="slices in the pictures (default: 4)")
    group.add_argument(
        "--gallery", metavar="N", type=_gallery, help="slices among which a view is to be found (default: 256)"
    )
    return command


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    command = parser()
    given = command.parse_args(arguments)
    if given.other_set and not given.shards:
        command.error("--other-set needs --shards")
    if not given.run.is_dir():
        command.error(f"{given.run}: no such folder; RUN is what run.folder named")
    step_aside(given.threads)
    try:
        with alone(given.output or given.run / "monitor"):
            return watch(given)
    except KeyboardInterrupt:
        say("interrupted: what is there is whole; the same command goes on")
        return EXIT_INTERRUPTED
    except OSError as error:
        say(f"error: {error.filename or given.run}: {error.strerror or error}")
        return EXIT_ERROR


def watch(given: argparse.Namespace) -> int:
    """Look once, or follow the run to its end; returns the exit code."""
    import torch
    from monitoring.choice import ChoiceError
    from monitoring.following import Follower
    from monitoring.session import begin

    from dinox_io import ShardError
    from dinox_train.checkpoint import CheckpointError
    from dinox_train.config import ConfigError
    from dinox_train.data import LeakError
    from dinox_train.platform import choose_device

    output = given.output or given.run / "monitor"
    named = {name: getattr(given, name) for name in ("run", "shards", "other_set", "slices", "gallery")}
    try:
        device = choose_device(given.device)
    except ValueError as error:
        say(f"error: --device: {error}")
        return EXIT_USAGE
    if device.type == "cpu":
        torch.set_num_threads(given.threads)
    follower = Follower(
        given.run, output, lambda opened: begin(opened, output=output, device=device, say=say, **named), say
    )
    try:
        if given.once:
            if not follower.look() and not follower.damaged and not follower.waiting:
                say("nothing new: each checkpoint was looked at before, or there is none yet")
        else:
            follower.to_the_end(given.every, 60 * given.patience_minutes)
    except (ChoiceError, ConfigError, LeakError) as error:
        say(f"error: {error}")
        return EXIT_USAGE
    except (CheckpointError, ShardError) as error:
        say(f"error: {error}")
        return EXIT_ERROR
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError):
            raise
        say(f"error: {device} has too little memory beside the training: --device cpu leaves it alone ({error})")
        return EXIT_ERROR
    if follower.waiting:
        say(f"error: {follower.waiting}")
        return EXIT_ERROR
    return EXIT_DAMAGED if follower.damaged else EXIT_DONE


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """Hold OUTPUT for this process. Raises OSError where another monitor has it."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(error.errno, "another monitor writes here", str(output)) from None
        yield


def say(line: str) -> None:
    """To the terminal, or a log, at once; errors to standard error."""
    print(line, file=sys.stderr if line.startswith("error:") else sys.stdout, flush=True)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def _gallery(text: str) -> int:
    if not text.isdecimal() or int(text) < 8 or int(text) % 4:
        raise argparse.ArgumentTypeError(f"{text!r} must be a multiple of 4, of at least 8: slices stand in fours")
    return int(text)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be more than 0, not {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())

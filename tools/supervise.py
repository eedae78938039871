"""Watch a training run from outside: end it where it hangs, start it again where that can help. `--help` says how."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from supervision.command import run_folder
from supervision.supervisor import EXIT_ERROR, FolderBusy, Supervisor
from supervision.voice import say
from supervision.watch import Settings

_EXAMPLES = """\
examples:
  python tools/supervise.py -- python -m dinox_train --config configs/vit_l.yaml run.folder=runs/large
  python tools/supervise.py --hang-minutes 30 --folder runs/large -- ./train.sh

COMMAND is the trainer, or a script that ends with `exec python -m dinox_train …`: signals are for the process that is
started, and what that leaves behind when it ends is killed.

The trainer lives as long as RUN/heartbeat changes. One that is silent for --hang-minutes is told to end (SIGTERM, after
its stacks if it can write them) and killed --grace-minutes later. Exit codes 1 and 5, hangs and deaths by a signal are
followed by another start, which resumes at the newest checkpoint; 0, 2, 4, and a trainer that somebody else told to
stop, are not. The same error at the same update is not tried a third time. RUN/restarts.jsonl says when and why,
RUN/stderr.log keeps what the trainer wrote to its standard error.

SIGTERM, SIGINT and a closed terminal are passed on as SIGTERM or SIGINT: the trainer writes a checkpoint and ends. A
second one ends it at once, a third one kills it. docs/supervise.md has a unit for systemd.

exit code: that of the trainer's last end, if it is not started again (128 + number for a signal, 5 for a hang);
           1 also where another supervisor or trainer has the run folder; 2 wrong usage;
           137 where it had to be killed, or could not be, after a signal to this program
"""


def parser() -> argparse.ArgumentParser:
    """The command line before `--`."""
    command = argparse.ArgumentParser(
        description="Watch a training run from outside, end it where it hangs, start it again where that can help.",
        usage="%(prog)s [options] -- COMMAND ...",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "--folder", metavar="RUN", type=Path, help="the run folder, where COMMAND does not say it (run.folder)"
    )
    command.add_argument(
        "--hang-minutes",
        metavar="M",
        type=_positive,
        default=15.0,
        help="silence that is a hang; more than an update takes and than data.timeout_s (default: %(default)g)",
    )
    command.add_argument(
        "--slow-minutes",
        metavar="M",
        type=_positive,
        default=60.0,
        help="the same before and in the first updates of a process, in updates that evaluate, save or begin a stage, "
        "and at the end (default: %(default)g)",
    )
    command.add_argument(
        "--grace-minutes",
        metavar="M",
        type=_positive,
        default=5.0,
        help="from SIGTERM to SIGKILL for one that hangs (default: %(default)g)",
    )
    command.add_argument(
        "--backoff-seconds",
        metavar="S",
        type=_positive,
        default=15.0,
        help="wait before a start; doubled for each end in a row without progress, at most half an hour "
        "(default: %(default)g)",
    )
    command.add_argument(
        "--max-restarts",
        metavar="N",
        type=_count,
        default=20,
        help="starts within 24 hours after which it is left to you (default: %(default)s)",
    )
    command.add_argument(
        "--poll-seconds", metavar="S", type=_positive, default=1.0, help="time between looks (default: %(default)g)"
    )
    return command


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given, command, folder = parse(sys.argv[1:] if arguments is None else arguments)
    settings = Settings(
        hang_s=60 * given.hang_minutes,
        slow_s=60 * given.slow_minutes,
        grace_s=60 * given.grace_minutes,
        first_wait_s=given.backoff_seconds,
        max_restarts=given.max_restarts,
        poll_s=given.poll_seconds,
    )
    try:
        return Supervisor(command, folder, settings).run()
    except (FolderBusy, ValueError) as error:
        say(f"error: {error}")
    except OSError as error:
        say(f"error: {error.filename or folder}: {error.strerror}")
    return EXIT_ERROR


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str], Path]:
    """The options, the trainer's command, and its run folder. Ends the process with code 2 for wrong usage."""
    command = parser()
    place = arguments.index("--") if "--" in arguments else len(arguments)
    given, words = command.parse_args(arguments[:place]), arguments[place + 1 :]
    if not words:
        command.error("give the trainer's command behind --, e.g. -- python -m dinox_train --config configs/vit_s.yaml")
    if "--plan" in words:
        command.error("--plan makes no run to watch: call the trainer itself")
    named, folder = run_folder(words), given.folder
    if folder is None:
        folder = named
    elif named is not None and folder.resolve() != named.resolve():
        command.error(f"--folder is {folder}, and the command's run.folder is {named}: leave --folder away")
    if folder is None:
        command.error("the command does not say its run folder (run.folder, here or in a --config): give --folder RUN")
    return given, words, folder


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be more than 0, not {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, not {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())

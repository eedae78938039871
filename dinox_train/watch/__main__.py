"""`python -m dinox_train.watch`: what can be read of this machine, and what a reading costs."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinox_train.platform.device import choose_device
from dinox_train.watch.concerns import PATIENCE, Concerns
from dinox_train.watch.machine import FIGURES, Machine, host_bytes
from dinox_train.watch.system_file import SystemFile

DESCRIPTION = """Read of this machine what a run would record of it (RUN/system.jsonl), and time that.

A reading is done as a run does it: all figures, the rules for events, a line in a file. Its CPU time over the interval
`watch.every_s` is the share of one core that the watch takes; a run's own share is said at its end (train.log)."""

EXAMPLES = """examples:
  python -m dinox_train.watch                                what is readable here, and the cost of a reading
  python -m dinox_train.watch --device cpu --readings 1000 --json

exit codes: 0 done · 2 usage, or no such device"""

EXIT_DONE, EXIT_USAGE = 0, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dinox_train.watch",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--readings", type=int, default=200, metavar="N", help="to time (default: %(default)s)")
    parser.add_argument("--every", type=float, default=10.0, metavar="S", help="watch.every_s (default: %(default)g)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    if options.readings <= PATIENCE or options.every <= 0:
        parser.error(f"--readings must be more than {PATIENCE}, --every more than 0")
    try:
        device = choose_device(options.device)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    with tempfile.TemporaryDirectory() as folder:
        found = measured(Machine(device, Path(folder)), Path(folder), options.readings, options.every)
    print(json.dumps(found, indent=1) if options.json else "\n".join(_in_words(found)))
    return EXIT_DONE


def measured(machine: Machine, folder: Path, readings: int, every_s: float) -> dict[str, Any]:
    """A reading, and what one takes: medians of CPU and of wall time, seconds, and the share of a core at `every_s`."""
    concerns, file = Concerns(host_bytes(), shared=False), SystemFile(folder / "system.jsonl")
    cpu_s, wall_s, reading = [], [], {}
    for index in range(readings):
        begin = time.thread_time(), time.perf_counter()
        reading = {"elapsed_s": index * every_s, **machine.read()}
        concerns.see(reading, None)
        file.write(reading)
        cpu_s.append(time.thread_time() - begin[0])
        wall_s.append(time.perf_counter() - begin[1])
        time.sleep(0.005)  # what is a share of time needs some
    file.close()
    cpu = statistics.median(cpu_s)
    return {
        "reading": {name: reading[name] for name in FIGURES},
        "readings": readings,
        "cpu_s": cpu,
        "wall_s": statistics.median(wall_s),
        "every_s": every_s,
        "share_of_a_core": cpu / every_s,
    }


def _in_words(found: dict[str, Any]) -> list[str]:
    lines = [f"{name:28} {'not readable here' if value is None else value}" for name, value in found["reading"].items()]
    return [
        *lines,
        f"a reading: {1e3 * found['cpu_s']:.2f} ms of CPU time, {1e3 * found['wall_s']:.2f} ms in all (medians of "
        f"{found['readings']})",
        f"every {found['every_s']:g} s: {found['share_of_a_core']:.4%} of one core",
    ]


if __name__ == "__main__":
    sys.exit(main())

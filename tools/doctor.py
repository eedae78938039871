"""Will this machine survive two weeks, and run at its speed? One page: what was seen, what is wrong, what mends it.
`--help` says how.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from checkup.machine import Machine

_EXAMPLES = """\
examples:
  python tools/doctor.py                                          the machine, in some seconds
  python tools/doctor.py --output runs                            and the disk that runs will be on
  python tools/doctor.py --config configs/vit_l.yaml --config configs/hardware/rtx_4090.yaml --output runs --shards S
  python tools/doctor.py --json > doctor.json

Attention, matrix products and copies are tried on the device, and kept for the runs to come, as a run would do it. On
--output's disk a file of at most 256 MiB is written, read and deleted. Nothing is changed. The JSON names no host, user
or path, and can be handed on. docs/doctor.md explains each check.

exit code: 0 nothing failed (there may be warnings); 1 something failed; 2 wrong usage
"""


def main(arguments: list[str] | None = None) -> int:
    """Exit code of the command."""
    options = parse(arguments)
    begin_s = time.monotonic()
    # What follows imports torch: after the usage is known to be right.
    from checkup.checks import examine
    from checkup.finding import worst
    from checkup.page import as_json, page

    from dinox_io.errors import ShardError
    from dinox_train.config import ConfigError

    try:
        machine = read(options)
    except (ConfigError, ShardError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    findings, unread = examine(machine)
    seconds = time.monotonic() - begin_s
    if options.json:
        print(json.dumps(as_json(machine, findings, unread, seconds), indent=1))
    else:
        print("\n".join(page(machine, findings, unread, seconds)))
    return 1 if worst(findings) == "fail" else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="One page about this machine: will it survive two weeks of training, and run at its speed?",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the page")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where runs will be: its disk is tried")
    parser.add_argument("--shards", metavar="S", help="a set of shards: open files, and what the disk can feed")
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="of a run: its own products and attention are tried, its checkpoints counted; later files overlay",
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="a single setting, with --config")
    options = parser.parse_intermixed_args(arguments)
    if options.overrides and not options.config:
        parser.error(f"{options.overrides[0]}: settings go with --config")
    return options


def read(options: argparse.Namespace) -> Machine:
    """All facts. Raises ConfigError for a configuration that is none, ShardError where there is no set."""
    import torch
    from checkup import device_trials, disk_trial, wanted
    from checkup.gpu_readings import read_gpus
    from checkup.machine import Machine
    from checkup.readings import read_host, read_system
    from checkup.software_readings import read_devices, read_software

    from dinox_train.config import ConfigError
    from dinox_train.platform import choose_device
    from dinox_train.platform.device import idle_accelerator
    from dinox_train.platform.facts import find
    from dinox_train.platform.switches import settle

    config = wanted.config_of(options.config, options.overrides) if options.config else None
    asked = wanted.wanted_of(config, options.shards)
    variables = dict(os.environ)  # as the user has set them
    try:
        device = choose_device("auto" if config is None else config.device)
    except ValueError as error:
        if config is None or config.device == "auto":
            raise ConfigError(str(error)) from None
        device = torch.device("cpu")  # a GPU that torch does not see: the checks say why
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    facts = find(device)
    switches = settle(facts, os.environ)  # as at the start of a run, before the device does anything
    work = device_trials.usual_work(device) if config is None else wanted.work_of(config)
    return Machine(
        system=read_system(),
        host=read_host(),
        gpus=read_gpus(),
        software=read_software(device, variables, tuple(switches)),
        devices=read_devices(),
        device=str(device),
        idle=idle_accelerator(device),
        trials=device_trials.try_device(device, facts, work),
        disk=None if options.output is None else disk_trial.try_disk(options.output),
        wanted=asked,
    )


if __name__ == "__main__":
    sys.exit(main())

"""`python -m dinox_model COMMAND …`: hands over to the command's file in `commands/`."""

from __future__ import annotations

import argparse
import sys

from dinox_model.commands import export, summarize, validate

COMMANDS = (validate, summarize, export)


def main(arguments: list[str] | None = None) -> int:
    """Exit code of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m dinox_model",
        description="Networks in folders. Each command has a --help with examples and exit codes.",
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_to(subparsers)
    options = parser.parse_args(arguments)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())

"""The options that pack_shards.py and import_png.py share.

Invariant: an option has the same name, default and meaning in both.
"""

import argparse
import re
from pathlib import Path
from typing import Any

from dinox_io.about import read_about
from dinox_io.pipeline import default_threads

_DECIMAL = {f"{prefix}B": 1000**power for power, prefix in enumerate(("", "K", "M", "G", "T"))}
_BINARY = {f"{prefix}IB": 1024**power for power, prefix in enumerate(("K", "M", "G", "T"), start=1)}
_UNITS = {"": 1, **_DECIMAL, **_BINARY}


def size_bytes(text: str) -> int:
    """`512MiB`, `1.5GB`, `1000000` -> bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if not match or match.group(2).upper() not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write it like 512MiB or 2GB")
    return int(float(match.group(1)) * _UNITS[match.group(2).upper()])


def folder(text: str) -> Path:
    """The folder of --output: an empty text (an unset variable, mostly) does not mean the current directory."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty: name a folder (. is the current one)")
    return Path(text)


def about(text: str) -> dict[str, Any]:
    """The contents of a file for --about."""
    try:
        return read_about(text)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_common(command: argparse.ArgumentParser) -> None:
    """Where to, with what, and what the set says of itself."""
    command.add_argument(
        "--output", metavar="OUT", type=folder, required=True, help="folder of the set, new or to add to"
    )
    cores = default_threads()
    command.add_argument(
        "--workers", metavar="N", type=int, default=cores, help=f"processes (default: {cores}, all cores)"
    )
    command.add_argument(
        "--shard-size", metavar="SIZE", type=size_bytes, default="512MiB",
        help="size at which a new shard is begun (default: 512MiB); a larger volume stands alone; of an interrupted "
        "run the finished shards are kept, so smaller ones keep more of it",
    )  # fmt: skip
    command.add_argument(
        "--min-slices", metavar="N", type=int, default=3, help="reject series with fewer slices (default: 3)"
    )
    command.add_argument(
        "--about", metavar="FILE.yaml", type=about,
        help="what the data set is: name, licence, citation (see docs/data.md)",
    )  # fmt: skip


def add_split(command: argparse.ArgumentParser) -> None:
    """Which side of the split a patient is on, and the key that it depends on."""
    group = command.add_argument_group("split, by patient; a set keeps the one that it was begun with")
    group.add_argument(
        "--val-fraction", metavar="F", type=float, default=0.1, help="share of patients to validate on (default: 0.1)"
    )
    group.add_argument(
        "--test-fraction", metavar="F", type=float, default=0.0, help="share that training never opens (default: 0)"
    )
    group.add_argument(
        "--split-seed", metavar="N", type=int, default=0, help="another number, another split (default: 0)"
    )
    group.add_argument(
        "--key-file", metavar="K", type=Path,
        help="secret of at least 16 bytes that pseudonyms and the split are made with; keep it to reproduce them, and "
        "to have a patient on the same side of several sets (default: a random key in OUT/private/key)",
    )  # fmt: skip


def add_split_gaps(group: argparse._ActionsContainer) -> None:  # pyright: ignore[reportPrivateUsage]
    """The choice about missing slices."""
    group.add_argument(
        "--split-gaps", action="store_true", help="keep the contiguous runs of series with missing slices"
    )

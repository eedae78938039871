"""What a set was made with: versions of Python and of the packages that its bytes depend on.

Invariant: names and versions of public packages, nothing of the machine; the same environment gives the same object.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib import metadata

import zstandard

from dinox_io.shard import PACKER

# Readers and decoders by their distribution's name; those that are not installed are left out.
_READERS = ("numpy", "zstandard", "xxhash", "pydicom", "nibabel")
_DECODERS = ("python-gdcm", "pylibjpeg", "pylibjpeg-openjpeg", "pyjpegls")


@cache
def _versions() -> tuple[tuple[str, str], ...]:
    found = {
        "dinox": PACKER.split()[-1],
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "zstd": ".".join(map(str, zstandard.ZSTD_VERSION)),
    }
    for name in (*_READERS, *_DECODERS):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return tuple(sorted(found.items()))


def tool_versions() -> dict[str, str]:
    """{name: version}: dinox, python (major.minor), zstd (the library), and the packages that are installed."""
    return dict(_versions())

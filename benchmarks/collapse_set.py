"""A made-up set of shards without anatomy: each volume is the same at every height, but for what its scanner left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from dinox_io.manifest import build_manifest, commit_set
from dinox_io.shard import ShardWriter, encode_volume
from dinox_io.volume import Volume
from dinox_train.fake import fake_volume

SCANNERS = {"STANDARD": 0, "BONE": 250}
"""Kernel, and the HU by which it reads too high."""
VOLUMES = 12


def write_scanner_set(folder: Path, volume: Callable[[int], Volume] | None = None) -> Path:
    """Write the set into `folder`, unless one lies there already; return `folder`. Every fourth volume is of `val`."""
    if (folder / "manifest.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    volumes = [(volume or scanned)(number) for number in range(VOLUMES)]
    writer = ShardWriter(folder / "shard-000000.tar", config_digest="scanners")
    for one in volumes:
        writer.add(encode_volume(one))
    manifest = build_manifest(
        [writer.finish()],
        sides={one.id: "val" if number % 4 == 3 else "train" for number, one in enumerate(volumes)},
        options={},
        rejected_by_code={},
        config_digest="scanners",
        leaks=[],
        packer="benchmarks/collapse_set.py",
        sources={"files": 0, "bytes": 0},
        previous=None,
    )
    commit_set(folder, manifest)
    return folder


def scanned(number: int) -> Volume:
    """Volume `number`: one slice of a made-up body, again and again under fresh noise, by one scanner or the other."""
    kernel = list(SCANNERS)[number % len(SCANNERS)]
    made = fake_volume(number)
    noise = np.random.Generator(np.random.Philox(key=1000 + number)).standard_normal(made.hu.shape, dtype=np.float32)
    middle = made.hu[len(made.hu) // 2].astype(np.float32) + SCANNERS[kernel]
    return replace(made, hu=np.rint(middle[None] + 20 * noise).astype(np.int16), facts={"kernel": kernel})

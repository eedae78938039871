"""A made-up shard set, for people who try a machine before they have data: `data.shards: fake`.

It is a real set on disk, so that everything between file and loss runs as it will with CT: ellipses of soft tissue and
lung in air, with noise of a reconstruction kernel's texture. Nothing can be learnt from it about anatomy.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dinox_io.manifest import build_manifest, commit_set
from dinox_io.shard import ShardWriter, encode_volume
from dinox_io.volume import Volume

SIDES = {number: "val" if number % 4 == 3 else "train" for number in range(12)}
SHAPE = (24, 256, 256)
SPACING_MM = (2.0, 1.4, 1.4)
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


FAKE_SET = "fake-shards"
"""Its folder in a run's."""


def write_fake_set(folder: Path, sides: Mapping[int, str] = SIDES) -> Path:
    """Write the set into `folder`, unless a complete one lies there already; return `folder`.

    sides: number of each volume to its side of the split; every volume is a patient of its own.
    """
    if (folder / "manifest.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    volumes = {number: fake_volume(number) for number in sides}
    writer = ShardWriter(folder / "shard-000000.tar", config_digest="fake")
    for volume in volumes.values():
        writer.add(encode_volume(volume))
    manifest = build_manifest(
        [writer.finish()],
        sides={volumes[number].id: side for number, side in sides.items()},
        options={},
        rejected_by_code={},
        config_digest="fake",
        leaks=[],
        packer="dinox_train.fake",
        sources={"files": 0, "bytes": 0},
        previous=None,
    )
    commit_set(folder, manifest)
    return folder


def fake_volume(number: int) -> Volume:
    """Volume `number`: int16 HU (24, 256, 256), two lungs in a body, both changing with height and from volume to
    volume.
    """
    random = np.random.Generator(np.random.Philox(key=number))
    grow = 0.8 + 0.4 * random.random(3)
    z, y, x = (np.linspace(-1, 1, size, dtype=np.float32) for size in SHAPE)
    z, y, x = z[:, None, None], y[None, :, None], x[None, None, :]
    hu = np.full(SHAPE, -1000.0, dtype=np.float32)
    hu[_ellipse(z * 0, y / 0.62, x / 0.85)] = 40.0
    for side in (-1, 1):
        lung = _ellipse((z - 0.2) / 0.9, y / (0.42 * grow[0]), (x + side * 0.38) / (0.28 * grow[1]))
        hu[lung] = -840.0
    spine = _ellipse(z * 0, (y - 0.42) / (0.1 * grow[2]), x / 0.09)
    hu[spine] = 400.0
    noise = random.standard_normal(SHAPE, dtype=np.float32) * 18.0
    # Neighbouring pixels share noise, as a reconstruction kernel of about a pixel leaves it; 2 / 4 keeps its deviation.
    noise = 2 * (noise + np.roll(noise, 1, 1) + np.roll(noise, 1, 2) + np.roll(noise, (1, 1), (1, 2))) / 4
    name = f"{number:032x}"
    return Volume(
        id=name,
        series=name,
        patient=name,
        hu=np.rint(hu + noise).astype(np.int16),
        spacing_mm=SPACING_MM,
        z_positions_mm=tuple(SPACING_MM[0] * index for index in range(SHAPE[0])),
        orientation=AXIAL,
        facts={},
    )


def _ellipse(z: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    return z**2 + y**2 + x**2 < 1.0

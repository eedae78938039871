"""The volumes that loaders are measured on: real slices, or the phantom's, enough of them, and no two alike.

A volume is the slices of one case taken forth and back until it is as long as a scan. The first time that a slice is
used it is as it was; each further time the lowest bit of every voxel is flipped or not, as a bit of a Philox stream
keyed by the number of the use says (that is noise of at most 1 HU), but for voxels at the slice's minimum: that is the
padding around the field of view, which holds no noise in a scan either.

Invariant: a folder that exists is whole (it is renamed when done), and what is in it follows from cases and size alone.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import loader_meters
import numpy as np
from cases import Case

from dinox_io.codec import PRESETS, SliceEncoder
from dinox_io.hounsfield import volume_digest
from dinox_io.manifest import build_manifest, commit_set
from dinox_io.shard import ShardWriter, encode_volume
from dinox_io.volume import Volume

SHARD_BYTES = 256 << 20
VERSION = 1
"""Of what is written here: another one is another folder."""


@dataclass(frozen=True)
class LoaderData:
    """A folder with the arrays `npy/NNNN.npy`, our sets `small` and `fast`, and places for the peers' stores."""

    folder: Path
    facts: dict[str, Any]
    """volumes, slices, bytes, what noise costs: goes into the result."""


def prepare(
    found: Sequence[Case], scratch: Path, *, size_bytes: int, slices: int, tell: Callable[[str], None]
) -> LoaderData:
    """Write what is not there yet: at least `size_bytes` of int16 in volumes of `slices` slices."""
    names = json.dumps([VERSION, size_bytes, slices, [volume_digest(case.volume.hu) for case in found]])
    folder = scratch / f"dinox-loader-{hashlib.sha256(names.encode()).hexdigest()[:12]}"
    if not (folder / "facts.json").exists():
        tell(f"writing {size_bytes / 1e6:.0f} MB of volumes")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _write(found, folder, size_bytes, slices)
    return LoaderData(folder, json.loads((folder / "facts.json").read_text("utf-8")))


def _write(found: Sequence[Case], folder: Path, size_bytes: int, slices: int) -> None:
    (folder / "npy").mkdir()
    shapes, own = [], _Sizes()
    with _SetWriter(folder / "small", "small") as small, _SetWriter(folder / "fast", "fast") as fast:
        for number, hu in enumerate(volumes(found, size_bytes, slices, own.seen)):
            np.save(folder / "npy" / f"{number:04d}.npy", hu, allow_pickle=False)
            shapes.append(list(hu.shape))
            volume = _volume(number, hu)
            small.add(volume)
            fast.add(volume)
    raw = 2 * sum(int(np.prod(shape)) for shape in shapes)
    facts = {
        "volumes": len(shapes),
        "slices": sum(shape[0] for shape in shapes),
        "raw_bytes": raw,
        "ratio_as_they_were": own.ratio("first"),
        "ratio_with_noise": own.ratio("again"),
        "noise": "lowest bit flipped by a keyed bit where a slice is used again, padding left alone",
        **{
            f"{preset}_bytes": sum(path.stat().st_size for path in loader_meters.files_under(folder / preset))
            for preset in PRESETS
        },
    }
    (folder / "shapes.json").write_text(json.dumps(shapes), encoding="utf-8")
    loader_meters.write_out(loader_meters.files_under(folder))
    temporary = folder / "facts.tmp"
    temporary.write_text(json.dumps(facts), encoding="utf-8")
    temporary.replace(folder / "facts.json")


class _Sizes:
    """What slices take with the preset small, as they were and with noise (the first 200 of each)."""

    def __init__(self) -> None:
        self._encoder = SliceEncoder(*PRESETS["small"])
        self._raw: Counter[str] = Counter()
        self._stored: Counter[str] = Counter()
        self._count: Counter[str] = Counter()

    def seen(self, one: np.ndarray, again: bool) -> None:
        name = "again" if again else "first"
        if self._count[name] < 200:
            self._count[name] += 1
            self._raw[name] += one.nbytes
            self._stored[name] += len(self._encoder.encode(one).data)

    def ratio(self, name: str) -> float | None:
        return self._raw[name] / self._stored[name] if self._stored[name] else None


def volumes(
    found: Sequence[Case], size_bytes: int, slices: int, seen: Callable[[np.ndarray, bool], None] = lambda *_: None
) -> Iterator[np.ndarray]:
    """int16 (slices, y, x), case after case and round again, until they are `size_bytes`; see above."""
    used: Counter[tuple[int, int]] = Counter()
    uses = given = number = 0
    while given < size_bytes:
        case = number % len(found)
        source = found[case].volume.hu
        back_and_forth = [*range(len(source)), *range(len(source) - 2, 0, -1)]
        out = np.empty((slices, *source.shape[1:]), np.int16)
        for row in range(slices):
            z = back_and_forth[row % len(back_and_forth)]
            again = used[case, z] > 0
            out[row] = _noisy(source[z], uses) if again else source[z]
            seen(out[row], again)
            used[case, z] += 1
            uses += 1
        yield out
        given += out.nbytes
        number += 1


def _noisy(one: np.ndarray, use: int) -> np.ndarray:
    bits = np.random.Generator(np.random.Philox(key=use)).bytes(-(-one.size // 8))
    flip = np.unpackbits(np.frombuffer(bits, np.uint8), count=one.size).reshape(one.shape).astype(np.int16)
    flip[one == one.min()] = 0
    return one ^ flip


def _volume(number: int, hu: np.ndarray) -> Volume:
    pseudonym = f"{number:032x}"
    return Volume(
        id=pseudonym,
        series=pseudonym,
        patient=pseudonym,
        hu=hu,
        spacing_mm=(1.0, 1.0, 1.0),
        z_positions_mm=tuple(float(z) for z in range(len(hu))),
        orientation=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
    )


class _SetWriter:
    """One of our sets, volume after volume; a context manager, whose end commits it."""

    def __init__(self, folder: Path, preset: str) -> None:
        folder.mkdir()
        self._folder, self._encoding = folder, PRESETS[preset]
        self._shard: ShardWriter | None = None
        self._summaries: list[Any] = []
        self._ids: list[str] = []

    def add(self, volume: Volume) -> None:
        if self._shard is None:
            name = f"shard-{len(self._summaries):06d}.tar"
            self._shard = ShardWriter(self._folder / name, config_digest="0" * 64)
        self._shard.add(encode_volume(volume, filter=self._encoding[0], level=self._encoding[1]))
        self._ids.append(volume.id)
        if self._shard.size_bytes >= SHARD_BYTES:
            self._finish()

    def _finish(self) -> None:
        if self._shard is not None:
            self._summaries.append(self._shard.finish())
            self._shard = None

    def __enter__(self) -> _SetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            if self._shard is not None:
                self._shard.abort()
            return
        self._finish()
        manifest = build_manifest(
            self._summaries,
            sides=dict.fromkeys(self._ids, "train"),
            options={"filter": self._encoding[0], "level": self._encoding[1]},
            rejected_by_code={},
            config_digest="0" * 64,
            leaks=[],
            packer="benchmarks",
            sources={},
            previous=None,
        )
        commit_set(self._folder, manifest)

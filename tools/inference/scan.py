"""The slices of one volume, wherever they lie: in a set of shards, or in memory as they were read from DICOM or NIfTI.

Invariant: windows are those that training cuts: around each centre, from the volume itself, with what training saw
beyond its ends. Every slice of a volume is the centre of one.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from dinox_io import ShardSet, VolumeRecord
from dinox_io.volume import Volume
from dinox_io.window import in_slices, window_slices

EDGE = "clamp"
"""Of a network that nobody says this of, or that saw no window beyond a volume's ends (`data.edge: error`): the first
and the last slices get features all the same, from windows that repeat them."""


@dataclass(frozen=True, kw_only=True)
class Scan:
    """One volume."""

    id: str
    """Its pseudonym."""
    shape: tuple[int, int, int]
    """z, y, x."""
    spacing_mm: tuple[float, float, float]
    """z, y, x."""
    z_positions_mm: np.ndarray
    """float64 (z,), ascending."""
    read: Callable[[np.ndarray], np.ndarray]
    """Slice numbers (s,), in any order, to int16 HU (s, y, x). May be called from many threads at once."""
    facts: dict[str, str] = field(default_factory=dict)
    """What else is known, to be written beside its features."""

    @property
    def size_bytes(self) -> int:
        """Of its HU."""
        return 2 * self.shape[0] * self.shape[1] * self.shape[2]

    def step(self, step: int, step_mm: float | None) -> int:
        """How far apart the slices of its windows are, in slices."""
        return step if step_mm is None else int(in_slices(step_mm, np.array([self.spacing_mm[0]]))[0])

    def windows(self, centers: np.ndarray, depth: int, step: int, edge: str | None) -> np.ndarray:
        """Centres (b,) to int16 HU (b, depth, y, x). edge: as the network's training had it; None: see `EDGE`."""
        slices = np.stack([window_slices(int(one), depth, step, self.shape[0], edge or EDGE) for one in centers])
        return self.read(slices.reshape(-1)).reshape(*slices.shape, *self.shape[1:])


def scans_of_set(shards: ShardSet, split: str | None) -> list[Scan]:
    """The volumes of a side (None: of all). ValueError if it has none."""
    decoders = threading.local()

    def scan(record: VolumeRecord) -> Scan:
        def read(slices: np.ndarray) -> np.ndarray:
            if not hasattr(decoders, "own"):
                decoders.own = shards.new_decoder()
            hu = np.empty((len(slices), *record.shape[1:]), np.int16)
            shards.read_frames_into(record.index, slices, hu, decoders.own)
            return hu

        return Scan(
            id=record.id,
            shape=record.shape,
            spacing_mm=record.spacing_mm,
            z_positions_mm=record.z_positions_mm,
            read=read,
            facts={"patient": record.patient, "split": record.split},
        )

    return [scan(shards.volumes[number]) for number in shards.volumes_of(split).tolist()]


def scan_of_volume(volume: Volume) -> Scan:
    """A volume that lies in memory."""
    z, y, x = volume.hu.shape
    return Scan(
        id=volume.id,
        shape=(z, y, x),
        spacing_mm=volume.spacing_mm,
        z_positions_mm=np.array(volume.z_positions_mm),
        read=lambda slices: volume.hu[slices],
        facts={"patient": volume.patient},
    )

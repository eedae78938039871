"""Labels of slices for a supervised objective: whether a mark of a reader touches the slice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dinox_io import VolumeRecord
from dinox_io.labels import LabelError, label_path, read_labels
from dinox_train.config import ConfigError

TOLERANCE_MM = 1e-3
"""Positions are written to a micrometre."""


class SliceLabels:
    """For each set, volume and slice: 1.0 where a mark's box holds the slice, else 0.0."""

    def __init__(
        self,
        name: str,
        sets: Sequence[tuple[str, Sequence[VolumeRecord]]],
        key: str = "objective.classification.labels",
    ) -> None:
        """sets: the folder of each set and its volumes. A set whose labels have no mark in a volume says 0 there.

        key: of the configuration, for messages. Raises ConfigError where a set has no labels of that name, or they
        cannot be read.
        """
        self._marked = [self._of_set(name, folder, volumes, key) for folder, volumes in sets]

    def of(self, sets: np.ndarray, volumes: np.ndarray, centers: np.ndarray) -> np.ndarray:
        """float32 (b,) of windows: number of the set, index of the volume in it, middle slice; int (b,) each."""
        places = zip(sets.tolist(), volumes.tolist(), centers.tolist(), strict=True)
        return np.array([self._marked[number][volume][center] for number, volume, center in places], np.float32)

    @staticmethod
    def _of_set(name: str, folder: str, volumes: Sequence[VolumeRecord], key: str) -> list[np.ndarray]:
        """bool (z,) for each volume."""
        try:
            marks = read_labels(label_path(Path(folder), name))
        except (OSError, LabelError) as error:
            raise ConfigError(f"{key}: {folder} has no labels {name!r}: {error}") from None
        spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for mark in marks:
            spans[mark.series].append((mark.box[0] - TOLERANCE_MM, mark.box[3] + TOLERANCE_MM))
        found = []
        for volume in volumes:
            z_mm = np.asarray(volume.z_positions_mm)
            inside = [(z_mm >= low) & (z_mm <= high) for low, high in spans[volume.series]]
            found.append(np.any(inside, axis=0) if inside else np.zeros(len(z_mm), bool))
        return found

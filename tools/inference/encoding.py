"""The work itself: windows of scans through a network into files, or random windows to measure it.

Invariant: memory is bounded by a few batches and, of DICOM and NIfTI, a few volumes, however many there are.
"""

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from dinox_io.atomic import write_atomically
from inference.feature_file import ArraySpec, FeatureFile
from inference.meter import Meter
from inference.network import Network
from inference.scan import EDGE, Scan

PARTS = ("cls", "patches")
ABOUT = "infer.json"
READING_THREADS = 4
"""Enough to decode ahead of most networks; memory holds one batch more than threads."""
WARM_UP = 3
"""Batches before those that `measure` counts."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is wanted of each volume."""

    parts: tuple[str, ...]
    every: int
    step: int
    step_mm: float | None
    batch_size: int
    format: str

    def about(self, network: Network) -> dict[str, Any]:
        """All that the numbers in DIR depend on beside the volumes."""
        return {
            "network": network.digest,
            "dtype": network.dtype,
            "parts": list(self.parts),
            "every": self.every,
            "step": self.step,
            "step_mm": self.step_mm,
            "edge": network.edge or EDGE,
            "format": self.format,
        }


@dataclass(frozen=True)
class _Batch:
    start: int
    """Of the volume's windows, the first one of this batch."""
    of: int
    """Windows of the volume."""
    arrays: dict[str, np.ndarray]
    grid: tuple[int, int]


class Writer:
    """Features of scans in files of DIR, one a volume; those that a run before wrote are left as they are."""

    def __init__(self, folder: Path, request: Request, network: Network, meter: Meter) -> None:
        """Raises ValueError if DIR holds features that were made otherwise."""
        self.folder, self.request, self.network, self.meter = folder, request, network, meter
        self.written = self.kept = self.unsuited = 0
        about, path = request.about(network), folder / ABOUT
        if path.exists():
            before = json.loads(path.read_bytes())
            if differing := [name for name in about if before.get(name) != about[name]]:
                raise ValueError(
                    f"{folder} holds features made with another {', '.join(differing)}: give another --output"
                )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, (json.dumps(about, indent=1) + "\n").encode())

    def write(self, scan: Scan) -> None:
        """Encode and write one volume, unless its file is there, or its size is not the package's (this is printed)."""
        path = self.folder / f"{scan.id}.{self.request.format}"
        if path.exists():
            self.kept += 1
            return
        if not self.network.takes(scan.shape[1:]):
            self.unsuited += 1
            size = " x ".join(map(str, self.network.size or ()))
            print(f"volume {scan.id}: {scan.shape[1]} x {scan.shape[2]} pixels, and the package takes {size}: left out")
            return
        batches = self._encoded(scan, np.arange(0, scan.shape[0], self.request.every))
        first = next(batches)
        with FeatureFile(path, _specs(first.arrays, first.of), self._texts(scan)) as file:
            for batch in chain([first], batches):
                for name, values in batch.arrays.items():
                    file.put(name, batch.start, values)
            file.put("grid", 0, np.array(first.grid))
        self.written += 1

    def _encoded(self, scan: Scan, centers: np.ndarray) -> Iterator[_Batch]:
        request, depth = self.request, self.network.depth
        step = scan.step(request.step, request.step_mm)
        starts = range(0, len(centers), request.batch_size)
        chunks = [centers[start : start + request.batch_size] for start in starts]
        read = ahead(lambda chunk: scan.windows(chunk, depth, step, self.network.edge), chunks)
        for start, chunk, hu in zip(starts, chunks, read, strict=True):
            features = timed(self.network, hu, np.tile(scan.spacing_mm, (len(hu), 1)), request.parts, self.meter)
            arrays = {**features.arrays, "slice": chunk, "z_mm": scan.z_positions_mm[chunk]}
            yield _Batch(start, len(centers), arrays, features.grid)

    def _texts(self, scan: Scan) -> dict[str, str]:
        about = {**self.request.about(self.network), "depth": self.network.depth, "spacing_mm": scan.spacing_mm}
        del about["format"]  # of the files, not of what they hold
        about["step"] = scan.step(self.request.step, self.request.step_mm)
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}
        return {"volume": scan.id, **scan.facts, **texts}


@dataclass(frozen=True)
class Encoded:
    """Features of a batch on the host."""

    arrays: dict[str, np.ndarray]
    """By part, float32 (b, …)."""
    grid: tuple[int, int]


def timed(
    network: Network, hu: np.ndarray, spacing_mm: np.ndarray, parts: Sequence[str], meter: Meter | None
) -> Encoded:
    """Encode a batch, fetch the parts, and tell the meter how long that took. ValueError for input that cannot be."""
    begin_s = time.perf_counter()
    try:
        features = network.encode(hu, spacing_mm)
        # Fetching waits for the device.
        arrays = {part: getattr(features, part).float().cpu().numpy() for part in parts}
    except torch.OutOfMemoryError as error:
        raise ValueError(f"{network.device} has too little memory for {len(hu)} windows at a time: {error}") from error
    if meter is not None:
        meter.add(len(hu), time.perf_counter() - begin_s)
    return Encoded(arrays, features.grid)


def measure(network: Network, shape: tuple[int, int, int, int], batches: int, parts: Sequence[str]) -> Meter:
    """Run random HU (b, c, y, x), pixels of 1 mm. ValueError where the network takes no such windows."""
    if shape[1] != network.depth:
        raise ValueError(f"--shape: this network takes windows of {network.depth} slices, not {shape[1]}")
    hu = np.random.default_rng(0).integers(-1024, 1024, shape, dtype=np.int16)
    spacing_mm = np.ones((len(hu), 3))
    for _ in range(WARM_UP):
        timed(network, hu, spacing_mm, parts, None)
    meter = Meter(len(hu), network.device, network.weights_bytes, without_first=False)
    for _ in range(batches):
        timed(network, hu, spacing_mm, parts, meter)
    return meter


def ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """function of each item, in order, computed by threads a few items ahead of what is taken."""
    with ThreadPoolExecutor(READING_THREADS) as threads:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(threads.submit(function, item))
            if len(waiting) > READING_THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _specs(arrays: dict[str, np.ndarray], windows: int) -> dict[str, ArraySpec]:
    specs = {name: ArraySpec((windows, *values.shape[1:]), str(values.dtype)) for name, values in arrays.items()}
    return {**specs, "grid": ArraySpec((2,), "int64")}

"""The peers as loaders of random windows, each as its users run it, and given our access pattern. Peers' interpreter.

As users run it: torch's DataLoader with a worker a core (torch's own collating; the workers persist); TensorStore with
32 windows in flight and its own threads; WebDataset as a stream of windows that were cut beforehand, from DataLoader's
workers. Given our access pattern: runs of 8 windows are read together by a thread a core into memory that is used
again, and their windows are views of it.

A run of DataLoader is an epoch of a few batches (of WebDataset a whole one): it starts and ends with nothing made
ahead. Invariant: nothing of
dinox is imported; the first windows are compared bit for bit with the arrays.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import loader_meters
import numpy as np
from peer_loader_stores import SHARED, STORES, Reader
from timing import Prepared, Setup

BATCH_SIZE, DEPTH, RUN_LENGTH = 64, 3, 8
PACKAGES = (
    "numpy", "opencv-python-headless", "zarr", "tensorstore", "h5py", "hdf5plugin", "blosc2", "array_record",
    "nibabel", "webdataset", "torch",
)  # fmt: skip
WEBDATASET = "webdataset windows"
RUN_S, MOST_BATCHES = 1.0, 8
"""How long a run of a peer is to take about, and never more batches than one of ours has."""


def versions() -> dict[str, str]:
    """Of the peers' packages that are there."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class _Windows:
    """A map-style data set of all windows; each worker opens the store for itself."""

    def __init__(self, bench: _Bench) -> None:
        self._bench, self._reader = bench, None

    def __len__(self) -> int:
        return len(self._bench.windows)

    def __getitem__(self, number: int) -> Any:
        if self._reader is None:
            self._reader = self._bench.open(1)
        volume, first = self._bench.windows[number]
        window = np.empty((DEPTH, *self._bench.shapes[volume][1:]), np.int16)
        self._reader.read(volume, first, window)
        return self._bench.torch.from_numpy(window)


class _Bench:
    def __init__(self, folder: str, store: str, cores: int, quick: bool, cold: bool, torch_path: str) -> None:
        self.folder, self.name, self.cores, self.quick, self.cold = Path(folder), store, cores, quick, cold
        self.mapped = not cold
        self.shapes = json.loads((self.folder / "shapes.json").read_text("utf-8"))
        self.windows = [(v, z) for v, shape in enumerate(self.shapes) for z in range(shape[0] - DEPTH + 1)]
        self.chance = np.random.default_rng(0)
        self.stream = self._endless()
        self.path = self.folder / "peers" / SHARED.get(store, store).replace(" ", "-")
        # Behind all that is the peers' own; of use only to the same Python.
        own_python = f"python{sys.version_info.major}.{sys.version_info.minor}"
        if own_python in Path(torch_path).parts and torch_path not in sys.path:
            sys.path.append(torch_path)
        self.meter = loader_meters.Meter()
        self.dropped = loader_meters.Cold([])

    @property
    def torch(self) -> Any:
        """torch, from our environment where the peers' has none."""
        torch: Any = import_module("torch")
        torch.set_num_threads(1)
        return torch

    def _endless(self) -> Iterator[int]:
        while True:
            yield from self.chance.permutation(len(self.windows)).tolist()

    def open(self, threads: int) -> Reader:
        return STORES[self.name].open(self.path, self.shapes, self.mapped, threads)

    def true(self, volume: int, first: int, count: int) -> np.ndarray:
        return np.load(self.folder / "npy" / f"{volume:04d}.npy", mmap_mode="r", allow_pickle=False)[
            first : first + count
        ]

    def check(self, found: np.ndarray, volume: int, first: int) -> None:
        if not np.array_equal(found, self.true(volume, first, len(found))):
            raise ValueError(f"{self.name} does not give back what was stored (volume {volume}, slice {first})")

    def enough(self, run: Callable[[int], float]) -> int:
        """Batches that take about RUN_S, of so many as every worker has the same number: slow peers get few."""
        if self.quick:
            return 2
        run(self.cores)
        begin_s = time.perf_counter()
        run(self.cores)
        batch_s = (time.perf_counter() - begin_s) / self.cores
        return self.cores * min(max(round(RUN_S / batch_s / self.cores), 1), MOST_BATCHES // self.cores)

    def prepared(self, run: Callable[[], float], before: Callable[[], None] | None = None) -> Prepared:
        paths = loader_meters.files_under(self.path)
        self.dropped = loader_meters.Cold(paths)

        def empty() -> None:
            if before is not None:
                before()
            self.dropped()

        facts = {"packed_bytes": sum(path.stat().st_size for path in paths)}
        return Prepared(self.meter.around(run), facts, empty if self.cold else None)

    # --- writing ---------------------------------------------------------------------------------------------

    def write(self) -> dict[str, Any]:
        """Write the store if it is not there."""
        if not self.path.exists():
            partial = self.path.with_name(self.path.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            if self.name == WEBDATASET:
                self._write_windows(partial)
            else:
                write = STORES[self.name].write()
                for volume in range(len(self.shapes)):
                    write(np.asarray(self.true(volume, 0, self.shapes[volume][0])), partial / f"{volume:04d}")
            loader_meters.write_out(loader_meters.files_under(partial))
            partial.rename(self.path)
        return {"bytes": sum(path.stat().st_size for path in loader_meters.files_under(self.path))}

    def _write_windows(self, folder: Path) -> None:
        """Windows that do not overlap, each a .npy: a third of those that the other stores give."""
        webdataset: Any = import_module("webdataset")
        for number in range(4):
            with (folder / f"{number:04d}.tar").open("wb") as file, webdataset.TarWriter(file) as sink:
                for volume in range(number, len(self.shapes), 4):
                    for first in range(0, self.shapes[volume][0] - DEPTH + 1, DEPTH):
                        window = np.asarray(self.true(volume, first, DEPTH))
                        sink.write({"__key__": f"{volume:04d}-{first:04d}", "npy": window})

    # --- loading ---------------------------------------------------------------------------------------------

    def with_data_loader(self) -> Prepared:
        data_module: Any = self.torch.utils.data
        order: list[int] = []
        loader = data_module.DataLoader(
            _Windows(self), batch_size=BATCH_SIZE, sampler=_Sampler(order), num_workers=self.cores,
            persistent_workers=True, multiprocessing_context="fork",
        )  # fmt: skip
        # .nii.gz: to read a slice, all before it must be unpacked. A batch would take a minute.
        batch = 4 if self.name == "nifti gz" else BATCH_SIZE

        def run_of(batches: int) -> float:
            order[:] = [next(self.stream) for _ in range(batches * batch)]
            return sum(len(batch) for batch in loader)

        order[:] = [next(self.stream) for _ in range(2 * batch)]
        found = [window.numpy() for batch in loader for window in batch]
        for number, window in zip(order, found, strict=True):
            self.check(window, *self.windows[number])
        batches = self.enough(run_of)
        return self.prepared(lambda: run_of(batches))

    def with_own_threads(self) -> Prepared:
        """TensorStore."""
        reader = self.open(self.cores)
        out = np.empty((BATCH_SIZE, DEPTH, *self.shapes[0][1:]), np.int16)

        def batch() -> list[tuple[int, int]]:
            wanted = [self.windows[next(self.stream)] for _ in out]
            reader.read_many(wanted, out)
            return wanted

        for window, (volume, first) in zip(out, batch(), strict=True):
            self.check(window, volume, first)

        def run_of(batches: int) -> float:
            return sum(len(batch()) for _ in range(batches))

        batches = self.enough(run_of)
        return self.prepared(lambda: run_of(batches), reader.close)

    def with_runs(self) -> Prepared:
        """Our access pattern."""
        pool = ThreadPoolExecutor(self.cores)
        local = threading.local()
        runs = self._runs()
        shape = self.shapes[0][1:]
        batch_runs = BATCH_SIZE // RUN_LENGTH
        slots = np.empty((2 * batch_runs * self.cores, RUN_LENGTH + DEPTH - 1, *shape), np.int16)
        generation = [0]

        def read(task: tuple[int, tuple[int, int, int]]) -> int:
            slot, (volume, first, windows) = task
            if getattr(local, "generation", None) != generation[0]:
                local.reader, local.generation = self.open(1), generation[0]
            local.reader.read(volume, first, slots[slot, : windows + DEPTH - 1])
            return windows

        def tasks(count: int) -> list[tuple[int, tuple[int, int, int]]]:
            return [(number % len(slots), next(runs)) for number in range(count)]

        for slot, wanted in (few := tasks(min(4, len(slots)))):
            list(pool.map(read, [(slot, wanted)]))
            self.check(slots[slot, : wanted[2] + DEPTH - 1], wanted[0], wanted[1])
        assert few

        def run_of(batches: int) -> float:
            return sum(pool.map(read, tasks(batches * batch_runs)))

        def reopen() -> None:
            generation[0] += 1

        batches = self.enough(run_of)
        return self.prepared(lambda: run_of(batches), reopen)

    def _runs(self) -> Iterator[tuple[int, int, int]]:
        """(volume, first slice, windows) of runs, each once in random order, their borders moved in each pass."""
        while True:
            found = []
            for volume, shape in enumerate(self.shapes):
                last = shape[0] - DEPTH + 1
                phase = int(self.chance.integers(RUN_LENGTH))
                borders = sorted({0, *range(phase, last, RUN_LENGTH), last})
                found += [(volume, first, stop - first) for first, stop in pairwise(borders)]
            for number in self.chance.permutation(len(found)).tolist():
                yield found[number]

    def with_webdataset(self) -> Prepared:
        """As its users do: shards to workers, a shuffle buffer of 100 windows, batches made by the workers."""
        torch = self.torch
        webdataset: Any = import_module("webdataset")
        urls = [str(path) for path in loader_meters.files_under(self.path)]
        data = (
            webdataset.WebDataset(urls, shardshuffle=100, empty_check=False)
            .shuffle(100)
            .decode()
            .to_tuple("__key__", "npy")
            .batched(BATCH_SIZE)
        )
        loader = torch.utils.data.DataLoader(
            data, batch_size=None, num_workers=min(self.cores, len(urls)), persistent_workers=True,
            multiprocessing_context="fork",
        )  # fmt: skip
        for keys, windows in loader:
            for key, window in zip(keys, windows, strict=True):
                volume, first = (int(part) for part in key.split("-"))
                self.check(np.asarray(window), volume, first)

        def run() -> float:
            return sum(len(keys) for keys, _ in loader)

        return self.prepared(run)

    def spent(self) -> dict[str, Any]:
        return {**self.meter.described(), "left_in_cache": self.dropped.left if self.cold else None}


class _Sampler:
    def __init__(self, order: list[int]) -> None:
        self._order = order

    def __iter__(self) -> Iterator[int]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)


_benches: dict[str, _Bench] = {}


def _bench(**arguments: Any) -> _Bench:
    key = json.dumps(arguments, sort_keys=True)
    if key not in _benches:
        _benches[key] = _Bench(**arguments)
    return _benches[key]


def contenders(folder: str, store: str, cores: int, quick: bool, cold: bool, torch_path: str) -> dict[str, Setup]:
    """`users`: as its users run it; `runs`: given our access pattern. Work: windows. `store`: of STORES, or WEBDATASET.

    One to a process: what a library keeps, and its threads, must not be another contender's.
    """
    bench = _bench(
        folder=folder, store=store, cores=cores, quick=quick, cold=cold, torch_path=torch_path
    )  # fmt: skip
    if store == WEBDATASET:
        return {"users": bench.with_webdataset}
    users = bench.with_data_loader if STORES[store].processes else bench.with_own_threads
    return {"users": users} if store == "nifti gz" else {"users": users, "runs": bench.with_runs}


def tables(
    folder: str, store: str, cores: int, quick: bool, cold: bool, torch_path: str
) -> dict[str, Callable[[], Any]]:
    """`missing`: what is not installed here; `write`: makes the store; `spent`: see loader_meters.Meter."""
    bench = _bench(
        folder=folder, store=store, cores=cores, quick=quick, cold=cold, torch_path=torch_path
    )  # fmt: skip

    def missing() -> list[str]:
        wanted = ("webdataset",) if store == WEBDATASET else STORES[store].packages
        if store == WEBDATASET or STORES[store].processes:
            wanted = (*wanted, "torch")
        absent = [name for name in wanted if find_spec(name) is None]
        return absent

    return {"missing": missing, "write": bench.write, "spent": bench.spent}

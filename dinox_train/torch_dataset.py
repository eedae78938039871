"""The loader as a torch IterableDataset, for trainers that are not ours: batches of tensors, and a state to save.

    DataLoader(WindowBatches(shards, batch_size=64, seed=1), batch_size=None)

Invariant: the batches are those of `dinox_io.Loader` with the same settings, in its order, on any number of ranks; each
owns its memory, since trainers keep a batch while they ask for the next. The state is the number of the next batch,
and what it is a number of.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
import torch.distributed
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from dinox_io import Batch, Loader, ShardSet
from dinox_io.batch import Room
from dinox_io.loader import Sets


class LoaderSettings(TypedDict, total=False):
    """Arguments of `dinox_io.Loader`, which tells what they are and what they are by default."""

    batch_size: int
    depth: int
    step: int
    step_mm: float | None
    every: int
    every_mm: float | None
    seed: int
    mode: str
    run_length: int
    split: str | None
    inflation: int
    threads: int | None
    prefetch_bytes: int
    pool_bytes: int
    cache_bytes: int
    max_gbps: float | None
    timeout_s: float


_SAME_BATCHES_ANYWAY = ("threads", "prefetch_bytes", "pool_bytes", "cache_bytes", "max_gbps", "timeout_s")


class WindowBatches(IterableDataset[dict[str, Tensor]]):
    """Batches of windows as dicts of tensors on the host:

    `images` int16 HU (b, depth, Y, X), -1024 beyond a slice's true size · `sizes` int32 (b, 2), that size, y and x ·
    `spacing_mm` float64 (b, 3), z, y, x · `set`, `volume`, `center`, `epoch`, `rows` int64 (b,), as in
    `dinox_io.Batch` · `position` int64 (), the number of the global batch.

    A batch is a copy of the loader's memory, one copy of its images; where that counts, iterate `dinox_io.Loader`.
    """

    def __init__(
        self,
        shards: Sets,
        *,
        batches: int | None = None,
        rank: int | None = None,
        world: int | None = None,
        **settings: Unpack[LoaderSettings],
    ) -> None:
        """
        Args:
            shards: an open set, or a list of (set, weight); they must stay open as long as this is iterated.
            batches: where an iteration ends: at every multiple of so many batches, what trainers call an epoch. The
                next one goes on from there. None: never.
            rank, world: which share of each global batch is ours, of how many; both or neither. None: those of
                torch.distributed when the iteration begins, if it is initialised, else 0 of 1.
            settings: of the loader. batch_size is that of the global batch, over all ranks.

        Raises ValueError, TypeError for arguments that are impossible; what the loader refuses is told by iterating.
        """
        if batches is not None and batches < 1:
            raise ValueError(f"batches is {batches}; it must be at least 1, or None for a stream without an end")
        if (rank is None) != (world is None):
            raise ValueError("rank and world are given together, or not at all")
        if unknown := settings.keys() - LoaderSettings.__annotations__.keys():
            raise TypeError(f"no setting of the loader: {', '.join(sorted(unknown))}")
        self._shards, self._batches, self._share, self._settings = shards, batches, (rank, world), settings
        self._position = 0
        self._loader: Loader | None = None
        self._iterations = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """From the next batch on to the end of the iteration.

        Raises RuntimeError in a worker process, where the share of this process is not known, or when a newer
        iteration has begun; else what `dinox_io.Loader` raises.
        """
        if get_worker_info() is not None:
            raise RuntimeError(
                "DataLoader(num_workers=0): the loader decodes with threads of its own, ahead of you, without the "
                "copies between processes; with workers each would hand out every batch again"
            )
        self._iterations += 1
        return self._iterate(self._iterations)

    def _iterate(self, iteration: int) -> Iterator[dict[str, Tensor]]:
        loader = self._loader_here()
        slice_size = _slice_size(self._shards)
        end = None if self._batches is None else (self._position // self._batches + 1) * self._batches
        while end is None or self._position < end:
            batch = next(loader)
            # Counted before it is handed out: what is saved while a batch is in use begins behind it.
            self._position = loader.position
            yield _tensors(batch, slice_size)
            if iteration != self._iterations or loader is not self._loader:
                raise RuntimeError(
                    "a newer iteration has begun, a state was loaded, or it was closed: this one is over"
                )

    def _loader_here(self) -> Loader:
        """The loader at our position: the one there is, with what it has made ahead, or a new one."""
        if self._loader is None or self._loader.position != self._position:
            self.close()
            rank, world = _share_of_process() if None in self._share else self._share
            assert rank is not None
            assert world is not None
            self._loader = Loader(self._shards, position=self._position, rank=rank, world=world, **self._settings)
        return self._loader

    def __len__(self) -> int:
        """Batches of an iteration. TypeError if it has no end."""
        if self._batches is None:
            raise TypeError("the stream has no end, and so no length; give batches= if your trainer needs one")
        return self._batches

    def state_dict(self) -> dict[str, Any]:
        """The state behind the batch that was handed out last: JSON values, the same on all ranks.

        A trainer that fetches a batch ahead of the one it uses is a batch early: save with
        `state["position"] = int(batch["position"]) + 1`, of the batch that it used last.
        """
        return {"position": self._position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was saved, whatever the number of ranks and threads now.

        Raises ValueError, naming what differs, if the shards or the settings are others: its number would then stand
        for other batches.
        """
        position = state.get("position")
        if not isinstance(position, int) or isinstance(position, bool) or position < 0:
            raise ValueError(f"the state's position is {position!r}, no number of a batch")
        here = self._identity()
        differing = [
            f"{name} was {state.get(name)!r} and is {value!r}"
            for name, value in here.items()
            if state.get(name) != value
        ]
        if differing:
            raise ValueError(f"the state is of another stream of batches: {'; '.join(differing)}")
        self.close()
        self._position = position

    def close(self) -> None:
        """End the loader's threads. Idempotent; iterating begins anew, at the same position."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def _identity(self) -> dict[str, Any]:
        """All that decides which batch has which number."""
        weighted = _weighted(self._shards)
        defaults = inspect.signature(Loader).parameters
        return {
            "shards": [shards.digest for shards, _ in weighted],
            "weights": [weight for _, weight in weighted],
            "edges": [shards.edge for shards, _ in weighted],
        } | {
            name: self._settings.get(name, defaults[name].default)
            for name in LoaderSettings.__annotations__
            if name not in _SAME_BATCHES_ANYWAY
        }


def _weighted(shards: Sets) -> list[tuple[ShardSet, float]]:
    return [(shards, 1.0)] if isinstance(shards, ShardSet) else [(one, float(weight)) for one, weight in shards]


def _slice_size(shards: Sets) -> tuple[int, int]:
    y, x = np.array([one.slice_size for one, _ in _weighted(shards)]).max(axis=0)
    return int(y), int(x)


def _share_of_process() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RuntimeError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but torch.distributed is not initialised: every process would "
            "get the same batches. Initialise it before iterating, or give rank= and world="
        )
    return 0, 1


def _tensors(batch: Batch, slice_size: tuple[int, int]) -> dict[str, Tensor]:
    """What stands in a batch beside its images is its own already."""
    arrays = {
        "images": Room(slice_size).assemble(batch.windows),
        "sizes": batch.sizes,
        "spacing_mm": batch.spacing_mm,
        "set": batch.set,
        "volume": batch.volume,
        "center": batch.center,
        "epoch": batch.epoch,
        "rows": batch.rows,
        "position": np.array(batch.position, np.int64),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}

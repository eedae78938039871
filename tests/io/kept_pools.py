"""Worker processes that outlive a pack, for tests that pack many times."""

import contextlib
from collections.abc import Iterator

import pytest

from dinox_io.workers import WorkerPool


class Pools:
    """One pool for each number of workers, started when first lent."""

    def __init__(self) -> None:
        self._pools: dict[int, WorkerPool] = {}

    @contextlib.contextmanager
    def lend(self, count: int) -> Iterator[WorkerPool]:
        """Stands in for `WorkerPool(count)` as a context manager, but does not end it."""
        yield self._pools.setdefault(count, WorkerPool(count))

    def close(self) -> None:
        """End them all."""
        for pool in self._pools.values():
            pool.close()


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    """The pools of this session."""
    kept = Pools()
    yield kept
    kept.close()

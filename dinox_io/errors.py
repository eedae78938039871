"""The three errors of this package, each with a message that says what, where, and what to do."""

from __future__ import annotations


class ShardError(ValueError):
    """Damage or nonsense in a set of shards, or a read of it that fails, whenever found; never wrong pixels instead.

    Attributes: `file` (name of the file), `volume` (id), `slice_index` (z): what is known of the place, else None.
    """

    def __init__(
        self, problem: str, *, file: str | None = None, volume: str | None = None, slice_index: int | None = None
    ) -> None:
        self.file, self.volume, self.slice_index = file, volume, slice_index
        places = [file, f"volume {volume}" if volume else None, None if slice_index is None else f"slice {slice_index}"]
        super().__init__(": ".join([place for place in places if place] + [problem]))

    def at(self, *, file: str | None = None, volume: str | None = None, slice_index: int | None = None) -> ShardError:
        """The same problem with the place named by a caller that knows more of it."""
        problem = str(self)
        for place in (self.file, f"volume {self.volume}", f"slice {self.slice_index}"):
            problem = problem.removeprefix(f"{place}: ")
        return ShardError(
            problem,
            file=file or self.file,
            volume=volume or self.volume,
            slice_index=self.slice_index if slice_index is None else slice_index,
        )


class LoaderError(RuntimeError):
    """A thread of the loader failed for a reason other than damaged or unreadable shards (a bug, no memory)."""


class LoaderStalled(LoaderError):
    """No batch came within the time limit; the stacks of all threads are on standard error."""

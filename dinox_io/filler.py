"""Fills shards with volumes as they come, and notes each finished one in the journal.

Invariant: where shards begin and end depends on the volumes only, whether they were written in one run or in several;
a shard that no run finished is left nowhere.
"""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from dinox_io.journal import FinishedShard, append_line, taken_over
from dinox_io.output import OutputFolder, explained
from dinox_io.shard import PACKER, EncodedVolume, ShardSummary, ShardWriter
from dinox_io.task import SeriesResult, SeriesTask
from dinox_io.volume import Rejection


class ShardFiller:
    """Fills shards up to a size; a larger volume stands alone. Call `resume` first, `close` whatever happens."""

    def __init__(self, folder: OutputFolder, shard_bytes: int, config_digest: str) -> None:
        self._folder, self._shard_bytes, self._digest = folder, shard_bytes, config_digest
        previous = folder.previous["self"] if folder.previous else None
        self._head = {"packer": PACKER, "config_digest": config_digest, "previous": previous}
        self._writer: ShardWriter | None = None
        self._filled = False
        self._number: int | None = None
        self._done: list[tuple[str, tuple[Rejection, ...]]] = []
        self.summaries: list[ShardSummary] = []
        """Of the shards that are finished."""

    def close(self) -> None:
        """Leave no unfinished shard behind."""
        if self._writer is not None:
            self._writer.abort()

    def resume(self, marks: Callable[[], Sequence[str]]) -> tuple[int, list[Rejection]]:
        """Take over what an interrupted run had finished of the same series; the rest of it is deleted.

        Args:
            marks: gives the mark of each series as it is now. Called only if there is something to compare with.

        Returns how many series are settled by it, and the rows of the report that they gave.
        """
        head, shards = self._folder.interrupted()
        first = head.pop("first_shard", None)
        kept: list[FinishedShard] = []
        position = 0
        if shards and head == self._head:
            whole = list(itertools.takewhile(lambda shard: _is_whole(self._folder.path, shard.summary), shards))
            kept, position = taken_over(whole, marks())
        self._folder.drop_shards(shard.summary.name for shard in shards[len(kept) :])
        if kept:
            # The journal of what is kept, as if the run before had stopped right here.
            self._number = first + len(kept) - 1
            self._folder.begin(self._head, first=first, shards=kept)
        self.summaries = [shard.summary for shard in kept]
        return position, [row for shard in kept for _, rows in shard.series for row in rows]

    def add(self, task: SeriesTask, result: SeriesResult) -> None:
        """Write the volumes of a series. PackError if they cannot be written."""
        for number, volume in enumerate(result.volumes):
            if self._is_full_for(volume):
                self._close_shard(closed_by=task.mark, between_series=number == 0)
            self._write(volume)
        self._done.append((task.mark if result.settled else "", tuple(result.rows)))

    def finish(self) -> list[ShardSummary]:
        """Close the last shard; returns all of them, those that were taken over included."""
        if self._writer is not None:
            self._close_shard(closed_by=None, between_series=True)
        return self.summaries

    def _is_full_for(self, volume: EncodedVolume) -> bool:
        if self._writer is None or not self._filled:
            return False
        return self._writer.size_bytes + ShardWriter.member_bytes(volume) > self._shard_bytes

    def _write(self, volume: EncodedVolume) -> None:
        with explained(self._folder.path, ShardWriter.member_bytes(volume)):
            if self._writer is None:
                self._number = self._folder.begin(self._head) if self._number is None else self._number + 1
                self._writer = ShardWriter(self._folder.shard_path(self._number), config_digest=self._digest)
                self._filled = False
            self._writer.add(volume)
            self._filled = True

    def _close_shard(self, *, closed_by: str | None, between_series: bool) -> None:
        writer, self._writer = self._writer, None
        assert writer is not None
        with explained(self._folder.path):
            summary = writer.finish()
            shard = FinishedShard(
                summary=summary, series=tuple(self._done), closed_by=closed_by, between_series=between_series
            )
            append_line(self._folder.journal, shard)
        self.summaries.append(summary)
        self._done = []


def _is_whole(folder: Path, summary: ShardSummary) -> bool:
    try:
        with (folder / summary.name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == summary.sha256
    except OSError:
        return False

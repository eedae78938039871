"""Volumes of DICOM and NIfTI files that no set holds, read by the packer's own readers and held to its rules.

Invariant: what is printed, and what lies in DIR outside DIR/private, names no one: volumes have pseudonyms as the
packer makes them, and which files a pseudonym stands for is told in DIR/private/sources.jsonl alone.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dinox_io import privacy
from dinox_io.atomic import write_atomically
from dinox_io.formats import READERS
from dinox_io.output import REJECTED_NAME, SOURCES_NAME, PackError
from dinox_io.pack import find_series
from dinox_io.progress import ProgressReport
from dinox_io.report import Row, foreign_rows, merge_sources, source_rows
from dinox_io.rules import RULES, verdict
from dinox_io.series import SeriesRules
from dinox_io.settings import PackSettings
from dinox_io.task import SeriesTask, result_of, series_task
from dinox_io.volume import Rejection, Volume
from dinox_io.workers import Failure, WorkerPool


@dataclass(kw_only=True)
class UnpackedVolumes:
    """The volumes of some inputs; `rows` says, once all were read, what was left out."""

    inputs: tuple[Path, ...]
    folder: Path
    """DIR."""
    key_file: Path | None
    rules: SeriesRules
    rows: list[Row] = field(default_factory=list)
    """As in the packer's rejected.jsonl."""

    def check(self) -> None:
        """Raise PackError for inputs or a key that cannot be used, before anything is written."""
        missing = [path for path in self.inputs if not path.exists()]
        if missing:
            raise PackError(f"there is no {missing[0]}: give files or folders of DICOM or NIfTI")
        if self.key_file is not None:
            try:
                privacy.read_key(self.key_file)
            except (ValueError, OSError) as error:
                raise PackError(f"the key file {self.key_file} cannot be used: {error}") from None

    def read(self, progress: ProgressReport) -> Iterator[Volume]:
        """Each volume, in order; the next ones are read, by a process of their own, while one is in use."""
        key = self._key()
        settings = PackSettings(inputs=self.inputs, output=self.folder)
        with WorkerPool(1) as pool:
            found, foreign = find_series(settings, key, pool, progress)
            self._tell_sources(source_rows(found, foreign))
            self.rows += foreign_rows(foreign)
            tasks = [series_task(series, rules=self.rules, encoding=("none", 1), known={}) for series in found]
            progress.stage("encoding", sum(task.size for task in tasks))
            for task, outcome in pool.map(read_series, tasks):
                volumes, rows = ([], result_of(task, outcome).rows) if isinstance(outcome, Failure) else outcome
                self.rows += [asdict(row) for row in rows]
                yield from volumes
                progress.advance(task.size)
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_atomically(self.folder / REJECTED_NAME, text.encode())

    @property
    def num_rejected(self) -> int:
        """Series and files that were wanted and could not be trusted."""
        return sum(RULES[row["code"]].kind == "rejected" for row in self.rows)

    def lines(self) -> list[str]:
        """For people: what was left out, a line each."""
        return [f"{row['code']}: {_which(row)}: {row['reason']}; {row['hint']}" for row in self.rows]

    def _key(self) -> bytes:
        private = self.folder / "private"
        private.mkdir(mode=0o700, parents=True, exist_ok=True)
        private.chmod(0o700)
        return privacy.own_key(private) if self.key_file is None else privacy.read_key(self.key_file)

    def _tell_sources(self, rows: list[Row]) -> None:
        path = self.folder / "private" / SOURCES_NAME
        before = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        text = "".join(json.dumps(row) + "\n" for row in merge_sources(before, rows))
        write_atomically(path, text.encode("utf-8", "surrogatepass"))


def _which(row: Row) -> str:
    return f"series {row['series']}" if row["series"] else f"{row['files']} files"


def read_series(task: SeriesTask) -> tuple[Sequence[Volume], Sequence[Rejection]]:
    """The volumes of one series, and the rows about it. Runs in a worker: files are untrusted."""
    refused = "MIXED_PATIENTS" if task.identities > 1 else None
    if refused is None:
        paths = [Path(path) for path in task.paths]
        read = READERS[task.format]
        try:
            return read(paths, series=task.series, patient=task.patient, rules=task.rules, **task.given)
        except OSError:
            refused = "FILE_UNREADABLE"
    return [], [verdict(refused, series=task.series, files=len(task.paths), count=task.identities)]

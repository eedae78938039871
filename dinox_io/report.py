"""What packing says about its input: the rows of rejected.jsonl and private/sources.jsonl, the exit code, the summary.

Invariant: each series and each foreign file is told of once, however often it was looked at; the last look counts.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dinox_io.discover import FoundFile, FoundSeries
from dinox_io.rules import RULES, verdict

Row = dict[str, Any]


def source_rows(found: Sequence[FoundSeries], foreign: Sequence[tuple[str, FoundFile]]) -> list[Row]:
    """Rows for private/sources.jsonl: {series, patient, …, files: [[path, bytes]]}; {code, files} of foreign files."""
    rows: list[Row] = [
        {
            "series": series.series,
            "patient": series.patient,
            "patient_from": series.patient_from,
            "patient_ids": [list(identity) for identity in sorted(series.identities)],
            "study_uid": series.identity.study_uid,
            "series_uid": series.identity.series_uid,
            "files": [[file.path, max(file.size, 0)] for file in series.files],
        }
        for series in found
    ]
    files: dict[str, list[list[Any]]] = {}
    for code, file in foreign:
        files.setdefault(code, []).append([file.path, max(file.size, 0)])
    return rows + [{"code": code, "files": of_code} for code, of_code in files.items()]


def merge_sources(before: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """private/sources.jsonl: what it was, and new rows, which tell of each of their files for good."""
    seen = {entry[0] for row in new for entry in row["files"]}
    merged: dict[str, Row] = {}
    for row in before:
        kept = [entry for entry in row["files"] if entry[0] not in seen]
        merged[row.get("series") or row["code"]] = {**row, "files": kept}
    for row in new:
        name = row.get("series") or row["code"]
        old = merged.get(name, {"files": []})
        merged[name] = {**row, "files": old["files"] + row["files"]}
    for row in merged.values():
        row["files"].sort()
    return [row for _, row in sorted(merged.items()) if row["files"] or "series" in row]


def merge_rejected(before: Sequence[Row], new: Sequence[Row], sources: Sequence[Row], seen: set[str]) -> list[Row]:
    """rejected.jsonl: new rows, those of series that were not `seen` this time, and the foreign files of all runs.

    Args:
        sources: private/sources.jsonl as it will be: foreign files are counted there.
    """
    merged = [row for row in before if row["series"] is not None and row["series"] not in seen]
    # Of withdrawn patients there is a count only: a new one takes the place of the one before.
    for rows in (new, before):
        withdrawn = sum(row["files"] for row in rows if row["code"] == "WITHDRAWN")
        if withdrawn:
            merged.append(asdict(verdict("WITHDRAWN", series=None, files=withdrawn)))
            break
    merged += [row for row in new if row["series"] is not None]
    merged += [
        asdict(verdict(row["code"], series=None, files=len(row["files"]))) for row in sources if "series" not in row
    ]
    return sorted(merged, key=lambda row: (row["series"] or "", row["code"], row["reason"]))


def rejected_by_code(rows: Sequence[Row]) -> dict[str, int]:
    """How many series, or foreign files, each code stands for."""
    counts: Counter[str] = Counter()
    for row in rows:
        counts[row["code"]] += 1 if row["series"] is not None else row["files"]
    return dict(sorted(counts.items()))


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """How a pack ended."""

    manifest: Mapping[str, Any] | None
    """Of the set as it is now; None: there is no volume in it, and so no set."""
    new_volumes: int
    series: int
    """Series of the input."""
    in_set: int
    """How many of them are in the set."""
    codes: Sequence[str]
    """Codes that this run gave."""
    rejected: Sequence[Row]
    """rejected.jsonl as it is now."""
    part_of: str | None = None
    """The folder that is to unite this part with the others."""

    @property
    def exit_code(self) -> int:
        """0: every series is in the set or skipped by rule; 3: some rejected; 1: some rejected and none in the set."""
        if not any(RULES[code].kind == "rejected" for code in self.codes):
            return 0
        return 3 if self.in_set else 1

    def lines(self, output: str) -> list[str]:
        """The summary for people."""
        lines = [*self._about_set(output), *self._about_rejected(output)]
        if not self.series:
            lines.append(
                "No DICOM series was found in the input." if not self.part_of else "No series is of this part."
            )
        if self.part_of:
            lines.append(f"Next, when all parts are done: python tools/pack_shards.py --merge --output {self.part_of}")
        elif self.manifest:
            lines.append(f"Next: python tools/verify_shards.py {output}")
        else:
            lines.append(f"There is no set in {output}: no volume was packed, and no manifest.json written.")
        return lines

    def _about_set(self, output: str) -> list[str]:
        if not self.manifest:
            return []
        counts = self.manifest["counts"]
        raw_mb, shard_mb = counts["raw_bytes"] / 1e6, counts["shard_bytes"] / 1e6
        sides = ", ".join(
            f"{side} {share['volumes']} ({share['patients']} patients)"
            for side, share in self.manifest["splits"].items()
            if share["volumes"] or side in ("train", "val")
        )
        return [
            f"Packed {self.new_volumes} new volumes. The set in {output} now holds {counts['volumes']} volumes of "
            f"{counts['patients']} patients, {counts['slices']} slices, in {counts['shards']} shards.",
            f"{raw_mb:.1f} MB of HU in {shard_mb:.1f} MB of shards: {raw_mb / shard_mb:.2f} times smaller.",
            f"Sides: {sides}.",
        ]

    def _about_rejected(self, output: str) -> list[str]:
        if not self.rejected:
            return []
        lines = [f"Not packed whole (which: {output}/rejected.jsonl, whose: {output}/private/sources.jsonl):"]
        files = {row["code"] for row in self.rejected if row["series"] is None}
        hints = {row["code"]: row["hint"] for row in self.rejected}
        for code, count in rejected_by_code(self.rejected).items():
            unit = "files" if code in files else "series"
            lines.append(f"  {count:6d} {unit:6s} {code}: {hints[code]}")
        return lines

"""What the loaders' samples say: rates, ratios of the same rounds, targets; as a table, and as a picture.

Invariant: a ratio compares contenders of one session (the same cores, the same state of the cache), round by round.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness import AGAIN, Measurement
from intervals import Interval
from result import Figure, Result

RANDOM, VIEWS, IMAGES = "dinox random", "dinox runs, views", "dinox runs, images"
FAMILIES: dict[str, tuple[str, ...]] = {
    "TensorStore": ("tensorstore blosc, users", "tensorstore zstd, users"),
    "TensorStore given the same runs": ("tensorstore blosc, runs", "tensorstore zstd, runs"),
    "HDF5": ("hdf5 zstd, users", "hdf5 blosc, users"),
    "blosc2": ("blosc2, users",),
    "zarr-python": ("zarr zstd, users", "zarr blosc, users"),
    "ArrayRecord": ("array_record, users",),
    "PNG16": ("png16 files, users",),
    "raw .npy through DataLoader": ("npy memmap, users", "npy pread, users"),
}
"""Peers as the targets name them: the fastest of these counts, in each round."""
LIMITS: dict[str, dict[str, float]] = {
    RANDOM: {
        "TensorStore": 1.5, "HDF5": 2.4, "blosc2": 2.4, "zarr-python": 4.0, "ArrayRecord": 4.0, "PNG16": 10.0,
        "raw .npy through DataLoader": 1.8,
    },
    VIEWS: {
        "TensorStore": 3.0, "TensorStore given the same runs": 1.5, "HDF5": 5.0, "blosc2": 5.0, "PNG16": 20.0,
        "raw .npy through DataLoader": 3.5,
    },
    IMAGES: {
        "TensorStore": 2.0, "TensorStore given the same runs": 1.1, "HDF5": 3.4, "blosc2": 3.4, "PNG16": 15.0,
        "raw .npy through DataLoader": 2.5,
    },
}  # fmt: skip
"""At least so many times as fast, with 2 cores and a warm cache."""


class Session(NamedTuple):
    """One measurement, and what each contender spent for a window (loader_meters.Meter)."""

    name: str
    cores: int
    cold: bool
    measured: Measurement
    spent: dict[str, Any]

    def full(self, label: str) -> str:
        """The contender's name in the measurement."""
        return f"{label} [{self.name}]"

    def has(self, label: str) -> bool:
        return self.full(label) in self.measured.samples

    def ratio(self, label: str, others: Sequence[str]) -> Interval:
        """How many times as fast as the fastest of the others that are there."""
        there = [self.full(one) for one in others if self.has(one)]
        return self.measured.figure(lambda times: min(times[one] for one in there) / times[self.full(label)])


def rates(made: Result, session: Session) -> None:
    """windows/s of all, and ours against each peer."""
    for name in session.measured.samples:
        made.timed(name, session.measured.rate(name), "windows/s")
    for ours in (RANDOM, VIEWS, IMAGES):
        for family, members in FAMILIES.items():
            if any(session.has(one) for one in members):
                made.timed(f"{ours} / {family} [{session.name}]", session.ratio(ours, members), "×", gate=True)
    stayed = {
        label: values["left_in_cache"] for label, values in session.spent.items() if values["left_in_cache"] is not None
    }
    if stayed and max(stayed.values()) > 0.01:
        worst = max(stayed, key=lambda label: stayed[label])
        made.notes.append(f"{session.name}: up to {100 * stayed[worst]:.0f} % of {worst} stayed in the cache")


def targets(made: Result, sessions: Sequence[Session], tables: dict[str, Any], resume: Figure) -> None:
    """The targets of the loader; those whose session was not measured are left out, and said to be."""
    figures = {figure.name: figure for figure in made.figures}
    two = _session(sessions, cold=False, cores=2)
    one = _session(sessions, cold=False, cores=1)
    if two is not None:
        for ours, limits in LIMITS.items():
            for family, limit in limits.items():
                if figure := figures.get(f"{ours} / {family} [{two.name}]"):
                    made.target(f"{ours} against {family}, {two.name}", figure, "at least", limit)
        _processor_time(made, two)
        fast = two.ratio("dinox fast random, filtered", ["dinox random, filtered"])
        figure = made.timed("preset fast / small, both filtered", fast, "×", gate=True)
        made.target("preset fast, filtered planes", figure, "at least", 1.8)
        scaling = two.ratio(RANDOM, ["dinox random, 1 thread"])
        figure = made.timed("random: 2 threads / 1 thread", scaling, "×", gate=True)
        made.target("scaling to 2 cores", figure, "at least", 2 * 0.85)
    _efficiency(made, one or two)
    if two is None or one is None:
        made.notes.append("not all sessions were measured: targets of 1 or of 2 cores, warm, are missing")
    _memory(made, tables)
    for name in tables["stages"]:
        made.exact(f"time of a thread, random: {name}", 100 * tables["stages"][name], "%", better="lower")
    python = tables["python share"]
    figure = made.exact("Python's share of decoding", 100 * python["held_s"] / python["whole_s"], "%", better="lower")
    made.target("GIL held, of the decode time (upper bound: see our_loaders.python_share)", figure, "at most", 2.0)
    made.exact("Python in the whole loader", 1e6 * python["loader_s"], "µs a slice", better="lower")
    rate = figures[(one or two or sessions[0]).full(RANDOM)].value
    made.target("resume at a million windows, against the time of a batch (ms)", resume, "at most", 64e3 / rate)


def _session(sessions: Sequence[Session], *, cold: bool, cores: int) -> Session | None:
    return next((one for one in sessions if one.cold == cold and one.cores == cores), None)


def _processor_time(made: Result, session: Session) -> None:
    zarr = [values["cpu_s"] for label, values in session.spent.items() if label in FAMILIES["zarr-python"]]
    for label in (RANDOM, VIEWS, IMAGES):
        made.exact(f"CPU time, {label}", 1e3 * session.spent[label]["cpu_s"], "s for 1000 windows", better="lower")
    if zarr:
        for label, limit in ((VIEWS, 0.15), (RANDOM, 0.3)):
            share = session.spent[label]["cpu_s"] / min(zarr)
            figure = made.exact(f"CPU time, {label} / zarr-python", share, "×", better="lower", gate=True)
            made.target(f"CPU time of a window, {label} against zarr-python", figure, "at most", limit)


def _efficiency(made: Result, session: Session | None) -> None:
    """Of the time that zstd and the unfilter alone take for the slices that are decoded."""
    if session is None:
        return
    threads, slices_per_window = session.cores, session.spent[VIEWS]["slices"]
    for label, slices in ((RANDOM, 3.0), (VIEWS, slices_per_window)):
        share = session.measured.figure(
            lambda times, label=label, slices=slices: (
                times[session.full("dinox kernel limit")] * (slices / 3) / (times[session.full(label)] * threads)
            )
        )
        figure = made.timed(f"{label}: of the kernel limit [{session.name}]", share, "×", gate=True)
        if threads == 1:
            made.target(f"efficiency on one core, {label}", figure, "at least", 0.90)
    made.exact("slices decoded for a window, runs", slices_per_window, "slices", better="lower")


def _memory(made: Result, tables: dict[str, Any]) -> None:
    for mode in ("random", "runs"):
        memory = tables[f"memory {mode}"]
        beyond = max(memory["uss_bytes"]) - memory["budget_bytes"]
        figure = made.exact(f"memory beyond the budget, {mode}", beyond / 1e6, "MB", better="lower")
        made.target(f"memory, {mode}: USS beyond slabs or pool (MB)", figure, "at most", 150)
        figure = made.exact(f"memory over 20 epochs, {mode}: largest - smallest", 100 * memory["spread"], "%")
        made.target(f"memory, {mode}: flat over 20 epochs (±1 %)", figure, "at most", 2.0)
    index = tables["index bytes"]
    figure = made.exact("index, a slice", index["slice"], "bytes", better="lower")
    made.target("index: bytes a slice", figure, "at most", 20)
    figure = made.exact("index, a volume", index["volume"], "bytes", better="lower")
    made.target("index: bytes a volume", figure, "at most", 1024)


# ---------------------------------------------------------------------------------------------- to look at


def _rows(made: Result) -> list[tuple[str, str, Figure]]:
    """(session, contender, windows/s), the slowest last."""
    found = []
    for figure in made.figures:
        label, bracket, session = figure.name.partition(" [")
        if figure.unit == "windows/s" and bracket and not figure.name.endswith(AGAIN):
            found.append((session.removesuffix("]"), label, figure))
    order = {session: number for number, session in enumerate(dict.fromkeys(row[0] for row in found))}
    return sorted(found, key=lambda row: (order[row[0]], -row[2].value))


def table(made: Result) -> list[str]:
    """Markdown: windows/s, their interval, CPU time, bytes read, memory; for each session."""
    said = [
        "| session | loader | windows/s | 95 % interval | CPU s/1000 | KB/window | USS MB |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for session, label, figure in _rows(made):
        spent = made.conditions.get("spent", {}).get(session, {}).get(label)
        # What is mapped is read by page faults, which no counter counts.
        cells = ["", "", ""]
        if spent:
            read = spent["read_bytes"] / 1e3
            memory = "" if label.startswith("dinox") else f"{spent['uss_bytes'] / 1e6:.0f}"
            cells = [f"{1e3 * spent['cpu_s']:.2f}", f"{read:.0f}" if read > 1 else "mapped", memory]
        interval = f"{figure.low:.0f} to {figure.high:.0f}"
        said.append(f"| {session} | {label} | {figure.value:.0f} | {interval} | {' | '.join(cells)} |")
    return said


def plot(made: Result, path: Path) -> None:
    """Bars of windows/s, one panel a session."""
    from matplotlib.figure import Figure as Picture

    rows = _rows(made)
    sessions = list(dict.fromkeys(row[0] for row in rows))
    tallest = max(sum(row[0] == session for row in rows) for session in sessions)
    picture = Picture(figsize=(7 * len(sessions), 1 + 0.24 * tallest), layout="constrained")
    for axes, session in zip(picture.subplots(1, len(sessions), squeeze=False)[0], sessions, strict=True):
        own = [row for row in rows if row[0] == session][::-1]
        colors = ["tab:blue" if label.startswith("dinox") else "tab:gray" for _, label, _ in own]
        spread = [[f.value - f.low for *_, f in own], [f.high - f.value for *_, f in own]]
        axes.barh([label for _, label, _ in own], [f.value for *_, f in own], xerr=spread, color=colors)
        axes.set_title(session)
        axes.set_xlabel("windows/s (higher is better)")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=110)

"""Figures of benchmarks/model.py: ratios to floor and peer, parts, memory; the targets, the table, CSV and picture."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from harness import Measurement
from network_case import Case
from our_networks import NAMES, Pass
from result import Figure, Result

from dinox_model.flops import forward_flops

FLOOR_LIMIT, PEER_LIMIT_GPU, MEMORY_LIMIT = 1.05, 1.3, 1.1
TARGET_LABEL = "vit_s 224"
OURS, FLOOR, PEER, COMPILED = "ours", "floor", "transformers", "ours compiled"
TIME = "× the time"


def whole(made: Result, case: Case, which: Pass, measured: Measurement) -> None:
    """Rates, and ratios of the same rounds."""
    prefix = f"{case.label} {NAMES[which]}: "
    flops = sum(forward_flops(case.config, case.size).values()) * (3 if which == "both" else 1)
    listed = [name for name in (OURS, COMPILED, PEER, FLOOR) if prefix + name in measured.samples]
    for name in listed:
        made.timed(f"{prefix}{name}", measured.rate(prefix + name), "images/s")
    for name in (OURS, FLOOR):
        made.timed(f"{prefix}{name}, operations", measured.rate(prefix + name).scaled(flops / 1e12), "TFLOP/s")
    for name in (OURS, COMPILED, PEER):
        if name in listed:
            ratio = measured.ratio(prefix + FLOOR, prefix + name)
            made.timed(f"{prefix}{name} / floor", ratio, TIME, better="lower", gate=name != PEER)
    for name in (OURS, COMPILED):
        if name in listed and PEER in listed:
            faster = measured.ratio(prefix + name, prefix + PEER)
            made.timed(f"{prefix}{name}, throughput over transformers", faster, "×", gate=True)


def parts(made: Result, case: Case, which: Pass, counts: Mapping[str, int], measured: Measurement) -> None:
    """Each part's share of the whole pass, and its time over that of its products."""
    prefix = f"{case.label} {NAMES[which]}: "
    for name, count in counts.items():
        share = measured.figure(
            lambda times, name=name, count=count: 100 * count * times[prefix + name]
            / (case.batch * times[prefix + "whole"])
        )  # fmt: skip
        made.timed(f"{prefix}part {name}, {count} x", share, "% of the time", better="lower")
        if f"{prefix}floor of {name}" in measured.samples:
            ratio = measured.ratio(f"{prefix}floor of {name}", prefix + name)
            made.timed(f"{prefix}part {name} / floor", ratio, TIME, better="lower")


def memory(made: Result, case: Case, which: Pass, peak: int, planned: int, peer: int | None) -> None:
    """The peak that was measured, beside the plan and the peer."""
    prefix = f"{case.label} {NAMES[which]}: "
    made.exact(f"{prefix}memory", peak / 2**20, "MiB", better="lower")
    apart = max(peak / planned, planned / peak)
    made.exact(f"{prefix}memory, measured and planned apart", apart, "×", better="lower", gate=True)
    if peer is not None:
        made.exact(f"{prefix}memory over transformers'", peak / peer, "×", better="lower", gate=True)


def targets(made: Result, cases: Sequence[Case], passes: Sequence[Pass]) -> None:
    """The issue's, of what was measured."""
    figures = {figure.name: figure for figure in made.figures}
    for case in cases:
        for which in passes:
            prefix = f"{case.label} {NAMES[which]}: "
            floor, faster = figures[f"{prefix}ours / floor"], figures.get(f"{prefix}ours, throughput over transformers")
            if case.device.type == "cpu" and case.label == TARGET_LABEL:
                made.target(f"{prefix}time over the floor's", floor, "at most", FLOOR_LIMIT)
            if case.device.type == "cuda" and faster is not None:
                made.target(f"{prefix}throughput over transformers'", faster, "at least", PEER_LIMIT_GPU)
            apart = figures[f"{prefix}memory, measured and planned apart"]
            made.target(f"{prefix}memory within 10 % of the plan", apart, "at most", MEMORY_LIMIT)


def table(made: Result) -> list[str]:
    """The parts of each pass, as a table: share of the time, and time over that of the products alone."""
    by_name = {figure.name: figure for figure in made.figures}
    said: list[str] = []
    before = ""
    for figure in made.figures:
        prefix, found, part = figure.name.partition(": part ")
        if not found or figure.unit == TIME:
            continue
        if prefix != before:
            said += [
                "",
                f"| {prefix}, part | calls | share of the time | over its products |",
                "| --- | --- | --- | --- |",
            ]
            before = prefix
        name, _, count = part.rpartition(", ")
        over = by_name.get(f"{prefix}: part {name} / floor")
        said.append(
            f"| {name} | {count[:-2]} | {figure.value:.1f} % | {'' if over is None else f'{over.value:.2f} x'} |"
        )
    return said


def write_beside(made: Result, output: Path) -> list[Path]:
    """Write OUTPUT's figures as CSV, and as a picture where matplotlib is installed; returns the files."""
    rows, picture = output.with_suffix(".csv"), output.with_suffix(".png")
    with rows.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("figure", "value", "low", "high", "unit"))
        writer.writerows((one.name, one.value, one.low, one.high, one.unit) for one in made.figures)
    if find_spec("matplotlib") is None:
        return [rows]
    _draw([one for one in made.figures if one.name.endswith(" / floor") and ": part " not in one.name], picture)
    return [rows, picture]


def _draw(figures: Sequence[Figure], path: Path) -> None:
    """A bar for each network and pass: time over the floor's, with its interval."""
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure as Picture

    picture: Picture
    picture, axes = plt.subplots(figsize=(8, 0.6 + 0.32 * len(figures)), layout="constrained")
    names = [figure.name.removesuffix(" / floor") for figure in figures]
    spread = [[one.value - one.low for one in figures], [one.high - one.value for one in figures]]
    colours = {OURS: "#2a6f97", COMPILED: "#61a5c2", PEER: "#adb5bd"}
    axes.barh(names, [one.value for one in figures], xerr=spread,
              color=[colours[name.rpartition(": ")[2]] for name in names])  # fmt: skip
    axes.axvline(1.0, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("time over the floor's (products and attention alone)")
    picture.savefig(path, dpi=150)
    plt.close(picture)

"""learn.json in words and tables: learn.md. A pure function of the JSON; what was not reached is said to be so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from probing.table import interval_of


def markdown(report: Mapping[str, Any]) -> str:
    """The page."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    settings = report["settings"]
    yield "# Learning on the phantom"
    yield ""
    yield (
        f"{settings['patients']} patients of {settings['slices']} slices of {settings['size']} pixels, "
        f"{settings['seeds']} seeds of {settings['updates']} updates each, {settings['config']}"
        + "".join(f" {one}" for one in settings["overrides"])
        + f". Protocol {report['protocol']} (docs/evaluation.md), patients that no run saw. Hours of training: "
        f"{report['hours']:.2f}."
    )
    yield "Intervals are 95 %, over patients and seeds. They promise nothing about CT of people."
    for table in report["tables"]:
        counts, unit = table["counts"], table["unit"]
        yield from ("", f"## {table['task']}", "")
        yield (
            f"{table['selection'][:1].upper()}{table['selection'][1:]}. {counts['tested_units']} {unit}s, "
            f"{counts['tested_positive']} positive, of {counts['tested_patients']} patients."
        )
        yield from ("", f"| network | AUROC by {unit} | each seed |", "|---|---|---|")
        for row in table["rows"]:
            yield f"| {row['network']} | {interval_of(row['auroc'])} | {_seeds(row['seeds'])} |"
        gain = table["gain"]
        each = "; ".join(str(interval_of(one)) for one in gain["seeds"])
        yield from ("", f"Pretrained less random initialisation: **{interval_of(gain['auroc'])}** (each seed: {each}).")
        yield _verdict(table, report["runs"])
        if table["terms"]:
            yield from ("", "| term of the loss | its share: all terms less without it | each seed |", "|---|---|---|")
        for one in table["terms"]:
            yield f"| {one['term']} | {interval_of(one['auroc'])} | {_seeds(one['seeds'])} |"
    yield from (
        "",
        "## The runs",
        "",
        "| run | loss, first to last | knn_z, first to last | hours |",
        "|---|---|---|---|",
    )
    for run in report["runs"]:
        loss, knn = (
            " to ".join("–" if one is None else f"{one:.3f}" for one in run[name]) for name in ("loss", "knn_z")
        )
        yield f"| seed {run['seed']}, {run['name']} | {loss} | {knn} | {run['hours']:.2f} |"


def _verdict(table: Mapping[str, Any], runs: list[Mapping[str, Any]]) -> str:
    if table["is_above_its_interval"]:
        return "The aim is reached: the difference lies above zero with its whole interval."
    gain = table["gain"]["auroc"]
    if gain["low"] is None:
        return "The aim is not reached: there are too few patients or pairs for an interval."
    whole = [run for run in runs if run["without"] is None]
    fell = sum(run["loss"][-1] is not None and run["loss"][-1] < run["loss"][0] for run in whole)
    limit = (
        "the difference itself is not above zero"
        if gain["value"] <= 0
        else "it is above zero, and the interval over so few patients and seeds is wider than it"
    )
    return f"The aim is not reached: {limit}. The loss fell in {fell} of {len(whole)} runs with all terms."


def _seeds(values: list[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def _from_to(values: list[float | None]) -> str:
    return " to ".join("–" if one is None else f"{one:.3f}" for one in values)

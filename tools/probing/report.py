"""probe.json in words and tables: probe.md. Every figure stands in the JSON; nothing is left out that does not flatter.

Invariant: a pure function of the JSON.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from probing.table import interval_of


def markdown(report: Mapping[str, Any]) -> str:
    """The page."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    network, data, pretraining = report["network"], report["data"], report["pretraining"]
    update = "" if network["update"] is None else f" after {network['update']} updates"
    yield f"# Probe of {network['digest'][:16]}…{update}"
    yield ""
    yield (
        f"Protocol {report['protocol']['version']} (docs/evaluation.md). Set {data['set'][:16]}…, labels "
        f"{data['labels']['name']} ({data['labels']['sha256'][:16]}…), side {', '.join(data['sides'])}, seed "
        f"{report['seed']}, {report['device']}, {report['dtype']}."
    )
    yield ""
    if pretraining["known"]:
        yield f"Pretraining saw {pretraining['patients']} patients, {pretraining['volumes']} volumes."
    else:
        yield "**What pretraining saw is not known.**"
    yield from (f"{note[:1].upper()}{note[1:]}." for note in pretraining["notes"])
    if report["final"] is not None:
        yield f"The test side was opened; it had been opened {report['final']['opened_before']} times before."
    yield ""
    yield (
        f"Intervals are 95 %, by resampling patients; [–] where fewer than {report['protocol']['bootstrap']['pairs']} "
        "pairs, or too few patients, allow none. Bold: the figure of each encoder (chosen by the protocol)."
    )
    for table in report["tables"]:
        yield ""
        yield from (_dense(table) if table["task"] == "dense" else _task(table))


def _task(table: Mapping[str, Any]) -> Iterator[str]:
    counts = table["counts"]
    yield f"## {table['task']}: patients {table['tested']}"
    yield ""
    yield f"{table['selection'][:1].upper()}{table['selection'][1:]}."
    yield (
        f"{counts['tested_units']} {table['unit']}s tested, {counts['tested_positive']} of them positive, of "
        f"{counts['tested_patients']} patients; {counts['training_patients']} labelled patients to learn from, "
        f"{counts['folds']} {'split' if counts['folds'] == 1 else 'folds'}."
    )
    if others := {name: count for name, count in counts.items() if name not in _SAID}:
        yield "Counts: " + ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in others.items()) + "."
    if table["aim"] is not None:
        yield f"Predecessors aimed at {table['aim']:.2f}, on other patients by other rules; it is no pass mark here."
    yield ""
    yield from _table(
        ("encoder", "features", "probe", f"AUROC by {table['unit']}", "AUROC by patient"),
        [
            (
                row["encoder"],
                row["features"],
                row["probe"],
                _bold(interval_of(row["auroc_by_unit"]), row["is_headline"]),
                _bold(interval_of(row["auroc_by_patient"]), row["is_headline"]),
            )
            for row in table["rows"]
        ],
    )
    if unfitted := sum(row["unfitted_folds"] > 0 for row in table["rows"]):
        yield ""
        yield f"In {unfitted} rows a fold's training patients show one class only: all its units score alike."
    if difference := table["difference"]:
        yield ""
        yield (
            f"{difference['of']} less {difference['minus']}: by {table['unit']} "
            f"{interval_of(difference['auroc_by_unit'])}, by patient {interval_of(difference['auroc_by_patient'])}."
        )
    yield ""
    yield from _curve(table)


_SAID = ("tested_units", "tested_positive", "tested_patients", "training_patients", "folds")


def _curve(table: Mapping[str, Any]) -> Iterator[str]:
    fractions = sorted({point["fraction"] for point in table["curve"]})
    encoders = list(dict.fromkeys(point["encoder"] for point in table["curve"]))
    found = {(point["encoder"], point["fraction"]): point for point in table["curve"]}
    yield f"AUROC by {table['unit']} from a share of the labelled patients: mean of the draws, lowest to highest."
    yield ""
    yield from _table(
        ("encoder", *(f"{100 * fraction:g} %" for fraction in fractions)),
        [(encoder, *(_point(found[encoder, fraction]) for fraction in fractions)) for encoder in encoders],
    )


def _point(point: Mapping[str, Any]) -> str:
    values = [value for value in point["draws"] if value is not None]
    if not values:
        return "–"
    return f"{point['mean']:.3f}" + (f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else "")


def _dense(table: Mapping[str, Any]) -> Iterator[str]:
    counts = table["counts"]
    yield f"## dense: patients {table['tested']}"
    yield ""
    yield (
        f"{counts['tested_slices']} of {counts['slices']} slices tested, of {counts['tested_patients']} patients, with "
        f"{counts['tested_pixels']} pixels of findings; {counts['folds']} folds. Dice over all tested slices of a "
        "patient, mean over patients."
    )
    yield ""
    rows = [(row["encoder"], row["head"], str(interval_of(row["dice_by_patient"]))) for row in table["rows"]]
    yield from _table(("encoder", "head", "Dice by patient"), rows)
    for one in table["differences"]:
        yield ""
        yield f"{one['head']}: {one['of']} less {one['minus']} {interval_of(one['dice_by_patient'])}."


def _bold(value: object, bold: bool) -> str:
    return f"**{value}**" if bold else str(value)


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(names) + " |"
    yield "|" + "---|" * len(names)
    for row in rows:
        yield "| " + " | ".join(row) + " |"

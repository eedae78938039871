"""finetune.json in words and tables. A pure function of the JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from probing.table import interval_of


def markdown(report: Mapping[str, Any]) -> str:
    """The page."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    network, data = report["network"], report["data"]
    update = "" if network["update"] is None else f" after {network['update']} updates"
    yield f"# Fine-tuning of {network['digest'][:16]}…{update}"
    yield ""
    yield (
        f"Protocol {report['protocol']['version']} (docs/evaluation.md). Set {data['set'][:16]}…, labels "
        f"{data['labels']['name']}, side {', '.join(data['sides'])}, seed {report['seed']}, {report['device']}."
    )
    for recipe in report["recipes"]:
        yield ""
        yield f"{recipe['method']}: " + ", ".join(
            f"{name.replace('_', ' ')} {value}" for name, value in recipe.items() if name != "method"
        )
    for table in report["tables"]:
        counts, unit = table["counts"], table["unit"]
        yield from ("", f"## {table['task']}: patients {table['tested']}", "")
        yield (
            f"{table['selection'][:1].upper()}{table['selection'][1:]}. {counts['tested_units']} {unit}s tested, "
            f"{counts['tested_positive']} of them positive, of {counts['tested_patients']} patients; "
            f"{counts['folds']} folds; on `{table['features']}`."
        )
        yield ""
        yield f"| method | AUROC by {unit} | less frozen | AUROC by patient | less frozen |"
        yield "|---|---|---|---|---|"
        for row in table["rows"]:
            cells = [row["method"]]
            for by in ("unit", "patient"):
                less = row[f"less_frozen_by_{by}"]
                cells += [str(interval_of(row[f"auroc_by_{by}"])), "" if less is None else str(interval_of(less))]
            yield "| " + " | ".join(cells) + " |"

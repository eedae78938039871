"""What a release's README.md says beyond the export's model card: lineage, evaluation, limits of this release.

Invariant: a figure that is not known is said to be unknown; of an evaluation all tables are shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from releasing.lineage import Lineage

NOT_EVALUATED = "No evaluation was given for this release: nothing is known of what its features are worth."


@dataclass(frozen=True)
class Evaluation:
    """What tools/probe.py wrote."""

    report: dict[str, Any]
    page: str
    """The same in Markdown."""


def provenance(lineage: Lineage, licence: str) -> dict[str, Any]:
    """What `dinox_model.model_card` takes."""
    found: dict[str, Any] = {
        "licence": licence,
        "run_config_digest": lineage.config_digest,
        "shard_set_digests": [one.digest for one in lineage.sets],
        "updates": lineage.update,
        "data": [one.about for one in lineage.sets if one.about is not None],
    }
    if lineage.started_from is not None:
        found["started_from"] = lineage.started_from
    if lineage.dinox_version is not None:
        found["dinox_version"] = lineage.dinox_version
    if lineage.images is not None:
        found["images"] = lineage.images
    return found


def sections(lineage: Lineage, checked: Sequence[str], reports: Sequence[Evaluation]) -> str:
    """Markdown to follow the model card. checked: what no rule could tell, and whoever released it answered for."""
    lines = ["", "## Lineage", ""]
    lines += [f"- {name}: {value}" for name, value in in_words(lineage).items()]
    lines += ["", "All of it: lineage.json.", "", "## Licence of the data", ""]
    lines += [f"- {one}. Whoever made this release states to have checked it." for one in checked] or [
        "Known rules allow it for all data sets above."
    ]
    lines += ["", "## Evaluation", ""]
    if not reports:
        return "\n".join([*lines, NOT_EVALUATED, ""])
    lines += ["By the protocol of DINOX's docs/evaluation.md. All of it: evaluation.json.", ""]
    for report in reports:
        lines.append("\n".join("#" * 2 + line if line.startswith("#") else line for line in report.page.split("\n")))
    return "\n".join(lines)


def in_words(lineage: Lineage) -> dict[str, str]:
    """Its figures, for people."""
    commit = lineage.commit or "unknown"
    changed = {True: ", with changes of its own", False: "", None: ""}[lineage.was_changed]
    machine = ", ".join(str(value) for value in lineage.machine.values() if value) or "unknown"
    return {
        "code (commit)": commit + changed,
        "machine": machine,
        "updates": f"{lineage.update:,}",
        "images seen": "unknown" if lineage.images is None else f"{lineage.images:,}",
        "hours in updates": "unknown" if lineage.hours is None else f"{lineage.hours:g}",
        "energy of the GPU": "not measured" if lineage.gpu_kwh is None else f"{lineage.gpu_kwh:g} kWh",
        "began with": lineage.started_from or "random weights",
    }

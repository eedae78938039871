"""A run as a folder that one may upload: networks, preprocessing, card, lineage, evaluation. See `--help`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from releasing.card import Evaluation
    from releasing.lineage import Lineage

    from dinox_model import VisionTransformer

_EXAMPLES = """\
examples:
  python tools/release.py runs/lung --output lung-release --probe runs/lung/probe/probe.json
  python tools/release.py runs/lung --output lung-release --data shards --licence CC-BY-NC-4.0
  python tools/release.py runs/lung/checkpoints/step-00100000 --output lung-release --licence MIT --licence-checked

DIR is what transformers' AutoModel.from_pretrained loads: config.json, model.safetensors, preprocess.json, README.md.
In it lie dinox/ (the same network for dinox_model.load), lineage.json, and evaluation.json and .md of --probe.
Nothing is uploaded.

Data sets say their licence by pack_shards --about. A release is refused where it forbids that (no derivatives, not to
be shared, weights_may_be_released: no), whatever is given here; where no rule knows it, until --licence-checked says
that a person has read it. docs/release.md has the rules.

exit code: 0 written; 1 it cannot be done; 2 wrong usage, or nothing of that name; 3 refused for a licence
"""


class LicenceError(ValueError):
    """The data's licence stands in the way."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        description="Write what one uploads of a run: networks, card, lineage, evaluation. Uploads nothing.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("run", metavar="RUN", type=Path, help="a run (its newest checkpoint), or a checkpoint")
    command.add_argument("--output", metavar="DIR", type=Path, required=True, help="a folder that does not exist yet")
    command.add_argument("--probe", metavar="FILE", type=Path, nargs="+", default=[], help="probe.json of this network")
    command.add_argument("--data", metavar="SET", type=Path, nargs="+", default=[], help="where its sets lie now")
    command.add_argument("--licence", metavar="SPDX", help="of the weights (default: that of the data)")
    command.add_argument("--licence-checked", action="store_true", help="a person has read what no rule knows")
    command.add_argument(
        "--allow", metavar="NAME", action="append", default=[], help="what the HF folder may leave out (cls_norm …)"
    )
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given = parser().parse_args(arguments)
    from probing.errors import UsageError

    try:
        return release(given)
    except LicenceError as error:
        print(f"release: refused: {error}", file=sys.stderr)
        return 3
    except UsageError as error:
        print(f"release: {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"release: {error}", file=sys.stderr)
        return 1


def release(given: argparse.Namespace) -> int:
    """Check, write, say what was written."""
    from probing.source import open_source
    from releasing.lineage import lineage_of

    if given.output.exists():
        raise ValueError(f"{given.output}: exists already; a release makes a new folder")
    source = open_source(given.run)
    run = next((one for one in (given.run, given.run.resolve().parent.parent) if (one / "checkpoints").is_dir()), None)
    lineage = lineage_of(source, run, given.data)
    licence, checked = licence_and_checks(lineage, given.licence, given.licence_checked)
    reports = evaluations(given.probe, source.model)
    write(given.output, source.model, lineage, licence, checked, reports, given.allow)
    print(f"written: {given.output}, {lineage.update} updates, licence {' '.join(licence.split())[:80]}")
    if not reports:
        print("It holds no evaluation: give probe.json of tools/probe.py by --probe.")
    return 0


def licence_and_checks(lineage: Lineage, given: str | None, is_checked: bool) -> tuple[str, list[str]]:
    """The weights' licence, and what somebody has checked in place of a rule.

    Raises LicenceError where a licence forbids the release, or is not known and was not checked.
    """
    from releasing.licences import Judgement, judge, licence_of_weights

    judgements: list[Judgement] = []
    for one in lineage.sets:
        judgement = judge(one.about, one.digest)
        if not one.found:
            why = f"the set {one.digest[:16]}… is nowhere to be found, nor its licence: give its folder by --data"
            judgement = Judgement(judgement.name, None, None, why, frozenset())
        judgements.append(judgement)
    forbidden = [one.forbidden for one in judgements if one.forbidden]
    if forbidden:
        raise LicenceError("; ".join(forbidden))
    unknown = [one.unknown for one in judgements if one.unknown]
    if lineage.started_from is not None:
        unknown.append(f"it began with the weights {lineage.started_from}, whose licence no rule knows")
    if unknown and not is_checked:
        raise LicenceError(
            "; ".join(unknown) + ". Where a person has read the terms, and they allow it: --licence-checked"
        )
    try:
        return licence_of_weights(judgements, given), unknown
    except ValueError as error:
        raise LicenceError(str(error)) from None


def evaluations(files: Sequence[Path], model: VisionTransformer) -> list[Evaluation]:
    """Reports of tools/probe.py. ValueError for one of another network, or none."""
    from inference.network import network_of
    from probing import protocol
    from probing.report import markdown
    from releasing.card import Evaluation

    digest = network_of(model, "cpu", "fp32").digest if files else None
    found = []
    for file in files:
        try:
            report = json.loads(file.read_bytes())
            of, version = report["network"]["digest"], report["protocol"]["version"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file}: is no probe.json of tools/probe.py") from None
        if of != digest:
            raise ValueError(f"{file}: is of another network ({str(of)[:16]}…, this one is {str(digest)[:16]}…)")
        if version != protocol.VERSION:
            raise ValueError(f"{file}: is of protocol {version}, this program knows {protocol.VERSION}: probe again")
        try:
            found.append(Evaluation(report, markdown(report)))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file}: was written by another tools/probe.py ({error!r}): probe again") from None
    return found


def write(
    folder: Path,
    model: VisionTransformer,
    lineage: Lineage,
    licence: str,
    checked: Sequence[str],
    reports: Sequence[Evaluation],
    allow: Sequence[str],
) -> None:
    """The folder, whole or not at all."""
    from releasing.card import NOT_EVALUATED, provenance, sections

    from dinox_io.atomic import replace_folder
    from dinox_model.convert.export import save_pretrained

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by one that was killed
    known = provenance(lineage, licence)
    try:
        save_pretrained(model, temporary, format="hf", allow=allow, provenance=known)
        save_pretrained(model, temporary / "dinox", format="dinox", provenance=known)
        card = temporary / "README.md"
        card.write_text(card.read_text(encoding="utf-8") + sections(lineage, checked, reports), encoding="utf-8")
        (temporary / "lineage.json").write_bytes(
            as_json({**lineage.json(), "licence": licence, "checked": list(checked)})
        )
        (temporary / "evaluation.json").write_bytes(as_json({"reports": [one.report for one in reports]}))
        pages = [one.page for one in reports] or [NOT_EVALUATED + "\n"]
        (temporary / "evaluation.md").write_text("\n".join(pages), encoding="utf-8")
        replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def as_json(value: dict[str, Any]) -> bytes:
    """One spelling for equal values."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


if __name__ == "__main__":
    sys.exit(main())

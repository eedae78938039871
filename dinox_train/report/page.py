"""RUN/report.html: one page that says how a run goes, for whoever comes back to it after a night or a week.

Invariant: the page is a pure function of the files in the run folder. It is self-contained (pictures are inside,
nothing is loaded from anywhere, no script runs), and everything that comes from a file is escaped.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from dinox_io.atomic import write_atomically
from dinox_train.report.chart import Axis, Curve, draw_chart, trailing_mean
from dinox_train.report.history import History, read_history
from dinox_train.report.numerals import gibibytes, number, percent, whole
from dinox_train.report.style import STYLE
from dinox_train.report.verdict import findings, most_prototypes, summary

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
CAPTIONS = {
    "views": "What the network sees: one window a row, cut into global and local views, each with its own place, "
    "scale and HU window (level L, width W). The student has to say of every view what the teacher says of the other "
    "global one.",
    "patch_features": "Slices beside the first three principal components of their patch features, as red, green and "
    "blue. Equal colours are equal features, in all rows. A network that learns gives one organ one colour with sharp "
    "borders; noise, or a mere gradient across the image, says that it has not learnt yet.",
}


def write_report(run_folder: Path) -> Path:
    """Write RUN/report.html from what lies in the run folder, whole or not at all, and return its path.

    Missing files and missing values are left out, and the page says so where a reader would look for them. Raises
    OSError where the page cannot be written, ValueError where metrics.jsonl, events.jsonl or env.json are broken.
    """
    history = read_history(run_folder)
    sections = (_headline, _key_figures, _learning, _speed, _health, _optimizer, _events, _pictures, _background)
    body = "".join(part for section in sections for part in section(history))
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(_name(history))} · DINOX</title><style>{STYLE}</style></head>\n"
        f"<body><main>{body}</main></body></html>\n"
    )
    path = run_folder / "report.html"
    write_atomically(path, page.encode())
    return path


def _headline(history: History) -> Iterator[str]:
    config = history.config
    kind = f"DINOX run · {config.model.preset} · {config.precision}" if config else "DINOX run"
    state, why = history.state
    total = config.train.updates if config else None
    place = f"update {history.last_update:,}" + (f" of {total:,}" if total else "")
    found = findings(history)
    verdict = summary(history, found)
    yield f'<header><p class="kind">{escape(kind)}</p><h1>{escape(_name(history))}</h1>'
    why = why or ("when this page was written" if state == "running" else "")
    yield f'<p class="state"><b>{state}</b> · {place}{escape(f" · {why}" if why else "")}</p>'
    if total:
        yield f'<div class="bar"><i style="width:{100 * min(1.0, history.last_update / total):.1f}%"></i></div>'
    yield f'<p class="verdict {verdict.level}">{escape(verdict.text)}</p>'
    # What the verdict quotes need not stand below it again.
    others = [finding for finding in found if finding.text not in verdict.text]
    items = "".join(f'<li class="{finding.level}">{escape(finding.text)}</li>' for finding in others)
    yield f'<ul class="findings">{items}</ul></header>'


def _key_figures(history: History) -> Iterator[str]:
    epoch, images = history.last("epoch"), history.last("images")
    memory = np.nanmax(history.column("memory_bytes"), initial=0) if history.lines else 0
    evaluated = f"at update {_last_place(history, 'loss_val'):,}"
    entries = (
        ("images / s", _written(history.now("images_per_s"), number), "recent mean"),
        ("waiting for data", _written(history.now("data_wait_fraction"), percent), "of the time"),
        ("loss", _written(history.last("loss"), number), "last update"),
        ("loss on validation", _written(history.last("loss_val"), number), evaluated),
        ("knn_z", _written(history.last("knn_z"), number), "1 is best"),
        ("images seen", _written(images, whole), f"epoch {epoch:.0f} (from 0)" if epoch is not None else ""),
        ("memory", _written(memory or None, gibibytes), "highest"),
    )
    yield '<dl class="figures">'
    for name, value, note in entries:
        if value is not None:
            yield f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd>{escape(note)}</dd></div>"
    yield "</dl>"


def _learning(history: History) -> Iterator[str]:
    yield '<section><h2>Learning</h2><div class="charts wide">'
    noisy, mean = _with_mean(history, "loss", "loss")
    validation = Curve(name="validation", x=history.updates, y=history.column("loss_val"), colour="second")
    sentence = "The student's cross-entropy with the teacher's targets. It should fall and level off."
    if not np.isfinite(validation.y).any():
        sentence += f" {_no_validation(history)}"
    yield draw_chart(
        "Loss",
        [noisy, mean, validation],
        Axis(write=number),
        sentence=sentence,
        empty="No update is done yet.",
        resumed_at=_resumed(history),
        skipped_at=history.skipped,
    )
    knn = Curve(name="knn_z", x=history.updates, y=history.column("knn_z"), colour="second")
    if np.isfinite(knn.y).any():
        yield draw_chart(
            "Height of a slice, told from its features (knn_z)",
            [knn],
            Axis(write=number, include=(0.0, 1.0)),
            sentence="R² of a slice's height in its volume, predicted from its nearest neighbours among the training "
            "patients. Rising is good: memorising patients does not help it. Below 0 is worse than a guess.",
        )
    yield "</div></section>"


def _speed(history: History) -> Iterator[str]:
    yield '<section><h2>Speed</h2><div class="charts">'
    yield draw_chart(
        "Waiting for data",
        _with_mean(history, "data_wait_fraction", "share of the time"),
        Axis(write=percent, include=(0.0, 0.05)),
        sentence="How much of an update's time goes by waiting for the loader. Near 0 is good.",
    )
    yield draw_chart(
        "Images per second",
        _with_mean(history, "images_per_s", "images/s"),
        Axis(write=number, include=(0.0,)),
        sentence="Windows per second of wall time; crops of one window count once. Flat is good.",
    )
    yield "</div></section>"


def _health(history: History) -> Iterator[str]:
    most = most_prototypes(history)
    limit = f" With this batch it can reach at most {percent(most)}." if most else ""
    charts = (
        (
            "Teacher entropy",
            "teacher_entropy",
            Axis(write=number, include=(0.0, 1.0)),
            "How undecided the teacher is, as a share of ln K. Good: below 1 and steady. At 1 its targets are uniform "
            "and teach nothing; near 0 it is certain of everything.",
        ),
        (
            "Feature std",
            "feature_std",
            Axis(write=number, include=(0.0,)),
            "How far apart features of different images point. Good: well above 0, up to 1. At 0 all are the same.",
        ),
        (
            "Effective rank",
            "effective_rank",
            Axis(write=number, include=(0.0,)),
            "How many directions the features of one batch use; never more than it has global views. Good: high or "
            "rising. Close to 1 is a collapse.",
        ),
        (
            "Prototype use",
            "prototype_use",
            Axis(write=percent, include=(0.0,)),
            f"Share of the prototypes that some view of a batch chose. Good: steady. Near 0 it is a collapse.{limit}",
        ),
    )
    yield '<section><h2>Health</h2><p class="intro">A self-supervised network can cheat by saying the same of every '
    yield 'image. Its loss may look fine then; these four figures would show it.</p><div class="charts">'
    for title, field, axis, sentence in charts:
        curves = _with_mean(history, field, title.lower(), colour="third")
        yield draw_chart(title, curves, axis, sentence=sentence, empty="Not in the lines of this run.")
    yield "</div></section>"


def _optimizer(history: History) -> Iterator[str]:
    yield '<section><h2>Optimizer</h2><div class="charts">'
    rate = Curve(name="learning rate", x=history.updates, y=history.column("lr"))
    sentence = "As applied: warm-up, then its schedule."
    yield draw_chart("Learning rate", [rate], Axis(write=number, include=(0.0,)), sentence=sentence)
    skipped = history.skipped
    if skipped:
        shown = ", ".join(f"{update:,.0f}" for update in skipped[:8]) + (" …" if len(skipped) > 8 else "")
        note = f"{len(skipped)} of {len(history.lines):,} updates were not applied: {shown}."
    else:
        note = "Every update was applied."
    yield draw_chart(
        "Gradient norm",
        _with_mean(history, "grad_norm", "gradient norm"),
        Axis(write=number, logarithmic=True),
        sentence=f"Before clipping. Good: steady or falling; a rise over many updates precedes trouble. {note}",
        skipped_at=skipped,
    )
    yield "</div></section>"


def _events(history: History) -> Iterator[str]:
    if not history.events:
        return
    yield "<section><h2>Events</h2><table>"
    shown = history.events if len(history.events) <= 60 else history.events[:20] + history.events[-40:]
    for event in shown:
        cells = (event.get("update", ""), event.get("event", ""), event.get("text", ""))
        yield "<tr><th>{}</th><td>{}</td><td>{}</td></tr>".format(*(escape(str(cell)) for cell in cells))
    yield "</table>"
    if len(shown) < len(history.events):
        yield f"<p>{len(history.events) - len(shown)} events between these are in events.jsonl.</p>"
    yield "</section>"


def _pictures(history: History) -> Iterator[str]:
    found = [(path, path.read_bytes()) for path in sorted((history.folder / "pictures").glob("*.png"))]
    found = [(path, content) for path, content in found if content.startswith(PNG_SIGNATURE)]
    if not found:
        return
    order = list(CAPTIONS)
    found.sort(key=lambda item: (order.index(item[0].stem) if item[0].stem in order else len(order), item[0].name))
    yield "<section><h2>Pictures</h2>"
    for path, content in found:
        caption = escape(CAPTIONS.get(path.stem, path.stem))
        source = "data:image/png;base64," + base64.b64encode(content).decode()
        image = f'<img alt="{escape(path.stem)}" src="{source}">'
        yield f'<figure class="picture">{image}<figcaption>{caption}</figcaption></figure>'
    yield "</section>"


def _background(history: History) -> Iterator[str]:
    yield "<section><h2>How it was made</h2>"
    config = history.folder / "config.yaml"
    if config.exists():
        text = config.read_text(encoding="utf-8", errors="replace")
        yield f"<details><summary>Configuration</summary><pre>{escape(text)}</pre></details>"
    if history.environment is not None:
        rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in _flat(history.environment))
        yield f"<details><summary>Environment</summary><table>{rows}</table></details>"
    yield "</section><footer>Made from the files in the run folder; this page loads nothing from elsewhere.</footer>"


def _with_mean(history: History, field: str, name: str, colour: str = "first") -> tuple[Curve, Curve]:
    """The values of each update, faint, and their trailing mean over a fiftieth of the run."""
    x, y = history.updates, history.column(field)
    window = max(1, len(x) // 50)
    mean = f"mean of {window:,} updates" if window > 1 else name
    # With a window of one both are the same, and one curve is enough.
    noisy = y if window > 1 else np.full_like(y, np.nan)
    return (
        Curve(name=name, x=x, y=noisy, colour=colour, faint=True),
        Curve(name=mean, x=x, y=trailing_mean(y, window), colour=colour),
    )


def _no_validation(history: History) -> str:
    every = history.config.evaluate.every if history.config else None
    total = history.config.train.updates if history.config else None
    if every and total and history.last_update < min(every, total):
        return f"The first evaluation comes at update {min(every, total):,}."
    return "No validation curve: the shards hold no validation side (or no training side), so all patients train."


def _resumed(history: History) -> list[float]:
    return [float(event["update"]) for event in history.events if event.get("event") == "resumed"]


def _last_place(history: History, field: str) -> int:
    present = history.updates[np.isfinite(history.column(field))]
    return int(present[-1]) if len(present) else 0


def _name(history: History) -> str:
    return history.folder.resolve().name


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _written(value: float | None, write: Any) -> str | None:
    return None if value is None else write(value)

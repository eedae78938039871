"""Pictures of a run inside its page, and what tools/monitor.py found of its checkpoints.

Invariant: only PNG files are embedded, and of bounded size; what is larger is named instead.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from dinox_train.report.chart import Axis, Curve, draw_chart
from dinox_train.report.columns import Columns
from dinox_train.report.field_chart import FieldChart, curve_of
from dinox_train.report.history import History
from dinox_train.report.numerals import number, percent

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MOST_BYTES = 4 * 2**20
"""Of one picture."""
MOST_PICTURES = 12
CAPTIONS = {
    "views": "What the network sees: one window a row, cut into global and local views, each with its own place, "
    "scale and HU window (level L, width W). The student has to say of every view what the teacher says of the other "
    "global one.",
    "patch_features": "Slices beside the first three principal components of their patch features, as red, green and "
    "blue. Equal colours are equal features, in all rows. A network that learns gives one organ one colour with sharp "
    "borders; noise, or a mere gradient across the image, says that it has not learnt yet.",
    "pca": "The newest checkpoint that the monitor looked at: principal components of the patch features of its fixed "
    "slices, as colours.",
    "attention": "The same checkpoint: where the last block looks, the weights as the network computes them.",
    "pca_over_time": "The same slices over the run: colours are turned onto those before, so that what changes in the "
    "picture changes in the features.",
    "attention_over_time": "Attention of the same slices over the run, mean over heads.",
}
RETRIEVAL = "retrieval."
_DRIFT = {
    "gram_drift.first.rms": "from the first look",
    "gram_drift.previous.rms": "from the look before",
    "gram_drift.gram_teacher.rms": "from the Gram teacher",
}


def pictures(history: History) -> Iterator[str]:
    """What the run drew itself."""
    order = list(CAPTIONS)
    files = sorted((history.folder / "pictures").glob("*.png"), key=lambda path: path.name)
    files.sort(key=lambda path: order.index(path.stem) if path.stem in order else len(order))
    found = [part for path in files[:MOST_PICTURES] if (part := embedded(path, path.stem))]
    if found:
        yield f"<section><h2>Pictures</h2>{''.join(found)}</section>"


def monitor(history: History) -> Iterator[str]:
    """What a monitor found beside the run: nothing, where none looked."""
    looks = history.monitored.figures
    if not looks:
        return
    columns, newest = history.monitored.columns, looks[-1]
    held_out = newest.get("held_out")
    sentence = f"{len(looks):,} checkpoints so far, the newest of update {newest['update']:,}."
    if isinstance(held_out, bool):
        sentence += " The slices are of patients that the run " + ("never trains on." if held_out else "trains on.")
    yield f'<section><h2>Monitor</h2><p class="intro">{escape(sentence)}</p>'
    yield from _retrieval_table(newest)
    yield '<div class="charts">'
    yield _retrieval_chart(history, columns)
    drift = FieldChart(
        "Gram drift",
        _DRIFT,
        Axis(write=number, include=(0.0,)),
        "How far the similarities between patches have moved (root mean square). Falling towards the end is good; a "
        "rise from the Gram teacher says that dense features get worse.",
    )
    if drift.has_values(columns):
        yield drift.draw(columns, over=history.span)
    yield "</div>"
    for name, path in history.monitored.pictures:
        yield embedded(path, name)
    yield "</section>"


def embedded(path: Path, name: str) -> str:
    """The picture as a <figure>; empty where it is no PNG, or gone."""
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= MOST_BYTES else None
    except OSError:
        return ""
    caption = CAPTIONS.get(name, name)
    if content is None:
        return f'<p class="intro">{escape(path.name)} is too large for this page ({size / 2**20:.0f} MiB).</p>'
    if not content.startswith(PNG_SIGNATURE):
        return ""
    source = "data:image/png;base64," + base64.b64encode(content).decode()
    image = f'<img alt="{escape(name)}" src="{source}">'
    return f'<figure class="picture">{image}<figcaption>{escape(caption)}</figcaption></figure>'


def _retrieval_chart(history: History, columns: Columns) -> str:
    names = {"top1.value": ("found first", "first"), "top5.value": ("among five", "second")}
    curves = [curve_of(columns, RETRIEVAL + name, title, colour) for name, (title, colour) in names.items()]
    x, chance = columns.curve(RETRIEVAL + "top1.chance")
    curves.append(Curve(name="chance of the first", x=x, y=chance, colour="third"))
    return draw_chart(
        "A view finds its slice",
        curves,
        Axis(write=percent, include=(0.0, 1.0)),
        sentence="Among the slices of a fixed gallery, its own neighbours included. Rising is good.",
        empty="The monitor had too few slices to ask.",
        over=history.span,
    )


def _retrieval_table(newest: dict[str, Any]) -> Iterator[str]:
    """The newest figures, each with its interval and its chance level; beside them those of a network at its start."""
    retrieval = newest.get("retrieval")
    if not isinstance(retrieval, dict):
        return
    baseline = newest.get("baseline") or {}
    columns = {"now": retrieval}
    for name, title in (("random", "before training"), ("pixels", "pixels alone")):
        found = (baseline.get(name) or {}).get("retrieval") if isinstance(baseline, dict) else None
        if isinstance(found, dict):
            columns[title] = found
    heads = "".join(f"<th>{escape(name)}</th>" for name in ("", *columns, "chance"))
    yield f'<table class="numbers"><tr>{heads}</tr>'
    for name, title in (("top1", "found first"), ("top5", "among five"), ("mrr", "mean 1 / place")):
        cells = [_with_interval(figures.get(name)) for figures in columns.values()]
        one = retrieval.get(name)
        cells.append(_share(one.get("chance")) if isinstance(one, dict) else "")
        yield f"<tr><th>{title}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
    gallery, patients = retrieval.get("gallery"), retrieval.get("patients")
    yield f'</table><p class="note">A gallery of {escape(str(gallery))} slices of {escape(str(patients))} patients; '
    yield "in brackets the 95 % interval over patients.</p>"


def _with_interval(figure: Any) -> str:
    if not isinstance(figure, dict):
        return ""
    low, high = figure.get("low"), figure.get("high")
    interval = f" ({_share(low)}–{_share(high)})" if low is not None and high is not None else ""
    return _share(figure.get("value")) + interval


def _share(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) and not isinstance(value, bool) else ""

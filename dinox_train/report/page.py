"""RUN/report.html: one page that says how a run goes, for whoever comes back to it after a night or a week.

    page.py       the page, its head, the key figures and what stands at its end
    curves.py     charts of learning      machine.py   of speed and of the machine   field_chart.py, chart.py  one chart
    timeline.py   the events              pictures.py  pictures, and what a monitor found
    history.py    what the folder tells   columns.py, tail.py, monitored.py, kept.py       bounded, read on and on
    verdict.py    what the figures mean   style.py     how it looks

Invariant: the page is a pure function of the files in the run folder. It is self-contained (pictures are inside,
nothing is loaded from anywhere, no script runs), everything that comes from a file is escaped, and its size is bounded
however long the run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from dinox_io.atomic import write_atomically
from dinox_train.report.curves import health, learning, optimizer
from dinox_train.report.history import History, HistoryReader
from dinox_train.report.machine import machine, speed
from dinox_train.report.numerals import gibibytes, number, percent, whole
from dinox_train.report.pictures import monitor, pictures
from dinox_train.report.style import STYLE
from dinox_train.report.timeline import alarms_on, draw_timeline, event_table
from dinox_train.report.verdict import Finding, findings, summary

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
LONGEST_TEXT = 100_000
"""Characters of a file that is shown as it is."""


class Report:
    """The page of one run, written again and again: each time only what is new in the folder is read."""

    def __init__(self, run_folder: Path) -> None:
        self._folder = run_folder
        self._reader = HistoryReader(run_folder)

    def write(self) -> Path:
        """Write RUN/report.html from what lies in the run folder, whole or not at all, and return its path.

        Missing files and missing values are left out, and the page says so where a reader would look for them. Raises
        OSError where the page cannot be written, ValueError where metrics.jsonl, events.jsonl or env.json are broken.
        """
        history = self._reader.read()
        head = (_headline, _key_figures, _digest, learning, health, optimizer, speed, machine)
        sections = (*head, _events, monitor, pictures, _background)
        body = "".join(part for section in sections for part in section(history))
        page = (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(_name(history))} · DINOX</title><style>{STYLE}</style></head>\n"
            f"<body><main>{body}</main></body></html>\n"
        )
        path = self._folder / "report.html"
        write_atomically(path, page.encode())
        self._reader.keep()
        return path

    def verdict(self) -> str:
        """What the page says first, in words."""
        return _judged(self._reader.read())[1].text


def write_report(run_folder: Path) -> Path:
    """Write the page of a run once; `Report.write` says how."""
    return Report(run_folder).write()


def _headline(history: History) -> Iterator[str]:
    config = history.config
    kind = f"DINOX run · {config.model.preset} · {config.precision}" if config else "DINOX run"
    state, why = history.state
    total = config.train.updates if config else None
    place = f"update {history.last_update:,}" + (f" of {total:,}" if total else "")
    found, verdict = _judged(history)
    yield f'<header><p class="kind">{escape(kind)}</p><h1>{escape(_name(history))}</h1>'
    why = why or ("when this page was written" if state == "running" else "")
    yield f'<p class="state"><b>{state}</b> · {place}{escape(f" · {why}" if why else "")}</p>'
    if total:
        yield f'<div class="bar"><i style="width:{100 * min(1.0, history.last_update / total):.1f}%"></i></div>'
    yield f'<p class="verdict {verdict.level}">{escape(verdict.text)}</p>'
    items = [
        ("bad", f"Since update {event.get('update')}: {event.get('event')}: {event.get('text')}")
        for event in alarms_on(history.events)
    ]
    # What the verdict quotes need not stand below it again.
    items += [(finding.level, finding.text) for finding in found if finding.text not in verdict.text]
    items += [("watch", f"Not read: {text}") for text in history.unread[:5]]
    listed = "".join(f'<li class="{level}">{escape(text[:1000])}</li>' for level, text in items)
    yield f'<ul class="findings">{listed}</ul></header>'


def _judged(history: History) -> tuple[list[Finding], Finding]:
    """What the figures say, and the verdict: where an alarm is on, no run is healthy."""
    found = findings(history)
    verdict, on = summary(history, found), alarms_on(history.events)
    if verdict.level == "good" and on:
        verdict = Finding("watch", f"Worth a look: since update {on[0].get('update')} not all is well.")
    return found, verdict


def _key_figures(history: History) -> Iterator[str]:
    epoch, images = history.last("epoch"), history.last("images")
    evaluated = f"at update {history.lines.last_place('loss_val') or 0:,.0f}"
    rollbacks = sum(event.get("event") == "rollback" for event in history.events)
    entries = (
        ("images / s", _written(history.now("images_per_s"), number), "recent mean"),
        ("waiting for data", _written(history.now("data_wait_fraction"), percent), "of the time"),
        ("used of the peak", _written(history.now("model_flops_utilisation"), percent), "model FLOP utilisation"),
        ("loss", _written(history.last("loss"), number), "last update"),
        ("loss on validation", _written(history.last("loss_val"), number), evaluated),
        ("knn_z", _written(history.last("knn_z"), number), "1 is best"),
        ("knn_label", _written(history.last("knn_label"), number), "1 is best"),
        ("images seen", _written(images, whole), f"epoch {epoch:.0f} (from 0)" if epoch is not None else ""),
        ("memory", _written(history.largest("memory_bytes"), gibibytes), "highest"),
        ("went back", _written(rollbacks or None, whole), "rollbacks"),
    )
    yield '<dl class="figures">'
    for name, value, note in entries:
        if value is not None:
            yield f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd>{escape(note)}</dd></div>"
    yield "</dl>"


def _digest(history: History) -> Iterator[str]:
    text = _text_of(history.folder / "digest.txt")
    if text:
        yield f'<section><h2>Digest</h2><pre class="digest">{escape(text.strip())}</pre></section>'


def _events(history: History) -> Iterator[str]:
    if history.events:
        yield "<section><h2>Events</h2>"
        yield from draw_timeline(history.events, history.last_update)
        yield from event_table(history.events)
        yield "</section>"


def _background(history: History) -> Iterator[str]:
    yield "<section><h2>How it was made</h2>"
    config = _text_of(history.folder / "config.yaml")
    if config:
        yield f"<details><summary>Configuration</summary><pre>{escape(config)}</pre></details>"
    if history.environment is not None:
        rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in _flat(history.environment))
        yield f"<details><summary>Environment</summary><table>{rows}</table></details>"
    yield "</section><footer>Made from the files in the run folder; this page loads nothing from elsewhere.</footer>"


def _text_of(path: Path) -> str:
    """What a file holds, to a limit; empty where there is none."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …"


def _name(history: History) -> str:
    return history.folder.resolve().name


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _written(value: float | None, write: Callable[[float], str]) -> str | None:
    return None if value is None else write(value)

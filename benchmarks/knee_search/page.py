"""DIR/knee.html: one page that says where the knee is, why, and how that is known. Self-contained, light and dark.

Invariant: a pure function of knee.json; nothing is loaded from anywhere, no script runs, everything is escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from dinox_train.report.numerals import gibibytes, number, percent
from dinox_train.report.style import STYLE
from knee_search.outcome import duration
from knee_search.settings import of_record
from knee_search.svg import STYLE as DRAWINGS
from knee_search.svg import Bar, bars, curves

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
MOST_BARS = 16


def page_of(knee: Mapping[str, Any]) -> str:
    """The page as HTML. knee: what knee.json holds."""
    sections = (_headline, _figures, _rates, _parts, _contention, _memory, _table, _overlay, _background)
    body = "".join(part for section in sections for part in section(knee))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>The knee · DINOX</title><style>{STYLE}{DRAWINGS}</style></head>\n"
        f"<body><main>{body}</main></body></html>\n"
    )


def _headline(knee: Mapping[str, Any]) -> Iterator[str]:
    level = "good" if knee["complete"] and knee["knee"] and knee["knee"]["waits"] < 0.02 else "watch"
    yield f'<header><p class="kind">DINOX · settings for {escape(knee["machine"]["cpu"])}</p><h1>The knee</h1>'
    yield f'<p class="state">{escape(knee["date"])} · {escape(knee["config"])}</p>'
    yield f'<p class="verdict {level}">{escape(knee["sentence"])}</p>'
    items = "".join(f'<li class="watch">{escape(note)}</li>' for note in knee["notes"])
    yield f'<ul class="findings">{items}</ul></header>'


def _figures(knee: Mapping[str, Any]) -> Iterator[str]:
    chosen = knee["knee"]
    if not chosen:
        return
    error = chosen["error"]
    entries = (
        ("windows / s", number(chosen["windows_per_s"]), f"{number(chosen['low'])} to {number(chosen['high'])}"),
        ("of the best", percent(min(chosen["of_best"][0], 1.0)), f"the knee: within {percent(knee['tolerance'])}"),
        ("waiting for data", percent(chosen["waits"]), "of the time; below 2 % is good"),
        ("bound by", chosen["bound"] or "?", chosen["why"]),
        ("predicted", number(chosen["predicted"]) if chosen["predicted"] else "?", _signed(error) + " off"),
        ("memory", gibibytes(chosen["memory_bytes"]), "highest of its runs"),
        ("whole run", duration(chosen["hours"]), f"{chosen['updates']:,} updates"),
        ("noise", _or(knee["noise"], percent), "two runs of the same, A/A"),
    )
    yield '<dl class="figures">'
    for name, value, note in entries:
        yield f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd>{escape(note)}</dd></div>"
    yield "</dl>"


def _rates(knee: Mapping[str, Any]) -> Iterator[str]:
    points = knee["points"]
    if not points:
        return
    chosen = knee["knee"]["settings"] if knee["knee"] else None
    rows = [
        Bar(
            of_record(point["settings"]).words(),
            point["windows_per_s"],
            point["low"],
            point["high"],
            point["predicted"],
            "first" if point["settings"] == chosen else "second" if point["on_plateau"] else "other",
            str(point["bound"] or ""),
        )
        for point in points[:MOST_BARS]
    ]
    yield "<section><h2>Coupled runs</h2><p class='intro'>The trainer itself, with its loader. Bars: measured, with 95 "
    yield "% intervals; blue: the knee; orange: as fast, within the tolerance; rings: what the model of the machine "
    yield "predicts from the parts alone. Right: what bounds it.</p>"
    yield f'<figure class="chart">{bars(rows, "windows a second")}</figure></section>'


def _parts(knee: Mapping[str, Any]) -> Iterator[str]:
    computed = [one for one in knee["compute"] if one["windows_per_s"]]
    if not computed:
        return
    kinds = list(dict.fromkeys((one["compile"], one["checkpointing"], one["precision"]) for one in computed))
    colours = ("first", "second", "third")
    shown = [
        (
            "compute alone" + _kind_words(kind, kinds),
            colours[place % 3],
            [
                (one["micro_batch"], one["windows_per_s"])
                for one in computed
                if (one["compile"], one["checkpointing"], one["precision"]) == kind
            ],
        )
        for place, kind in enumerate(kinds)
    ]
    ceilings = [(f"decoding with {one['threads']} threads", "second", one["windows_per_s"]) for one in knee["decode"]]
    ceilings += [(name, "third", rate) for name, rate in _storage_windows(knee)]
    yield "<section><h2>The parts by themselves</h2><p class='intro'>What each part could do with nothing beside it. "
    yield "The lowest is the bound; what lies far above is only said.</p>"
    drawn = curves(shown, ceilings, across="images at a time", unit="windows a second")
    yield f'<figure class="chart">{drawn}</figure></section>'
    if knee["storage"]:
        rows = [
            (f"{one['threads']}", one["state"], percent(one["resident"]), number(one["gb_per_s"]))
            for one in knee["storage"]["rates"]
        ]
        yield _table_of(("threads", "storage", "in the page cache before", "GB/s"), rows)
        storage = knee["storage"]
        yield f'<p class="intro">{storage["file_system"]}, reads of {storage["read_bytes"]:,} bytes; '
        yield f"{storage['copies']} distinct copies of the set, {storage['files_bytes'] / 1e6:,.0f} MB, each read once"
        yield ".</p>" if storage["same_disk"] else ", on another disk than the set's.</p>"


def _storage_windows(knee: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Windows a second that the storage alone would give."""
    if not knee["storage"] or not knee["decode"]:
        return []
    size = knee["decode"][0]["read_bytes_per_window"]
    best: dict[str, float] = {}
    for one in knee["storage"]["rates"]:
        best[one["state"]] = max(best.get(one["state"], 0.0), one["gb_per_s"])
    return [(f"storage, {state}", 1e9 * rate / size) for state, rate in best.items()]


def _kind_words(kind: Sequence[str], kinds: Sequence[Sequence[str]]) -> str:
    """What tells this kind from the others."""
    names = ("compile", "checkpointing", "")
    varied = [place for place in range(3) if len({one[place] for one in kinds}) > 1]
    return "".join(f", {names[place]} {kind[place]}".replace("  ", " ") for place in varied)


def _contention(knee: Mapping[str, Any]) -> Iterator[str]:
    if not knee["beside"]:
        return
    rows = [
        (
            str(one["threads"]),
            _signed(one["compute_slower"]),
            f"{one['loader_keeps']:.0%} of {number(one['loader_alone'])}",
            f"{1e3 * one['kappa_s']:.3g} ms",
        )
        for one in knee["beside"]
    ]
    yield "<section><h2>Contention</h2><p class='intro'>Compute and loader beside each other, both as fast as they "
    yield "can: how much longer an update takes, what the loader keeps of its rate, and what each loaded window "
    yield "costs the compute. In a run the loader loads only what is needed.</p>"
    yield _table_of(("threads", "an update takes longer by", "the loader keeps, windows/s", "cost of a window"), rows)
    yield "</section>"


def _memory(knee: Mapping[str, Any]) -> Iterator[str]:
    rows = [
        (
            f"{one['micro_batch']}",
            f"compile {one['compile']}, checkpointing {one['checkpointing']}, {one['precision']}",
            one["status"] if one["status"] != "ok" else "fits" if one["fits"] else "too close to the limit",
            gibibytes(one["memory_bytes"]) if one.get("memory_bytes") else "",
            _or(one["windows_per_s"], number),
            _or(one.get("utilisation"), percent),
        )
        for one in knee["compute"]
    ]
    if rows:
        room = gibibytes(knee["probe"]["memory_bytes"])
        yield f"<section><h2>Compute and memory</h2><p class='intro'>{room} were free; a tenth of it must stay so. "
        yield "Share of the peak: operations a second beside the fastest matrix product measured here.</p>"
        head = ("images at a time", "how", "memory", "peak", "windows/s alone", "share of the peak")
        yield _table_of(head, rows) + "</section>"


def _table(knee: Mapping[str, Any]) -> Iterator[str]:
    rows = [
        (
            of_record(one["settings"]).words(),
            f"{number(one['windows_per_s'])} ({number(one['low'])} to {number(one['high'])})",
            _or(one["predicted"], number),
            _or(one["error"], _signed),
            percent(one["waits"]),
            f"{one['bound'] or '?'}: {one['why']}",
        )
        for one in knee["points"]
    ]
    rows += [
        (
            of_record(one["settings"]).words(),
            one["status"],
            "",
            "",
            "",
            one["said"].splitlines()[-1] if one["said"] else "",
        )
        for one in knee["failed"]
    ]
    if rows:
        yield "<section><h2>Prediction and measurement</h2>"
        head = ("settings", "windows/s", "predicted", "off by", "waits", "bound")
        yield _table_of(head, rows)
        yield f"<p class='intro'>{len(knee['unmeasured'])} more settings are possible and were only predicted.</p>"
        yield "</section>"


def _overlay(knee: Mapping[str, Any]) -> Iterator[str]:
    if knee["overlay"]:
        yield f"<section><h2>overlay.yaml</h2><pre>{escape(knee['overlay'])}</pre></section>"


def _background(knee: Mapping[str, Any]) -> Iterator[str]:
    machine, shards = knee["machine"], knee["set"]
    rows = [
        ("machine", f"{machine['cpu']}, {machine['logical_cores']} cores, {gibibytes(machine['memory_bytes'])}"),
        ("device", knee["probe"]["machine"] if knee["probe"] else ""),
        ("versions", ", ".join(f"{name} {version}" for name, version in knee["versions"].items())),
        ("set", f"{shards['about']}, {', '.join(digest[:16] for digest in shards['digests'])}"),
        ("read", shards["label"]),
        ("command", " ".join(knee["command"])),
    ]
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    yield f"<section><h2>How it was measured</h2><table>{cells}</table></section>"
    yield "<footer>Every point is in points.jsonl, all figures in knee.json. docs/knee.md has the rules.</footer>"


def _table_of(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    cells = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div style="overflow-x:auto"><table><tr>{top}</tr>{cells}</table></div>'


def _signed(value: float) -> str:
    return f"{value:+.1%}"


def _or(value: float | None, write: Any) -> str:
    return "" if value is None else write(value)

"""What happened to a run, as a timeline: a lane for each alarm and each kind of event, and the events in words.

Invariant: bounded in size, whatever the number of events; every string that comes in is escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from dinox_train.report.chart import Marks, joined, nice_ticks
from dinox_train.watch.concerns import CONCERNS

LANES = 16
"""At most; further kinds stand in the table only."""
FIRST_EVENTS, LAST_EVENTS = 20, 40
LONGEST_TEXT = 600
UNSHOWN = ("started", "stage")
"""Kinds without a lane: they say what is seen anyway."""
OVER = " over"
LASTING = ("alarm", *CONCERNS)
"""Kinds that begin, and are over with an event of the same name and this ending."""
BEGIN_ANEW = ("started", "resumed")
"""With these another process begins, which knows nothing of what the one before said of its machine."""
GRAVE = (*LASTING, "stopped", "masked", "not saved", "not rolled back", "rollback")

Event = dict[str, Any]
Span = tuple[float, float]


def marks_of(events: Sequence[Event], skipped: Sequence[float], last_update: int) -> Marks:
    """What of the events is drawn into the charts of the run: its alarms, not the concerns of its machine."""
    spans = [span for kind, _, lane in lasting(events, last_update) for span in lane if kind == "alarm"]
    return Marks(
        resumed=_places(events, "resumed"), rolled_back=_places(events, "rollback"), skipped=skipped, alarms=spans
    )


def concerns_of(events: Sequence[Event], last_update: int) -> Marks:
    """What of the events is drawn into the charts of the machine."""
    spans = [span for kind, _, lane in lasting(events, last_update) for span in lane if kind != "alarm"]
    return Marks(resumed=_places(events, "resumed"), alarms=spans, alarms_are="concern")


def lasting(events: Sequence[Event], last_update: int) -> list[tuple[str, str, list[Span]]]:
    """What begins and is over: kind, name of the lane, and from which update to which; alarms by name, then concerns.

    What is not over lasts to the last update.
    """
    begun: dict[tuple[str, str], float] = {}
    spans: dict[tuple[str, str], list[Span]] = {}
    for event in events:
        kind, place = str(event.get("event", "")), _place(event)
        if kind in BEGIN_ANEW and place is not None:
            for earlier in [what for what in begun if what[0] in CONCERNS]:
                spans[earlier].append((begun[earlier], max(begun.pop(earlier), place)))
        is_over = kind.endswith(OVER)
        what = _what(event, kind.removesuffix(OVER))
        if what[0] not in LASTING or place is None:
            continue
        if not is_over:
            begun.setdefault(what, place)
            spans.setdefault(what, [])
        elif what in begun:
            spans[what].append((begun.pop(what), place))
    for what, place in begun.items():
        spans[what].append((place, max(place, last_update)))
    return [(*what, found) for what, found in sorted(spans.items(), key=lambda item: LASTING.index(item[0][0]))]


def alarms_on(events: Sequence[Event]) -> list[Event]:
    """The events of alarms and concerns that have begun and are not over, in their order."""
    on: dict[tuple[str, str], Event] = {}
    for event in events:
        kind = str(event.get("event", ""))
        what = _what(event, kind.removesuffix(OVER))
        if kind in BEGIN_ANEW:
            on = {what: begun for what, begun in on.items() if what[0] not in CONCERNS}
        elif kind in LASTING:
            on.setdefault(what, event)
        elif kind.endswith(OVER):
            on.pop(what, None)
    return list(on.values())


def draw_timeline(events: Sequence[Event], last_update: int) -> Iterator[str]:
    """The lanes, over the updates from 0 to the last one."""
    ends = [place for event in events if (place := _place(event)) is not None]
    over = (0.0, max([1.0, float(last_update), *ends]))
    lanes = [("alarm", name, spans) for _, name, spans in lasting(events, last_update)]
    for kind in dict.fromkeys(str(event.get("event", "")) for event in events):
        if kind not in (*UNSHOWN, *LASTING) and not kind.endswith(OVER):
            spans = [(place, place) for place in _places(events, kind)]
            lanes.append(("grave" if kind in GRAVE else "plain", kind, spans))
    if not lanes:
        return
    yield '<div class="timeline">'
    for look, name, spans in lanes[:LANES]:
        found = joined(spans, over)
        bars = "".join(_bar(begin / over[1], end / over[1]) for begin, end in found)
        yield f'<div class="lane {look}"><b>{escape(_cut(name, 60))}</b><span>{bars}</span><u>{len(spans):,}</u></div>'
    ticks = [tick for tick in nice_ticks(0.0, over[1], count=4) if tick == round(tick)]
    labels = "".join(f'<i style="left:{100 * tick / over[1]:.2f}%">{tick:,.0f}</i>' for tick in ticks)
    yield f'<div class="lane scale"><b>update</b><span>{labels}</span><u></u></div></div>'


def event_table(events: Sequence[Event]) -> Iterator[str]:
    """The events in words: the first and the last ones, where there are many."""
    many = len(events) > FIRST_EVENTS + LAST_EVENTS
    for part in (events[:FIRST_EVENTS], events[-LAST_EVENTS:]) if many else (events,):
        yield '<table class="events">'
        for event in part:
            kind = str(event.get("event", ""))
            cells = (str(event.get("update", "")), kind, str(event.get("text", "")))
            look = ' class="grave"' if kind in GRAVE else ""
            yield "<tr{}><th>{}</th><td>{}</td><td>{}</td></tr>".format(
                look, *(escape(_cut(cell, LONGEST_TEXT)) for cell in cells)
            )
        yield "</table>"
        if many and part is not events and part[0] is events[0]:
            yield f"<p>… {len(events) - FIRST_EVENTS - LAST_EVENTS:,} events between these are in events.jsonl …</p>"


def _bar(begin: float, end: float) -> str:
    return f'<i style="left:{100 * begin:.2f}%;width:{100 * (end - begin):.2f}%"></i>'


def _places(events: Sequence[Event], kind: str) -> list[float]:
    return [place for event in events if event.get("event") == kind and (place := _place(event)) is not None]


def _place(event: Event) -> float | None:
    update = event.get("update")
    return float(update) if isinstance(update, int | float) and not isinstance(update, bool) else None


def _what(event: Event, kind: str) -> tuple[str, str]:
    """Its kind, and the name of its lane."""
    name = event.get("alarm") or str(event.get("text", "")).partition(":")[0]
    return kind, f"alarm: {name}" if kind == "alarm" else kind


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"

"""The charts of speed and of the machine: where the time of an update goes, and what RUN/system.jsonl says."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from dinox_train.report.chart import Axis, Marks
from dinox_train.report.field_chart import FieldChart, field_charts
from dinox_train.report.history import History
from dinox_train.report.numerals import gibibytes, number, percent
from dinox_train.report.timeline import concerns_of, marks_of

STAGE = "stage_s."
SMALL_PART = 0.005
"""Of an update: a stage below it is named but not drawn."""


def speed(history: History) -> Iterator[str]:
    """How fast the run is, and where its time goes."""
    yield "<section><h2>Speed</h2>"
    yield from _stage_bar(history)
    charts = (
        FieldChart(
            "Waiting for data",
            {"data_wait_fraction": "share of the time"},
            Axis(write=percent, include=(0.0, 0.05)),
            "How much of an update's time goes by waiting for the loader. Near 0 is good.",
            always=True,
            colour="first",
        ),
        FieldChart(
            "Images per second",
            {"images_per_s": "images/s"},
            Axis(write=number, include=(0.0,)),
            "Windows per second of wall time; crops of one window count once. Flat is good.",
            always=True,
            colour="first",
        ),
        FieldChart(
            "Model FLOP utilisation",
            {"model_flops_utilisation": "utilisation"},
            Axis(write=percent, include=(0.0,)),
            "What the products of an update would take at this machine's measured best, beside what it took.",
            colour="first",
        ),
    )
    yield from field_charts(
        history, Marks(resumed=marks_of(history.events, history.skipped, history.last_update).resumed), *charts
    )
    yield "</section>"


def machine(history: History) -> Iterator[str]:
    """What the machine said of itself while it trained: nothing, where nobody asked it."""
    system = history.system
    zero = (0.0,)
    throttled = system.mean("gpu_throttled")
    held = f" It was throttled in {percent(throttled)} of the readings." if throttled else ""
    charts = (
        FieldChart(
            "Busy",
            {"gpu_busy": "GPU", "cpu_busy": "CPU", "loader_cpu_share": "loader, of this program's CPU time"},
            Axis(write=percent, include=(0.0, 1.0)),
            "Share of the time. A GPU near 100 % is good; one that waits while the CPU is full wants a faster loader.",
        ),
        FieldChart(
            "Temperature",
            {"gpu_temperature_c": "GPU", "cpu_temperature_c": "CPU"},
            Axis(write=lambda value: f"{number(value)} °C"),
            "Steady is good. What a GPU bears is in its data sheet; many slow down from 80 to 90 °C on.",
        ),
        FieldChart(
            "GPU clock",
            {"gpu_clock_mhz": "clock"},
            Axis(write=lambda value: f"{number(value / 1e3)} GHz", include=zero),
            f"Flat under load is good; one that sinks while it is hot is throttled.{held}",
            colour="first",
            noisy=False,
        ),
        FieldChart(
            "GPU power",
            {"gpu_power_w": "power"},
            Axis(write=lambda value: f"{number(value)} W", include=zero),
            "As the driver says.",
            colour="first",
            noisy=False,
        ),
        FieldChart(
            "GPU memory",
            {
                "gpu_memory_allocated_bytes": "allocated",
                "gpu_memory_reserved_bytes": "reserved",
                "gpu_memory_free_bytes": "free",
            },
            Axis(write=gibibytes, include=zero, unit=2**30),
            "Allocated: by tensors. Reserved: what PyTorch holds for them. Free: for everybody. Flat is good.",
        ),
        FieldChart(
            "Host memory",
            {"host_free_bytes": "free", "swap_used_bytes": "swap used"},
            Axis(write=gibibytes, include=zero, unit=2**30),
            "Free memory that sinks day after day is a leak; swap that grows makes all slow.",
        ),
        FieldChart(
            "Pressure",
            {"pressure_memory": "memory", "pressure_io": "disk", "pressure_cpu": "CPU"},
            Axis(write=percent, include=zero),
            "Share of the time in which some program waited for it, as the kernel says. Memory should be at 0.",
        ),
        FieldChart(
            "Free disk",
            {"disk_free_bytes": "free"},
            Axis(write=gibibytes, include=zero, unit=2**30),
            "Where the run folder is. It sinks with checkpoints that stay.",
            colour="first",
            noisy=False,
        ),
    )
    charts = [chart for chart in charts if chart.has_values(system)]
    if not charts:
        return
    marks = concerns_of(history.events, history.last_update)
    yield '<section><h2>Machine</h2><div class="charts">'
    for chart in charts:
        yield chart.draw(system, over=history.span, marks=marks)
    yield "</div></section>"


def _stage_bar(history: History) -> Iterator[str]:
    """Where the time of an update goes, of those of late: one bar, and its parts in words."""
    found = {name.removeprefix(STAGE): history.now(name) for name in history.lines.names if name.startswith(STAGE)}
    parts = {name: seconds for name, seconds in found.items() if seconds}
    rate = history.now("images_per_s")
    if not parts or not rate or history.config is None:
        return
    whole = max(history.config.train.batch_size / rate, sum(parts.values()))
    parts = dict(sorted(parts.items(), key=lambda part: -part[1]))
    parts["the rest"] = whole - sum(parts.values())
    bars, names = [], []
    for index, (name, seconds) in enumerate(parts.items()):
        share, look = seconds / whole, "rest" if name == "the rest" else f"part{min(index, 7)}"
        if share >= SMALL_PART:
            bars.append(f'<i class="{look}" style="width:{100 * share:.2f}%"></i>')
        text = f"{name} {percent(share)}" if share >= SMALL_PART else f"{name} < 1 %"
        names.append(f'<span><i class="{look}"></i>{escape(text)}</span>')
    yield f'<figure class="chart stages"><figcaption><h3>Where the time of an update goes</h3><p>{_per_update(whole)}'
    yield "; the rest lies between these stages.</p></figcaption>"
    yield f'<div class="parts">{"".join(bars)}</div><p class="legend">{"".join(names)}</p></figure>'


def _per_update(seconds: float) -> str:
    return f"{number(seconds)} s an update" if seconds >= 1 else f"{number(1e3 * seconds)} ms an update"

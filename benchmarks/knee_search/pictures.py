"""DIR/coupled.png and parts.png: the page's two drawings as files, for a talk or a mail."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from knee_search.settings import of_record

MOST_BARS = 16


def write_pictures(knee: Mapping[str, Any], folder: Path) -> list[Path]:
    """The files that were written; none where nothing was measured that could be drawn."""
    from matplotlib.figure import Figure

    written = []
    if knee["points"]:
        rows = knee["points"][:MOST_BARS][::-1]
        picture = Figure(figsize=(10, 1.2 + 0.36 * len(rows)), layout="constrained")
        axes = picture.subplots()
        names = [of_record(one["settings"]).words() for one in rows]
        values = [one["windows_per_s"] for one in rows]
        spread = [
            [one["windows_per_s"] - one["low"] for one in rows],
            [one["high"] - one["windows_per_s"] for one in rows],
        ]
        chosen = knee["knee"]["settings"] if knee["knee"] else None
        colours = [
            "tab:blue" if one["settings"] == chosen else "tab:orange" if one["on_plateau"] else "silver" for one in rows
        ]
        axes.barh(names, values, xerr=spread, color=colours)
        predicted = [(one["predicted"], name) for one, name in zip(rows, names, strict=True) if one["predicted"]]
        if predicted:
            axes.plot(*zip(*predicted, strict=True), "o", mfc="none", color="tab:purple", label="predicted")
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        axes.set_xlim(left=0)
        axes.set_xlabel("windows a second, coupled runs (blue: the knee; orange: as fast)")
        written.append(folder / "coupled.png")
        picture.savefig(written[-1], dpi=120, metadata={"Software": ""})
    computed = [one for one in knee["compute"] if one["windows_per_s"]]
    if computed:
        picture = Figure(figsize=(8, 4), layout="constrained")
        axes = picture.subplots()
        for kind in dict.fromkeys((one["compile"], one["checkpointing"]) for one in computed):
            own = sorted(
                (one["micro_batch"], one["windows_per_s"])
                for one in computed
                if (one["compile"], one["checkpointing"]) == kind
            )
            label = f"compute, compile {kind[0]}, checkpointing {kind[1]}"
            axes.plot([str(size) for size, _ in own], [rate for _, rate in own], "o-", label=label)
        for one in knee["decode"]:
            axes.axhline(one["windows_per_s"], ls="--", lw=1, color="gray")
            axes.annotate(f"decoding, {one['threads']} threads", (0, one["windows_per_s"]), fontsize=8)
        axes.set_yscale("log")
        axes.set_xlabel("images at a time")
        axes.set_ylabel("windows a second, alone")
        axes.legend()
        written.append(folder / "parts.png")
        picture.savefig(written[-1], dpi=120, metadata={"Software": ""})
    return written

"""DIR/knee.json: what a search found, as JSON values: all that the page, the pictures and a notebook need.

    schema, version     "dinox-knee", 1
    complete            false: the search was interrupted, or ran out of time before its end
    date, command, machine, versions, config, set, tolerance, noise, notes
    storage             rates, cold and warm; null: not measured
    decode              [{threads, windows_per_s, read_s, decode_s, unfilter_s, … a window}]
    compute             [{micro_batch, …, status, windows_per_s, memory_bytes, fits}]
    beside              [{threads, compute_slower, loader_keeps, kappa_s}]: contention
    points              coupled runs, the fastest first: [{settings, windows_per_s, low, high, runs, waits, predicted,
                        parts, error, bound, why, on_plateau}]
    failed              coupled runs that failed: [{settings, status, said}]
    unmeasured          [{settings, predicted}]: possible, and left out
    knee                {settings, windows_per_s, low, high, of_best, waits, predicted, error, bound, why, memory_bytes,
                        hours, updates}; null: none yet
    sentence, overlay   to act on; the overlay as YAML text

Invariant: a pure function of what was found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dinox_train.config import Config
from dinox_train.config_file import written
from knee_search.bootstrap import rate_of, ratio_of
from knee_search.bounds import Seen, bound_of, update_bytes
from knee_search.points import Point
from knee_search.prediction import MachineModel
from knee_search.search import Found
from knee_search.settings import Settings

SCHEMA, VERSION = "dinox-knee", 1


def outcome(
    found: Found, config: Config, about: Mapping[str, Any], *, tolerance: float, free_batch: bool, free_precision: bool
) -> dict[str, Any]:
    """knee.json of what is known by now. about: date, command, machine, versions, config, overlay's name."""
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "version": VERSION,
        "complete": found.complete,
        **about,
        "tolerance": tolerance,
        "noise": found.noise,
        "notes": list(dict.fromkeys(found.notes)),
        "probe": found.probe,
        "storage": found.storage,
        "decode": [_decode(threads, one) for threads, one in sorted(found.decode.items())],
        "compute": [_compute(found, point) for point in found.compute.values()],
        "beside": _beside(found.model),
        "points": _points(found, tolerance),
        "failed": [
            {"settings": one.record(), "status": point.status, "said": point.said}
            for one, points in found.runs.items()
            for point in points
            if not point.is_ok
        ],
        "unmeasured": [
            {"settings": one.record(), "predicted": prediction.rate}
            for one, prediction in found.predicted.items()
            if one not in found.runs
        ],
        "knee": None,
        "sentence": "Nothing was run yet: the same command goes on.",
        "overlay": None,
    }
    if found.knee is not None:
        result["knee"] = knee = _knee(found, config, result["points"])
        result["sentence"] = sentence(knee, config, about, complete=found.complete)
        result["overlay"] = overlay_text(found.knee, knee, about, free_batch=free_batch, free_precision=free_precision)
    return result


def _decode(threads: int, one: Mapping[str, Any]) -> dict[str, Any]:
    windows = one["windows"]
    return {
        "threads": threads,
        "windows_per_s": one["windows_per_s"],
        "slices_per_window": one["decoded_bytes"] / one["slice_bytes"] / windows,
        "read_bytes_per_window": one["read_bytes"] / windows,
        "cpu_s_per_window": one["cpu_s_per_window"],
        **{f"{name}_per_window": one[name] / windows for name in ("read_s", "decode_s", "unfilter_s")},
    }


def _compute(found: Found, point: Point) -> dict[str, Any]:
    result, settings = point.result, dict(point.settings)
    if not point.is_ok:
        return settings | {"status": point.status, "said": point.said, "fits": False, "windows_per_s": None}
    rate = rate_of([result["update_s"]], result["batch_size"])
    assert found.probe is not None
    peak, flops = found.probe["peak_tflops"], found.probe["flops_per_image"]
    key = tuple(settings[name] for name in ("batch_size", "precision", "compile", "checkpointing"))
    largest = found.largest.get(key)  # type: ignore[arg-type] # of these four types
    return settings | {
        "status": point.status,
        "windows_per_s": rate.value,
        "low": rate.low,
        "high": rate.high,
        "utilisation": rate.value * flops / (peak * 1e12) if peak else None,
        "memory_bytes": result["device_memory_bytes"] or result["host_memory_bytes"],
        "fits": largest is not None and settings["micro_batch"] <= largest,
        "stage_s": result["stage_s"],
    }


def _beside(model: MachineModel | None) -> list[dict[str, Any]]:
    if model is None:
        return []
    return [
        {
            "threads": threads,
            "compute_slower": one.compute_beside_s / one.compute_alone_s - 1,
            "loader_keeps": one.loader_keeps,
            "loader_alone": one.loader_alone,
            "loader_beside": one.loader_beside,
            "kappa_s": one.kappa_s,
        }
        for threads, one in sorted(model.beside.items())
    ]


def _points(found: Found, tolerance: float) -> list[dict[str, Any]]:
    rates = found.rates()
    best = max(rates.values(), default=0.0)
    return [_point(found, one, best, tolerance) for one in sorted(rates, key=lambda one: -rates[one])]


def _point(found: Found, settings: Settings, best: float, tolerance: float) -> dict[str, Any]:
    runs = found.updates_s(settings)
    rate = rate_of(runs, settings.batch_size)
    prediction = found.predicted.get(settings)
    results = [point.result for point in found.runs[settings] if point.is_ok]
    spent = [sum(result["update_s"]) for result in results]
    waits = sum(result["waits"] * one for result, one in zip(results, spent, strict=True)) / sum(spent)
    seen = _seen(found, settings, results, waits, tolerance)
    bound, why = bound_of(seen) if seen else (None, "")
    return {
        "settings": settings.record(),
        "windows_per_s": rate.value,
        "low": rate.low,
        "high": rate.high,
        "runs": len(runs),
        "waits": waits,
        "memory_bytes": max(result["memory_bytes"] for result in results),
        "host_memory_bytes": max(result["host_memory_bytes"] for result in results),
        "resident": max((result["resident"] for result in results if result["resident"] is not None), default=None),
        "predicted": prediction and prediction.rate,
        "parts": prediction
        and {"io": prediction.io, "decode": prediction.decode, "compute": prediction.compute, "by": prediction.by},
        "error": prediction and prediction.rate / rate.value - 1,
        "bound": bound,
        "why": why,
        "on_plateau": rate.value >= (1 - tolerance) * best,
    }


def _seen(
    found: Found, settings: Settings, results: list[Mapping[str, Any]], waits: float, tolerance: float
) -> Seen | None:
    model, probe, prediction = found.model, found.probe, found.predicted.get(settings)
    if model is None or probe is None or prediction is None:
        return None
    compute_s = model.compute_s(settings.compute)
    assert compute_s is not None
    images = settings.batch_size
    activation = int(probe["activation_bytes_per_image"] * settings.micro_batch)
    moved = update_bytes(
        parameters=probe["parameters"],
        activation_bytes=activation,
        accumulation=settings.accumulation,
        weight_bytes=4 if settings.precision == "fp32" else 2,
    )
    bandwidth = probe["bandwidth"]["device"] or probe["bandwidth"]["host"]
    peak = probe["peak_tflops"]
    return Seen(
        waits=waits,
        read_s=sum(result["read_s"] for result in results),
        decode_s=sum(result["decode_s"] + result["unfilter_s"] for result in results),
        shares_cores=not probe["is_gpu"],
        compute_s=compute_s,
        kappa_s=prediction.kappa_s,
        larger_would_gain=_gain_of_larger(found, model, settings, compute_s),
        tolerance=tolerance,
        bytes_s=moved / (bandwidth * 1e9) if bandwidth else None,
        operations_s=images * probe["flops_per_image"] / (peak * 1e12) if peak else None,
    )


def _gain_of_larger(found: Found, model: MachineModel, settings: Settings, compute_s: float) -> float | None:
    """By what fraction the next larger micro-batch that does not fit would be faster."""
    batch, precision, _, compile, checkpointing = settings.compute
    largest = found.largest.get((batch, precision, compile, checkpointing))
    if largest is None or largest != settings.micro_batch:
        return None
    larger = [
        key[2]
        for key in found.compute
        if (key[0], key[1], key[3], key[4]) == (batch, precision, compile, checkpointing) and key[2] > largest
    ]
    if not larger:
        return None
    there = model.compute_s((batch, precision, min(larger), compile, checkpointing))
    return None if there is None else compute_s / there - 1


def _knee(found: Found, config: Config, points: list[dict[str, Any]]) -> dict[str, Any]:
    assert found.knee is not None
    knee = dict(next(one for one in points if one["settings"] == found.knee.record()))
    best = points[0]
    fastest = next(one for one in found.runs if one.record() == best["settings"])
    of_best = ratio_of(found.updates_s(found.knee), found.knee.batch_size, found.updates_s(fastest), fastest.batch_size)
    windows = config.train.updates * config.train.batch_size
    return knee | {
        "of_best": [of_best.value, of_best.low, of_best.high],
        "confirmed": found.confirmed is not None,
        "windows": windows,
        "updates": config.train.updates,
        "hours": windows / knee["windows_per_s"] / 3600,
    }


def sentence(knee: Mapping[str, Any], config: Config, about: Mapping[str, Any], *, complete: bool) -> str:
    """What to do, why, and what it will cost."""
    settings = Settings(**knee["settings"])
    more = []
    if settings.compile != "off":
        more.append(f"compile {settings.compile}")
    if settings.checkpointing != "none":
        more.append(f"activation checkpointing {settings.checkpointing}")
    threads = f"{settings.threads} decoder thread" + ("s" if settings.threads > 1 else "")
    pieces = f"{settings.accumulation} piece" + ("s" if settings.accumulation > 1 else "")
    named = f"--config {about['overlay_name']}"
    return (
        f"Train with {named}: {pieces} of {settings.micro_batch} images, {', '.join([threads, *more])}, "
        f"{settings.prefetch_mib} MiB read ahead. That makes {knee['windows_per_s']:.3g} windows/s "
        f"({knee['low']:.3g} to {knee['high']:.3g}), {min(knee['of_best'][0], 1.0):.0%} of the best that was measured, "
        f"and waits for data {knee['waits']:.1%} of the time; {knee['bound']} bounds it. {config.train.updates:,} "
        f"updates of {settings.batch_size} images will take {duration(knee['hours'])} and "
        f"{knee['memory_bytes'] / 2**30:.2g} GiB of memory."
        + ("" if complete else " The search was not finished: the same command goes on.")
    )


def duration(hours: float) -> str:
    """As people say it."""
    if hours < 1:
        return f"{max(60 * hours, 0.1):.2g} minutes"
    return f"{hours:.2g} hours" if hours < 48 else f"{hours / 24:.2g} days"


def overlay_text(
    settings: Settings, knee: Mapping[str, Any], about: Mapping[str, Any], *, free_batch: bool, free_precision: bool
) -> str:
    """A configuration file that lies over the user's own: what it says changes no result, unless that was freed."""
    freed = [name for name, free in (("batch_size", free_batch), ("precision", free_precision)) if free]
    lines = [
        f"# Measured on {about['machine']['cpu']}, {about['date'][:10]}, by benchmarks/knee.py:",
        f"# {knee['windows_per_s']:.4g} windows/s ({knee['low']:.4g} to {knee['high']:.4g}), bound by {knee['bound']}.",
        "# The same mathematics as without it."
        if not freed
        else f"# CHANGES WHAT IS LEARNT: {' and '.join(freed)} were freed.",
    ]
    tree = settings.tree(free_batch=free_batch, free_precision=free_precision)
    return "\n".join(lines) + "\n" + written(tree)

"""The search: which measurements are made, in which order, within the time that there is.

    probe -> storage, decode -> compute, with the largest micro-batch that fits -> contention -> coupled runs, halved
    again and again -> a longer run with the settings that were chosen

Invariant: every measurement goes through `Search.measured`, which looks first whether it was made before; so the search
that is started again takes the same way, and goes on where it was. What is left out for want of time is said.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from knee_search.axes import Axes
from knee_search.bootstrap import noise_of, rate_of
from knee_search.choice import halved, knee_of, largest_that_fits, spread
from knee_search.coupled import WARM_UPDATES
from knee_search.points import OK, OUT_OF_MEMORY, Point, PointFile
from knee_search.prediction import Beside, Compute, MachineModel, Prediction
from knee_search.settings import Settings

HEADROOM = 0.1
"""Of the memory, that must stay free: batches differ, and other processes grow."""
ISOLATED_SHARE = 0.4
"""Of the time: for what is measured by itself. The rest is for coupled runs."""
SHORT, LEAST_SHORT_S, MOST_SHORT_S = 0.01, 0.2, 8.0
"""What is measured by itself: its share of the time, and seconds at least and at most."""
LEAST_RUN_S, MOST_RUN_S = 1.0, 60.0
"""Seconds of updates that a coupled run is measured for, at least and at most."""
FIRST, LAST_FEW = 12, 2
"""Candidates that are run at first, at most, and at last."""
CONFIRMED = 100
"""Number of the repeats that confirm the choice: from here on."""
MOST_CONFIRMED = 3
WAITS = 0.02


class SearchFailed(ValueError):
    """Nothing can be measured: why, in the words of what failed."""


class Measures(Protocol):
    """What measures: knee_search/instruments.py, or a test's machine."""

    def __call__(self, kind: str, settings: Mapping[str, Any], repeat: int, seconds: float) -> Point:
        """seconds: that the measurement itself lasts, about."""
        ...


@dataclass
class Found:
    """What is known by now; complete where the search went to its end."""

    probe: Mapping[str, Any] | None = None
    storage: Mapping[str, Any] | None = None
    decode: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    compute: dict[Compute, Point] = field(default_factory=dict)
    beside: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    largest: dict[tuple[int, str, str, str], int | None] = field(default_factory=dict)
    """Of a batch size, precision, compile and checkpointing: the largest micro-batch that fits; None: none does."""
    runs: dict[Settings, list[Point]] = field(default_factory=dict)
    model: MachineModel | None = None
    predicted: dict[Settings, Prediction] = field(default_factory=dict)
    knee: Settings | None = None
    confirmed: Point | None = None
    notes: list[str] = field(default_factory=list)
    complete: bool = False

    def updates_s(self, settings: Settings) -> list[list[float]]:
        """Seconds of updates, run by run."""
        return [list(point.result["update_s"]) for point in self.runs.get(settings, []) if point.is_ok]

    def rates(self) -> dict[Settings, float]:
        """Windows a second of what was run, and did run."""
        return {one: rate_of(runs, one.batch_size).value for one in self.runs if (runs := self.updates_s(one))}

    @property
    def noise(self) -> float | None:
        """A/A, as a fraction."""
        return noise_of([self.updates_s(one) for one in self.runs])


class Search:
    """One search over `axes`; `found` is what it knows, at any time."""

    def __init__(
        self,
        axes_of_probe: Callable[[Mapping[str, Any]], Axes],
        measure: Measures,
        points: PointFile,
        *,
        seconds: float,
        tolerance: float,
        cold: bool = False,
        tell: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """axes_of_probe: the axes, when it is known what the machine is. seconds: for the search. tolerance: of the
        knee. cold: coupled runs read from the disk. tell: is told what is being measured."""
        self._axes_of, self._measure, self._points = axes_of_probe, measure, points
        self._seconds, self.tolerance, self._cold = seconds, tolerance, cold
        self._tell, self._clock = tell, clock
        self._begin_s = clock()
        self.found = Found()

    # --- measurements ------------------------------------------------------------------------------------------

    def measured(self, kind: str, settings: Mapping[str, Any], seconds: float, repeat: int = 0) -> Point:
        """The point, as it was measured before, or measured now and kept. A probe that failed is made anew: what was
        wrong may have been put right."""
        known = self._points.get(kind, settings, repeat)
        if known is None or (kind == "probe" and not known.is_ok):
            known = self._measure(kind, settings, repeat, seconds)
            self._points.add(known)
        return known

    def left_s(self, share: float = 1.0) -> float:
        """Of so large a first share of the time."""
        return share * self._seconds - (self._clock() - self._begin_s)

    def run(self) -> Found:
        """Search to the end, or to the end of the time. SearchFailed where nothing can be measured at all."""
        self._isolated()
        self._coupled()
        return self.found

    # --- each part by itself -----------------------------------------------------------------------------------

    def _isolated(self) -> None:
        found = self.found
        self._tell("looking at the machine")
        probe = self.measured("probe", {}, 0)
        if not probe.is_ok:
            raise SearchFailed(f"the run cannot begin here ({probe.status}):\n{probe.said}")
        found.probe = probe.result
        self.axes = axes = self._axes_of(probe.result)
        short = min(max(SHORT * self._seconds, LEAST_SHORT_S), MOST_SHORT_S)
        for threads in axes.threads:
            self._tell(f"decoding with {threads} threads")
            point = self.measured("decode", {"threads": threads}, short)
            if point.is_ok:
                found.decode[threads] = point.result
            else:
                found.notes.append(f"decoding with {threads} threads {_how(point)}")
        if not found.decode:
            raise SearchFailed(f"nothing could be decoded: {found.notes[-1]}")
        self._storage(short)
        for kind in axes.computes():
            self._compute(kind, short)
        if not any(point.is_ok for point in found.compute.values()):
            told = next(iter(found.compute.values()))
            raise SearchFailed(f"no update could be computed: {told.status}\n{told.said}")
        self._contention(short)
        found.model = self._model()

    def _storage(self, short: float) -> None:
        assert self.found.probe is not None
        if not self.found.probe["set"]["bytes"]:
            self.found.notes.append("the shards are not in a local folder: their storage was not measured by itself")
            return
        self._tell("reading the storage, cold and warm")
        most = max(self.axes.threads)
        settings = {"threads": sorted({1, most}), "read_bytes": int(self._read_bytes())}
        point = self.measured("storage", settings, short)
        if point.is_ok:
            self.found.storage = point.result
        else:
            self.found.notes.append(f"reading the storage {_how(point)}")

    def _read_bytes(self) -> float:
        """Of one read of the loader: a run's slices, compressed."""
        one = next(iter(self.found.decode.values()))
        assert self.found.probe is not None
        slices = one["decoded_bytes"] / one["slice_bytes"]
        return max(1.0, one["read_bytes"] / max(slices, 1.0) * self.found.probe["run_slices"])

    def _compute(self, kind: tuple[int, str, str, str], short: float) -> None:
        """The largest micro-batch that fits, then smaller ones, the largest first, while there is time."""
        batch, precision, compile, checkpointing = kind
        sizes = self.axes.micro_batch[batch]

        def point_of(micro_batch: int) -> Point:
            key: Compute = (batch, precision, micro_batch, compile, checkpointing)
            if key not in self.found.compute:
                self._tell(f"compute, {micro_batch} images, compile {compile}, checkpointing {checkpointing}")
                names = ("batch_size", "precision", "micro_batch", "compile", "checkpointing")
                self.found.compute[key] = self.measured("compute", dict(zip(names, key, strict=True)), short)
                if self.found.compute[key].status not in (OK, OUT_OF_MEMORY):
                    self.found.notes.append(f"compute with {micro_batch} images {_how(self.found.compute[key])}")
            return self.found.compute[key]

        is_first = not self.found.compute
        if not is_first and self.left_s(ISOLATED_SHARE) <= 0:
            self.found.notes.append(f"not tried for want of time: compile {compile}, checkpointing {checkpointing}")
            return
        largest = largest_that_fits(sizes, lambda size: self._fits(point_of(size)))
        self.found.largest[kind] = largest
        for size in reversed([size for size in sizes if largest is not None and size < largest]):
            if self.left_s(ISOLATED_SHARE) <= 0:
                break
            point_of(size)

    def _fits(self, point: Point) -> bool:
        """Whether an update ran, and left `HEADROOM` of the memory free."""
        if not point.is_ok:
            return False
        assert self.found.probe is not None
        taken = point.result["device_memory_bytes"] or point.result["host_memory_bytes"]
        return taken <= (1 - HEADROOM) * self.found.probe["memory_bytes"]

    def fits(self, key: Compute) -> bool:
        """Whether an update of these settings was found to fit, or is smaller than one that was."""
        batch, precision, micro_batch, compile, checkpointing = key
        largest = self.found.largest.get((batch, precision, compile, checkpointing))
        return largest is not None and micro_batch <= largest

    def _contention(self, short: float) -> None:
        fitting = {key: point for key, point in self.found.compute.items() if self.fits(key) and point.is_ok}
        if not fitting:
            raise SearchFailed("no micro-batch fits into the memory: a smaller network, smaller views or more memory")
        best = min(fitting, key=lambda key: _mean(fitting[key].result["update_s"]) / key[0])
        names = ("batch_size", "precision", "micro_batch", "compile", "checkpointing")
        for threads in dict.fromkeys((max(self.axes.threads), min(self.axes.threads))):
            self._tell(f"compute and {threads} decoding threads, each alone and together")
            settings = dict(zip(names, best, strict=True)) | {"threads": threads}
            point = self.measured("beside", settings, short / 3)
            if point.is_ok:
                self.found.beside[threads] = point.result
            else:
                self.found.notes.append(f"compute beside {threads} decoding threads {_how(point)}")

    def _model(self) -> MachineModel:
        found = self.found
        one = next(iter(found.decode.values()))
        return MachineModel(
            window_read_bytes=one["read_bytes"] / one["windows"],
            storage=self.storage_rate(),
            decode={threads: result["windows_per_s"] for threads, result in found.decode.items()},
            compute={
                key: _mean(point.result["update_s"]) / key[0] for key, point in found.compute.items() if point.is_ok
            },
            beside={
                threads: Beside(
                    compute_alone_s=_mean(result["update_alone_s"]) / result["batch_size"],
                    compute_beside_s=_mean(result["update_beside_s"]) / result["batch_size"],
                    loader_alone=_mean(result["loader_alone"]),
                    loader_beside=_mean(result["loader_beside"]),
                )
                for threads, result in found.beside.items()
            },
        )

    def storage_rate(self) -> float | None:
        """10^9 bytes/s, as a coupled run finds it: cold, unless what it reads stays in the page cache."""
        if self.found.storage is None:
            return None
        state = "cold" if self._cold or not self.stays_cached else "warm"
        rates = [one["gb_per_s"] for one in self.found.storage["rates"] if one["state"] == state]
        return max(rates, default=None)

    @property
    def stays_cached(self) -> bool:
        """Whether the set is small beside the memory: after its first pass a run reads it from there."""
        assert self.found.probe is not None
        return self.found.probe["set"]["bytes"] < 0.5 * self.found.probe["facts"]["host_memory_bytes"]

    # --- coupled runs ------------------------------------------------------------------------------------------

    def _coupled(self) -> None:
        found = self.found
        assert found.model is not None
        assert found.probe is not None
        for one in self.axes.candidates(self.fits, found.probe["set"]["window_bytes"]):
            prediction = found.model.predict(one)
            if prediction is not None:
                found.predicted[one] = prediction
        rates = {one: prediction.rate for one, prediction in found.predicted.items()}
        seconds = min(max(self.left_s() / 40, LEAST_RUN_S), MOST_RUN_S)
        self._tell(f"coupled runs: {len(rates)} settings are possible")
        most = int(0.5 * self.left_s() / self._cost_s(seconds))
        rung = spread(list(rates), rates, self.tolerance, min(max(most, LAST_FEW + 1), FIRST))
        ran = self._rung(rung, 0, seconds, share=0.75)
        repeat = 0
        while len(ran) > LAST_FEW and self.left_s(0.85) > 0:
            repeat += 1
            better = {one: rate for one, rate in found.rates().items() if one in ran}
            ran = self._rung(halved(better, self._indifference()), repeat, seconds, share=0.85)
        if not found.rates():
            raise SearchFailed(f"no coupled run could be measured: {found.notes[-1]}")
        self._confirm(seconds)
        found.complete = True

    def _cost_s(self, seconds: float) -> float:
        """What a coupled run of so many seconds takes in all: it starts as a compute point does, then warms up."""
        fitting = [point for point in self.found.compute.values() if point.is_ok]
        began = [max(point.wall_s - sum(point.result["update_s"]), 0.0) for point in fitting]
        updates = [_mean(point.result["update_s"]) for point in fitting]
        return seconds + _mean(began) + 2 * WARM_UPDATES * _mean(updates)

    def _rung(self, rung: list[Settings], repeat: int, seconds: float, *, share: float) -> list[Settings]:
        """Run each of them; those that did run. What there was no time for is said; at least two are run."""
        ran: list[Settings] = []
        for number, one in enumerate(rung):
            known = self._points.get("run", one.record(), repeat) is not None
            if not known and number >= LAST_FEW and self.left_s(share) <= 0:
                self.found.notes.append(f"for want of time {len(rung) - number} of {len(rung)} runs were left out")
                break
            self._tell(f"run {number + 1} of {len(rung)}, turn {repeat + 1}: {one.words()}")
            if self._run(one, repeat, seconds).is_ok:
                ran.append(one)
        return ran

    def _run(self, settings: Settings, repeat: int, seconds: float) -> Point:
        point = self.measured("run", settings.record(), seconds, repeat)
        runs = self.found.runs.setdefault(settings, [])
        if all(one.repeat != repeat for one in runs):
            runs.append(point)
        if not point.is_ok:
            self.found.notes.append(f"the run with {settings.words()} {_how(point)}")
        return point

    def _indifference(self) -> float:
        """What two rates may differ by and be the same: the tolerance, or the noise where that is larger."""
        return max(self.tolerance, self.found.noise or 0.0)

    def _confirm(self, seconds: float) -> None:
        """A longer run with the knee. Where another is the knee now, or it waits too long for data, with that one."""
        found = self.found
        for number in range(MOST_CONFIRMED):
            knee = self._knee()
            if found.confirmed is not None and knee == found.knee:
                break
            if number and self.left_s() <= 0:
                found.notes.append("for want of time the last choice was not confirmed by a longer run")
                break
            self._tell(f"a longer run with what was chosen: {knee.words()}")
            point = self._run(knee, CONFIRMED, 3 * seconds)
            if point.is_ok:
                found.knee, found.confirmed = knee, point
        found.knee = found.knee or self._knee()
        if self.waits(found.knee) >= WAITS:
            found.notes.append("every setting that is fast enough waits for data: the loader or the storage bounds it")

    def _knee(self) -> Settings:
        """The smallest settings on the plateau that do not wait for data; where all of them wait, the smallest."""
        rates = self.found.rates()
        best = max(rates.values())
        patient = {
            one: rate for one, rate in rates.items() if rate >= (1 - self.tolerance) * best and self.waits(one) < WAITS
        }
        return min(patient, key=lambda one: one.size) if patient else knee_of(rates, self.tolerance)

    def waits(self, settings: Settings) -> float:
        """Share of the time that its runs waited for data, the longest run counting most."""
        points = [point for point in self.found.runs.get(settings, []) if point.is_ok]
        spent = [sum(point.result["update_s"]) for point in points]
        return sum(point.result["waits"] * one for point, one in zip(points, spent, strict=True)) / sum(spent)


def _mean(values: Any) -> float:
    return sum(values) / len(values)


def _how(point: Point) -> str:
    """What became of a measurement that failed."""
    last = point.said.splitlines()[-1] if point.said else "it said nothing"
    assert point.status != OK
    return f"failed, {point.status}: {last}"

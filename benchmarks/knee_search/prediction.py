"""A model of the machine: windows a second of a coupled run, from rates that were measured one by one.

    one window takes    t = t_compute(m) + kappa        compute, slowed by what loads beside it
    windows/s           min(1 / t, what the decoders reach beside compute, storage / bytes of a window)

t_compute(m) = a + b / m for micro-batches of m images: `a` is work in proportion to images (its FLOPs at the machine's
ceiling, divided by the share of it that is reached), `b` what each micro-batch costs whatever its size. kappa, s: the
delay of the compute by each window that is loaded meanwhile, from contention that was measured. Where compute and
decoders share the cores it is about the cores' time that a window's decoding takes; on a GPU it is what the loader
takes of the memory's bandwidth and of the host.

Invariant: nothing of a coupled run goes into its own prediction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from knee_search.settings import Settings

IO, DECODE, COMPUTE = "io", "decode", "compute"
Compute = tuple[int, str, int, str, str]
"""See Settings.compute."""


@dataclass(frozen=True)
class Beside:
    """Contention: compute and loader, each alone and together."""

    compute_alone_s: float
    """Of a window."""
    compute_beside_s: float
    loader_alone: float
    """Windows a second."""
    loader_beside: float

    @property
    def kappa_s(self) -> float:
        """Seconds of delay of the compute for each window that was loaded beside it, at least 0."""
        loaded_meanwhile = self.loader_beside * self.compute_beside_s
        return max(0.0, (self.compute_beside_s - self.compute_alone_s) / loaded_meanwhile) if loaded_meanwhile else 0.0

    @property
    def loader_keeps(self) -> float:
        """The share of its rate that the loader keeps beside compute, at most 1."""
        return min(1.0, self.loader_beside / self.loader_alone) if self.loader_alone else 1.0


@dataclass(frozen=True)
class Prediction:
    """Windows a second of a coupled run, and of its parts."""

    rate: float
    io: float | None
    """None: the storage was not measured."""
    decode: float
    compute: float
    """With the contention."""
    kappa_s: float
    """Of it, s a window."""
    by: str
    """The smallest of them."""


@dataclass
class MachineModel:
    """What was measured of one machine."""

    window_read_bytes: float
    """That a window takes from the storage: slices for each window times their compressed bytes."""
    storage: float | None
    """10^9 bytes/s as a coupled run will find it."""
    decode: dict[int, float] = field(default_factory=dict)
    """Windows a second by threads, nothing beside."""
    compute: dict[Compute, float] = field(default_factory=dict)
    """Seconds of a window, nothing beside."""
    beside: dict[int, Beside] = field(default_factory=dict)
    """By threads."""

    def compute_s(self, wanted: Compute) -> float | None:
        """Seconds of a window: as measured, or from a + b / m through what was measured of the same kind."""
        if wanted in self.compute:
            return self.compute[wanted]
        batch, precision, micro, compile, checkpointing = wanted
        same = {
            one[2]: seconds
            for one, seconds in self.compute.items()
            if (one[0], one[1], one[3], one[4]) == (batch, precision, compile, checkpointing)
        }
        fitted = fit_micro_batches(same)
        return None if fitted is None else fitted[0] + fitted[1] / micro

    def decode_rate(self, threads: int) -> float:
        """Windows a second, nothing beside: as measured, or between and beyond what was."""
        return at_threads(self.decode, threads)

    def predict(self, settings: Settings) -> Prediction | None:
        """None where nothing like it was measured."""
        compute_s = self.compute_s(settings.compute)
        if compute_s is None or not self.decode:
            return None
        beside = self.beside.get(nearest_number(list(self.beside), settings.threads)) if self.beside else None
        kappa = beside.kappa_s if beside else 0.0
        keeps = beside.loader_keeps if beside else 1.0
        io = self.storage * 1e9 / self.window_read_bytes if self.storage and self.window_read_bytes else None
        rates = {
            IO: io,
            DECODE: self.decode_rate(settings.threads) * keeps,
            COMPUTE: 1 / (compute_s + kappa),
        }
        known = {name: rate for name, rate in rates.items() if rate is not None}
        by = min(known, key=lambda name: known[name])
        return Prediction(known[by], io, known[DECODE], known[COMPUTE], kappa, by)


def fit_micro_batches(seconds: Mapping[int, float]) -> tuple[float, float] | None:
    """(a, b), both at least 0, of a + b / m through seconds of a window by micro-batch, least squares of the relative
    error; with one micro-batch b is 0. None without any."""
    if not seconds:
        return None
    sizes = list(seconds)
    if len(sizes) == 1:
        return seconds[sizes[0]], 0.0
    # Relative errors: each equation is divided by its own seconds.
    rows = [(1 / seconds[m], 1 / (m * seconds[m])) for m in sizes]
    aa, ab, bb = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    a1, b1 = sum(row[0] for row in rows), sum(row[1] for row in rows)
    determinant = aa * bb - ab * ab
    if determinant > 1e-12 * aa * bb:
        a, b = (a1 * bb - b1 * ab) / determinant, (aa * b1 - ab * a1) / determinant
        if a >= 0 and b >= 0:
            return a, b
    # The better border: everything in proportion to images, or everything a micro-batch's.
    only_a, only_b = a1 / aa, b1 / bb
    error_a = sum((only_a * row[0] - 1) ** 2 for row in rows)
    error_b = sum((only_b * row[1] - 1) ** 2 for row in rows)
    return (only_a, 0.0) if error_a <= error_b else (0.0, only_b)


def at_threads(rates: Mapping[int, float], threads: int) -> float:
    """A rate between those of fewer and more threads; below the fewest in proportion; beyond the most, the most's.

    ValueError without rates.
    """
    if not rates:
        raise ValueError("no decoding was measured")
    known = sorted(rates)
    if threads <= known[0]:
        return rates[known[0]] * threads / known[0]
    for low, high in pairwise(known):
        if threads <= high:
            share = (threads - low) / (high - low)
            return rates[low] + share * (rates[high] - rates[low])
    return rates[known[-1]]


def nearest_number(numbers: Sequence[int], wanted: int) -> int:
    """The one that is nearest, the smaller of two."""
    return min(numbers, key=lambda one: (abs(one - wanted), one))

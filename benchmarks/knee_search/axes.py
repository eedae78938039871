"""Which values of each setting are tried: those that the user gives, or a few that the machine and the batch suggest.

Invariant: a micro-batch divides its global batch, and two settings that make the loader do the same are one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from dinox_io.loading import MAX_AHEAD
from dinox_train.config import Config
from knee_search.settings import CHECKPOINTING, COMPILE, PIN, Settings

MOST_VALUES = 6
"""Of one axis, where the user gives none."""
PRECISIONS = ("fp32", "bf16", "bf16_weights")
SMALL_PREFETCH_MIB = 64


class AxesError(ValueError):
    """A value that cannot be tried: which, why, what to give."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """The axes as the command line has them; None: as the machine suggests."""

    micro_batch: tuple[int, ...] | None = None
    threads: tuple[int, ...] | None = None
    prefetch_mib: tuple[int, ...] | None = None
    pool_mib: tuple[int, ...] | None = None
    pin: tuple[str, ...] | None = None
    compile: tuple[str, ...] | None = None
    checkpointing: tuple[str, ...] | None = None
    batch_size: tuple[int, ...] | None = None
    precision: tuple[str, ...] | None = None
    free_batch: bool = False
    free_precision: bool = False


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the suggestions depend on."""

    cores: int
    is_gpu: bool
    unified: bool
    can_compile: bool


@dataclass(frozen=True, kw_only=True)
class Axes:
    """The values that are tried, ascending; `micro_batch` of each batch size."""

    micro_batch: dict[int, tuple[int, ...]]
    threads: tuple[int, ...]
    prefetch_mib: tuple[int, ...]
    pool_mib: tuple[int, ...]
    pin: tuple[str, ...]
    compile: tuple[str, ...]
    checkpointing: tuple[str, ...]
    precision: tuple[str, ...]

    def computes(self) -> list[tuple[int, str, str, str]]:
        """(batch_size, precision, compile, checkpointing): for each of them a largest micro-batch is looked for. The
        plainest come first."""
        return list(product(self.micro_batch, self.precision, self.compile, self.checkpointing))

    def candidates(self, fits: Callable[[tuple[int, str, int, str, str]], bool], window_bytes: int) -> list[Settings]:
        """All combinations whose update fits into memory, from small to large; of those that read equally far ahead,
        the one with the least memory. window_bytes: of a decoded window."""
        found: dict[tuple[Any, ...], Settings] = {}
        for batch_size, precision, compile, checkpointing in self.computes():
            for micro_batch in self.micro_batch[batch_size]:
                if not fits((batch_size, precision, micro_batch, compile, checkpointing)):
                    continue
                for threads, prefetch, pool, pin in product(self.threads, self.prefetch_mib, self.pool_mib, self.pin):
                    one = Settings(
                        batch_size=batch_size,
                        precision=precision,
                        micro_batch=micro_batch,
                        threads=threads,
                        prefetch_mib=prefetch,
                        pool_mib=pool,
                        pin=pin,
                        compile=compile,
                        checkpointing=checkpointing,
                    )
                    same = (replace(one, prefetch_mib=0), ahead_of(one, window_bytes))
                    found[same] = min(found.get(same, one), one, key=lambda each: each.size)
        return sorted(found.values(), key=lambda each: each.size)


def ahead_of(settings: Settings, window_bytes: int) -> int:
    """Micro-batches that the loader makes ahead (dinox_io/loading.py)."""
    return min(max((settings.prefetch_mib << 20) // (settings.micro_batch * window_bytes), 1), MAX_AHEAD)


def axes_of(given: Given, config: Config, machine: Machine) -> Axes:
    """The values that are tried. AxesError for one that is none, or that would change the mathematics unasked."""
    _check_freedom(given)
    batch, data, execution = config.train.batch_size, config.data, config.execution
    batches = (batch,)
    if given.free_batch:
        batches = given.batch_size or (batch, 2 * batch, 4 * batch)
    precisions = (config.precision,)
    if given.free_precision:
        precisions = given.precision or (("fp32", "bf16") if machine.is_gpu else (config.precision, "bf16"))
    compiles = (execution.compile,)
    if machine.is_gpu and machine.can_compile:
        compiles = ("off", "blocks", execution.compile)
    checkpointings = ("none", "block", execution.activation_checkpointing)
    pins = ("off", "on") if machine.is_gpu and not machine.unified else (data.pin,)
    return Axes(
        micro_batch={size: _micro_batches(given.micro_batch, size) for size in sorted(set(batches))},
        threads=_ascending("threads", given.threads or thinned(_powers(machine.cores), MOST_VALUES)),
        prefetch_mib=_ascending("prefetch-mib", given.prefetch_mib or (SMALL_PREFETCH_MIB, data.prefetch_mib)),
        pool_mib=_ascending("pool-mib", given.pool_mib or (data.pool_mib,)),
        pin=_named("pin", given.pin or pins, PIN),
        compile=_named("compile", given.compile or compiles, COMPILE),
        checkpointing=_named("checkpointing", given.checkpointing or checkpointings, CHECKPOINTING),
        precision=_named("precision", precisions, PRECISIONS),
    )


def _check_freedom(given: Given) -> None:
    if given.batch_size and not given.free_batch:
        raise AxesError("--batch-size changes what a run learns: give --free-batch too if you mean it")
    if given.precision and not given.free_precision:
        raise AxesError("--precision changes what a run learns: give --free-precision too if you mean it")


def divisors(number: int) -> list[int]:
    """Ascending."""
    return [part for part in range(1, number + 1) if number % part == 0]


def thinned(values: Sequence[int], most: int) -> tuple[int, ...]:
    """At most so many of ascending values, the largest among them, the others evenly below it, the smallest first."""
    if len(values) <= most:
        return tuple(values)
    step = (len(values) - 1) / (most - 1)
    return tuple(values[round(number * step)] for number in range(most))


def _micro_batches(given: Sequence[int] | None, batch: int) -> tuple[int, ...]:
    possible = divisors(batch)
    if given is None:
        halves = [part for part in possible if (batch // part) & (batch // part - 1) == 0]
        return tuple((halves if len(halves) > 1 else possible)[-MOST_VALUES:])
    fitting = sorted({value for value in given if value in possible})
    if not fitting:
        raise AxesError(
            f"--micro-batch {','.join(map(str, given))}: none divides the global batch of {batch} images, whose "
            f"divisors are {', '.join(map(str, possible))}"
        )
    return tuple(fitting)


def _powers(cores: int) -> list[int]:
    powers = [1 << bit for bit in range(cores.bit_length()) if 1 << bit <= cores]
    return sorted({*powers, cores})


def _ascending(name: str, values: Sequence[int]) -> tuple[int, ...]:
    if any(value < 1 for value in values):
        raise AxesError(f"--{name}: values must be at least 1")
    return tuple(sorted(set(values)))


def _named(name: str, values: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    unknown = [value for value in values if value not in known]
    if unknown:
        raise AxesError(f"--{name} {unknown[0]}: there are {', '.join(known)}")
    return tuple(sorted(set(values), key=known.index))

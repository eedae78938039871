"""A result file: what was measured, on what, how, and what came out. JSON, version 1.

    schema, version      "dinox-benchmark", 1
    benchmark            which one: codec, pack …
    date                 UTC, ISO 8601
    command, commit      command line (of paths elsewhere only the names), git commit ("+changes": files were edited)
    machine              cpu, logical_cores, memory_bytes, architecture, system
    conditions           core (held to; -1: not), load_before, load_after, rounds, round_s, seed …; sizes: all that were
                         counted, [{family, name, bytes}]
    versions             {environment: {package: version}}, environments "dinox" and "peers"
    notes                what a reader must know before a figure is used
    data                 what was measured on: [{name, …, sha256}], or sizes; results on other data are not compared
    noise_floor          fraction below which a difference of timings is nothing (A/A), or null: nothing was timed
    contenders           [{name, environment, seconds: [s, …], amounts: [work, …], facts}], a value a round
    figures              [{name, value, low, high, unit, better, noise, gate}]; low, high: 95 % interval of the median;
                         better: "higher" or "lower"; noise: fraction; gate: compare.py fails if it is worse
    targets              [{text, figure, bound, limit, value, passed}]; bound "at least" or "at most"

Invariant: a file that is read has exactly these members, of these types. Standard library only: kernels are measured on
machines where nothing but torch and numpy is installed.
"""

from __future__ import annotations

import datetime
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import machine
from harness import Measurement
from intervals import Interval

SCHEMA, VERSION = "dinox-benchmark", 1
MAX_FILE_BYTES = 64 << 20


class ResultError(ValueError):
    """No result file, or not one of this version; the message names the file and what is wrong."""


@dataclass(frozen=True)
class Figure:
    """One number of a result; see the file's docstring."""

    name: str
    value: float
    low: float
    high: float
    unit: str
    better: str
    noise: float
    gate: bool


@dataclass(frozen=True)
class Target:
    """What a figure should reach, and whether it did."""

    text: str
    figure: str
    bound: str
    limit: float
    value: float
    passed: bool


@dataclass
class Result:
    """A result file's content; made by `begin`, filled, then written."""

    benchmark: str
    date: str
    command: list[str]
    commit: str
    machine: dict[str, Any]
    conditions: dict[str, Any]
    versions: dict[str, dict[str, str]]
    notes: list[str]
    data: list[dict[str, Any]]
    noise_floor: float | None = None
    contenders: list[dict[str, Any]] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)

    def take(self, measured: Measurement) -> None:
        """Keep the samples of a measurement, and the noise where a contender ran twice."""
        self.noise_floor = max(self.noise_floor or 0.0, measured.noise_floor())
        for name, samples in measured.samples.items():
            self.contenders.append(
                {
                    "name": name,
                    "environment": measured.environments[name],
                    "seconds": [sample.seconds for sample in samples],
                    "amounts": [sample.amount for sample in samples],
                    "facts": measured.facts[name],
                }
            )

    def timed(self, name: str, interval: Interval, unit: str, *, better: str = "higher", gate: bool = False) -> Figure:
        """Add a figure that was timed; its noise is the floor (so `take` comes first).

        Gate ratios only: rates of two days differ by more than the noise of either.
        """
        assert self.noise_floor is not None
        figure = Figure(name, interval.value, interval.low, interval.high, unit, better, self.noise_floor, gate)
        self.figures.append(figure)
        return figure

    def exact(self, name: str, value: float, unit: str, *, better: str = "higher", gate: bool = False) -> Figure:
        """Add a figure that would come out the same again."""
        figure = Figure(name, value, value, value, unit, better, 0.0, gate)
        self.figures.append(figure)
        return figure

    def target(self, text: str, figure: Figure, bound: str, limit: float) -> None:
        """Add a target: the figure's value is "at least" or "at most" the limit."""
        passed = figure.value >= limit if bound == "at least" else figure.value <= limit
        self.targets.append(Target(text, figure.name, bound, limit, figure.value, passed))


def begin(
    benchmark: str, *, data: Sequence[Mapping[str, Any]], conditions: Mapping[str, Any],
    versions: Mapping[str, dict[str, str]],
) -> Result:  # fmt: skip
    """A result without figures, with all that is known before something is measured."""
    return Result(
        benchmark=benchmark,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=machine.command_line(),
        commit=machine.commit(),
        machine=machine.describe(),
        conditions={**conditions, "load_before": machine.load()},
        versions=dict(versions),
        notes=[],
        data=[dict(one) for one in data],
    )


def finish(result: Result, path: Path) -> None:
    """Note the load at the end, and write the file, whole or not at all."""
    after = machine.load()
    result.conditions["load_after"] = after
    result.notes += machine.busy_warning(result.conditions["load_before"], after)
    content = {"schema": SCHEMA, "version": VERSION, **asdict(result)}
    _parse(content, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not dinox_io.atomic: what dinox_io imports is missing on the machines of the kernels.
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read(path: Path) -> Result:
    """A result file. ResultError if it is not one, of this version, with all its members of the right types."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ResultError(f"{path} is too large for a result file")
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ResultError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ResultError(f"{path} is not JSON: {error}") from None
    return _parse(content, str(path))


def lines(result: Result) -> list[str]:
    """The figures, targets and notes, to print."""
    width = max((len(one.name) for one in result.figures), default=0)
    said = [f"{one.name:{width}}  {_spelled(one)} {one.unit}" for one in result.figures]
    if result.noise_floor is not None:
        said.append(f"noise: a contender differs from itself by up to {100 * result.noise_floor:.1f} %")
    for one in result.targets:
        word = "reached" if one.passed else "MISSED"
        said.append(f"{word}: {one.text}: {one.value:.3f}, should be {one.bound} {one.limit:g}")
    return said + [f"note: {note}" for note in result.notes]


def _spelled(figure: Figure) -> str:
    exact = figure.low == figure.high == figure.value
    return f"{figure.value:.4g}" + ("" if exact else f" ({figure.low:.4g} to {figure.high:.4g})")


_TYPES: dict[str, Any] = {
    "benchmark": str, "date": str, "command": [str], "commit": str, "machine": dict, "conditions": dict,
    "versions": {str: dict}, "notes": [str], "data": [dict], "noise_floor": (float, int, type(None)),
    "contenders": [{"name": str, "environment": str, "seconds": [float], "amounts": [float], "facts": dict}],
    "figures": [{
        "name": str, "value": float, "low": float, "high": float, "unit": str, "better": ("higher", "lower"),
        "noise": float, "gate": bool,
    }],
    "targets": [{
        "text": str, "figure": str, "bound": ("at least", "at most"), "limit": float, "value": float, "passed": bool,
    }],
}  # fmt: skip
"""A type, [type of the elements], {member: type} with exactly these members, {str: type}, or a tuple of choices."""


def _parse(content: Any, name: str) -> Result:
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ResultError(f"{name} is no result of a benchmark")
    if content.get("version") != VERSION:
        raise ResultError(f"{name} is of version {content.get('version')}; this program reads version {VERSION}")
    body = {key: value for key, value in content.items() if key not in ("schema", "version")}
    assert set(_TYPES) == {one.name for one in fields(Result)}
    _check(body, _TYPES, name)
    for one in body["contenders"]:
        if len(one["seconds"]) != len(one["amounts"]):
            raise ResultError(f"{name}: contender {one['name']} has not an amount for each of its seconds")
    values = {
        **body,
        "figures": [Figure(**one) for one in body["figures"]],
        "targets": [Target(**one) for one in body["targets"]],
    }
    return Result(**values)


def _check(value: Any, wanted: Any, where: str) -> None:
    if isinstance(wanted, dict) and set(wanted) == {str}:
        _check(value, dict, where)
        for key, one in value.items():
            _check(one, wanted[str], f"{where}: {key}")
    elif isinstance(wanted, dict):
        if not isinstance(value, dict) or set(value) != set(wanted):
            different = sorted(set(wanted) ^ set(value)) if isinstance(value, dict) else ["no object"]
            raise ResultError(f"{where}: wrong or missing members: {', '.join(different)}")
        for key, one in wanted.items():
            _check(value[key], one, f"{where}: {key}")
    elif isinstance(wanted, list):
        _check(value, list, where)
        for index, one in enumerate(value):
            _check(one, wanted[0], f"{where}[{index}]")
    elif isinstance(wanted, tuple):
        choices = [one for one in wanted if not isinstance(one, type)]
        if value not in choices and not any(isinstance(one, type) and type(value) is one for one in wanted):
            raise ResultError(f"{where}: {value!r} is none of {wanted}")
    elif wanted is float:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ResultError(f"{where}: {value!r} is no finite number")
    elif type(value) is not wanted:
        raise ResultError(f"{where}: {value!r} is no {wanted.__name__}")

"""Which tiles a kernel runs with: a table by architecture, kernel, head width, length, dtype and Triton's version.

The table is data (`tiles.json`), found by compiling and, where a GPU was at hand, by timing; never while training. A
kernel that has no entry for an architecture is not to be used there: `tiles_for` gives None, `instead` names the
backend that dispatch takes, and the compile table says the same.

The file maps each kernel to its rows, and **the first row that fits is taken**. A row's conditions, each left out
where it does not matter: `arch` (list of names), `head_dim` (list), `dtype` (list of fp32, fp16, bf16), `length`
([least, most] tokens, both inclusive, null for open), `triton` (list of "3.7"). Then either how to compile it (`sizes`,
`num_warps`, `num_stages`, `waves_per_eu`) or, where it cannot be, `instead` (a backend's name) and `because`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinox_model.fields import nearest
from dinox_model.kernels.language import triton

TABLE = Path(__file__).with_name("tiles.json")


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How one kernel is compiled."""

    sizes: Mapping[str, int]
    """Compile-time arguments of the kernel by name, such as {"BLOCK_M": 128, "BLOCK_N": 64}."""
    num_warps: int = 4
    num_stages: int = 1
    waves_per_eu: int = 0
    """AMD only; 0 leaves it to the compiler."""

    def arguments(self) -> dict[str, Any]:
        """All of it as keyword arguments of a launch: `kernel[grid](..., **tiles.arguments())`."""
        waves = {"waves_per_eu": self.waves_per_eu} if self.waves_per_eu else {}  # only AMD's backend knows the word
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return {**self.sizes, **options, **waves}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One way a kernel is shipped: all that compiling it without a GPU needs. Each file of kernels has
    `launches(arch)`, which yields them."""

    kernel: str
    """Name in the table: attention_forward, attention_keys_values, rotate …"""
    function: Any
    """What `language.kernel` made."""
    signature: Mapping[str, str]
    """Type of each argument that is no compile-time constant, in order: "*bf16", "i32", "fp32"."""
    constants: Mapping[str, Any]
    """Compile-time arguments other than the tiles' sizes."""
    aligned: tuple[str, ...]
    """Arguments (pointers, strides) that are multiples of 16 at each launch."""
    tiles: Tiles
    dtype: str
    """fp32 | fp16 | bf16 of the data."""
    head_dim: int | None = None
    uses_dot: bool = False
    """16-bit matrix products are in it: matrix instructions must come out, and nothing may spill."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else tells two launches of a kernel apart (causal, dropout …), for the table."""


@dataclass(frozen=True)
class Instead:
    """A cell of the table where a kernel is not shipped: no tile of it compiles well there."""

    backend: str
    because: str


def tiles_for(
    kernel: str, *, arch: str, dtype: str, head_dim: int | None = None, length: int | None = None
) -> Tiles | None:
    """Tiles of `kernel` on `arch`, or None where it is not to be used there (see `instead`).

    `dtype` is fp32, fp16 or bf16; `length` the longest sequence of a launch, in tokens (rows with a `length` never fit
    when it is None). ValueError: the table knows no such kernel.
    """
    found = _find(kernel, arch, dtype, head_dim, length)
    return found if isinstance(found, Tiles) else None


def instead(
    kernel: str, *, arch: str, dtype: str, head_dim: int | None = None, length: int | None = None
) -> Instead | None:
    """What runs where `tiles_for` gives None, where the table says so. None: it has tiles, or no row fits at all."""
    found = _find(kernel, arch, dtype, head_dim, length)
    return found if isinstance(found, Instead) else None


def prefer(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Rows of this machine (`platform tune` timed them) that are tried before those of the package, until the process
    ends. ValueError: a row that is none; the table is then as it was."""
    for kernel, each in rows.items():
        _check(kernel, each)
    _PREFERRED.clear()
    _PREFERRED.update({kernel: tuple(each) for kernel, each in rows.items()})
    _find.cache_clear()


def table() -> Mapping[str, Sequence[Mapping[str, Any]]]:
    """The package's rows by kernel, read once. ValueError: a row is damaged."""
    return _read()


_PREFERRED: dict[str, tuple[Mapping[str, Any], ...]] = {}
_CONDITIONS = {"arch", "head_dim", "dtype", "length", "triton"}
_HOW = {"sizes", "num_warps", "num_stages", "waves_per_eu"}
_NOT = {"instead", "because"}
_TRITON = ".".join(triton.__version__.split(".")[:2]) if triton is not None else "none"


@functools.cache
def _read() -> dict[str, list[dict[str, Any]]]:
    rows = json.loads(TABLE.read_text(encoding="utf-8"))
    for kernel, each in rows.items():
        _check(kernel, each)
    return rows


def _check(kernel: str, rows: Sequence[Mapping[str, Any]]) -> None:
    for number, row in enumerate(rows):
        extra = set(row) - _CONDITIONS - (_NOT if "instead" in row else _HOW)
        missing = (_NOT if "instead" in row else {"sizes"}) - set(row)
        if extra or missing:
            wrong = f"has {', '.join(sorted(extra))}" if extra else f"lacks {', '.join(sorted(missing))}"
            raise ValueError(f"tiles of {kernel}, row {number}: it {wrong}; see the docstring of kernels/tiles.py")


@functools.cache
def _find(kernel: str, arch: str, dtype: str, head_dim: int | None, length: int | None) -> Tiles | Instead | None:
    if kernel not in _read():
        raise ValueError(f"no kernel {kernel!r} in {TABLE.name}{nearest(kernel, _read())}")
    for row in (*_PREFERRED.get(kernel, ()), *_read()[kernel]):
        if _fits(row, arch, dtype, head_dim, length):
            return _meaning(row)
    return None


def _fits(row: Mapping[str, Any], arch: str, dtype: str, head_dim: int | None, length: int | None) -> bool:
    given = {"arch": arch, "dtype": dtype, "head_dim": head_dim, "triton": _TRITON}
    if any(name in row and given[name] not in row[name] for name in given):
        return False
    if "length" not in row:
        return True
    least, most = row["length"]
    return length is not None and (least is None or length >= least) and (most is None or length <= most)


def _meaning(row: Mapping[str, Any]) -> Tiles | Instead:
    if "instead" in row:
        return Instead(row["instead"], row["because"])
    return Tiles(**{name: row[name] for name in _HOW if name in row})

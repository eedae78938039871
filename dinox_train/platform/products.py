"""The matrix products of a network's blocks, measured in their three layouts, and the BLAS library for each layout.

Legend: n rows (tokens of a micro-batch), i input features, o output features of a Linear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dinox_model import ViTConfig
from dinox_model.kernels.probe import Timer, timer_of
from dinox_model.linear import LAYOUTS, LIBRARIES, Routes, product

_CPU_FLOPS, _GPU_ROWS = 2e8, 2**15
"""What is measured of a product: on a CPU so many operations (milliseconds), on a GPU so many rows."""
WORTH = 0.03
"""Share of the products' time that routing must save."""


@dataclass(frozen=True)
class Linear:
    """One Linear of a block."""

    name: str
    inputs: int
    outputs: int
    count: int = 1
    """How many of that shape a block has."""


@dataclass(frozen=True)
class Measured:
    """One product in one layout by one library."""

    name: str
    layout: str
    library: str
    rows: int
    inputs: int
    outputs: int
    count: int
    seconds: float

    @property
    def tflops(self) -> float:
        """10^12 operations a second."""
        return 2 * self.rows * self.inputs * self.outputs / self.seconds / 1e12


def linears_of(vit: ViTConfig) -> tuple[Linear, ...]:
    """The Linears of a block."""
    up = 2 if vit.mlp in ("swiglu", "geglu") else 1
    return (
        Linear("qkv", vit.width, 3 * vit.width),
        Linear("projection", vit.width, vit.width),
        Linear("mlp up", vit.width, vit.mlp_hidden, up),
        Linear("mlp down", vit.mlp_hidden, vit.width),
    )


def measure_products(
    linears: Sequence[Linear],
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    libraries: Sequence[str] | None = None,
    timer: Timer | None = None,
) -> tuple[Measured, ...]:
    """Each Linear's three products by each library; rows is what the run has, fewer are measured.

    libraries: None: all that `device` has. timer: for tests; None: medians of interleaved runs.
    """
    libraries = libraries or (LIBRARIES if device.type == "cuda" else LIBRARIES[:1])
    found: list[Measured] = []
    for each in linears:
        n = _measured_rows(each, rows, device)
        for layout, make in operands(each, n, dtype, device).items():
            a, b = make()
            calls = {library: partial(product, a, b, None, library) for library in libraries}
            seconds = (timer or timer_of(device))(calls, device)
            found += [
                Measured(each.name, layout, library, n, each.inputs, each.outputs, each.count, seconds[library])
                for library in libraries
            ]
    return tuple(found)


def routes_of(measured: Sequence[Measured]) -> tuple[Routes, str]:
    """The library for each layout, and why. torch's own choice, unless others save `WORTH` of the products' time."""
    totals = {
        layout: {
            library: sum(one.seconds * one.count for one in measured if (one.layout, one.library) == (layout, library))
            for library in dict.fromkeys(one.library for one in measured)
        }
        for layout in LAYOUTS
    }
    if all(len(times) == 1 for times in totals.values()):
        return Routes(), "this device has one BLAS library"
    best = {layout: min(times, key=lambda library: times[library]) for layout, times in totals.items()}
    before = sum(times["default"] for times in totals.values())
    after = sum(times[best[layout]] for layout, times in totals.items())
    saved = 1 - after / before
    if saved < WORTH:
        return Routes(), f"routing by layout would save {saved:.1%} of the products' time"
    return Routes(**best), f"saves {saved:.1%} of the products' time"


def layouts_in_words(measured: Sequence[Measured]) -> list[str]:
    """TFLOP/s of each layout by each library, over all Linears of a block, for the log."""
    lines = []
    for layout in LAYOUTS:
        parts = []
        for library in dict.fromkeys(one.library for one in measured):
            some = [one for one in measured if (one.layout, one.library) == (layout, library)]
            work = sum(one.count * one.tflops * one.seconds for one in some)
            parts.append(f"{library} {work / sum(one.count * one.seconds for one in some):.3g}")
        lines.append(f"products, {layout}: {', '.join(parts)} TFLOP/s")
    return lines


def _measured_rows(linear: Linear, rows: int, device: torch.device) -> int:
    if device.type == "cuda":
        return min(rows, _GPU_ROWS)
    return max(1, min(rows, int(_CPU_FLOPS / (2 * linear.inputs * linear.outputs))))


def operands(
    linear: Linear, rows: int, dtype: torch.dtype, device: torch.device
) -> Mapping[str, Callable[[], tuple[Tensor, Tensor]]]:
    """By layout, what makes a product's two matrices, laid out as in a Linear's forward and backward."""

    generator = torch.Generator(device).manual_seed(rows)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype, generator=generator)

    n, i, o = rows, linear.inputs, linear.outputs
    return {
        "forward": lambda: (random(n, i), random(o, i).t()),
        "grad_input": lambda: (random(n, o), random(o, i)),
        "grad_weight": lambda: (random(n, o).t(), random(n, i)),
    }

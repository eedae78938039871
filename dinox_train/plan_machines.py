"""What machines can do at most: by what their makers publish, or this one by what was measured on it.

Invariant: a ceiling is never a speed. Beside each stands the share of it that this kind of work was seen to reach, from
the lowest to the highest, and where that was seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dinox_model import ViTConfig
from dinox_train.kernel_choice import product_rows
from dinox_train.platform.bandwidth import Bandwidth
from dinox_train.platform.facts import Facts, find
from dinox_train.platform.kept import Kept
from dinox_train.platform.precision import product_dtype
from dinox_train.platform.products import Measured
from dinox_train.platform.start import kept_bandwidth, kept_products, products_named
from dinox_train.span import Span
from dinox_train.stages import Stage


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A device that a run may be planned for."""

    words: str
    tflops: float
    """Of matrix products in the run's precision, dense, 10^12 operations a second."""
    reached: Span
    """Share of `tflops` that the products and attention of vision transformers reach."""
    gb_per_s: float
    """Of its memory, 10^9 bytes a second."""
    copied: Span
    """Share of `gb_per_s` that elementwise work reaches."""
    launch_s: float
    """What starting a kernel costs the host, at most; 0: nothing is launched (a CPU)."""
    watts: Span | None
    """Of the board under this load; None: nobody knows."""
    sources: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A named machine. tflops and reached: by kind of product, `bf16` and `fp32` (no TF32: torch's default)."""

    words: str
    tflops: Mapping[str, float]
    reached: Mapping[str, Span]
    gb_per_s: float
    copied: Span
    memory_gib: float
    """That a run may count on; of unified memory, what the host leaves."""
    watts: Span
    sources: tuple[str, ...]

    def machine(self, precision: str) -> Machine:
        """As a run of that precision meets it."""
        kind = "fp32" if precision == "fp32" else "bf16"
        return Machine(
            words=f"{self.words}, {self.tflops[kind]:g} TFLOP/s {kind} and {self.gb_per_s:g} GB/s as published",
            tflops=self.tflops[kind],
            reached=self.reached[kind],
            gb_per_s=self.gb_per_s,
            copied=self.copied,
            launch_s=LAUNCH_S,
            watts=self.watts,
            sources=self.sources,
        )


LAUNCH_S = 10e-6
"""Of an eager kernel, from Python to the device's queue; 4 to 10 microseconds are usual. An estimate."""

_HOPPER = {"bf16": Span(0.35, 0.75), "fp32": Span(0.5, 0.85)}
_HOPPER_SEEN = (
    "reached: whole updates of DINOv3's ViT-L on 32 H100, with everything around them, 20 % (its README's 14 hours, "
    "for 1.21 TFLOP an image); attention 20 to 65 % (FlashAttention-3, arXiv 2407.08608); products to 75 %: an estimate"
)

MACHINES: Mapping[str, Published] = {
    "strix_halo": Published(
        words="Strix Halo (gfx1151)",
        tflops={"bf16": 59.4, "fp32": 29.7},
        reached={"bf16": Span(0.22, 0.65), "fp32": Span(0.025, 0.3)},
        gb_per_s=256.0,
        copied=Span(0.7, 0.92),
        memory_gib=96.0,
        watts=Span(55.0, 140.0),
        sources=(
            "ceiling: 40 compute units x 512 (bf16) or 256 (fp32, two at once) operations a clock x 2.9 GHz; "
            "LPDDR5X-8000, 256 bits; AMD's configurable power of the whole package, 45 to 120 W, and boards to 140 W",
            "reached, bf16: products 17 to 40 TFLOP/s by layout and library (TheRock#5314), attention 10 to 26 "
            "(aiter#3481, aiter#4242)",
            "reached, fp32: products 0.8 TFLOP/s before and 8.7 after rocm-libraries#5946",
            "copies: 187 GB/s (tessera's measurement files), 212 (rocm_bandwidth_test), 234 (Vulkan)",
        ),
    ),
    "rtx_4090": Published(
        words="GeForce RTX 4090",
        tflops={"bf16": 165.2, "fp32": 82.6},
        reached={"bf16": Span(0.4, 0.85), "fp32": Span(0.4, 0.85)},
        gb_per_s=1008.0,
        copied=Span(0.75, 0.93),
        memory_gib=24.0,
        watts=Span(280.0, 450.0),
        sources=(
            "ceiling: NVIDIA Ada GPU architecture, white paper: bf16 with sums in fp32, dense; 1008 GB/s; 450 W",
            "reached: an estimate, as of the products of its kind; none was measured for this project",
        ),
    ),
    "rx_7900_xtx": Published(
        words="Radeon RX 7900 XTX (gfx1100)",
        tflops={"bf16": 122.8, "fp32": 61.4},
        reached={"bf16": Span(0.22, 0.65), "fp32": Span(0.1, 0.45)},
        gb_per_s=960.0,
        copied=Span(0.7, 0.92),
        memory_gib=24.0,
        watts=Span(220.0, 355.0),
        sources=(
            "ceiling: AMD's product page: 122.8 TFLOP/s of 16 bits, 61.4 of fp32 (two at once), 960 GB/s, 355 W",
            "reached: attention 60 TFLOP/s (aiter#2397); products: an estimate, as of gfx1151, which has like units",
        ),
    ),
    "mi300x": Published(
        words="Instinct MI300X (gfx942)",
        tflops={"bf16": 1307.4, "fp32": 163.4},
        reached={"bf16": Span(0.2, 0.55), "fp32": Span(0.3, 0.75)},
        gb_per_s=5300.0,
        copied=Span(0.6, 0.85),
        memory_gib=191.0,
        watts=Span(450.0, 750.0),
        sources=(
            "ceiling: AMD Instinct MI300X data sheet: bf16 dense, fp32 matrix, 192 GB, 5.3 TB/s, 750 W",
            "reached: attention 380 to 585 TFLOP/s by AMD's own kernels, 18 to 62 % less by Triton's (aiter, "
            "op_tests/cpp/mha); products: an estimate",
        ),
    ),
    "h100": Published(
        words="H100 SXM",
        tflops={"bf16": 989.4, "fp32": 66.9},
        reached=_HOPPER,
        gb_per_s=3350.0,
        copied=Span(0.75, 0.92),
        memory_gib=79.0,
        watts=Span(400.0, 700.0),
        sources=("ceiling: NVIDIA H100 data sheet, SXM: bf16 dense, 80 GB, 3.35 TB/s, 700 W", _HOPPER_SEEN),
    ),
    "h200": Published(
        words="H200 SXM",
        tflops={"bf16": 989.4, "fp32": 66.9},
        reached=_HOPPER,
        gb_per_s=4800.0,
        copied=Span(0.75, 0.92),
        memory_gib=139.0,
        watts=Span(400.0, 700.0),
        sources=(
            "ceiling: NVIDIA H200 data sheet, SXM: bf16 dense, 141 GB, 4.8 TB/s, 700 W; a copy was seen at 4.3 TB/s",
            _HOPPER_SEEN,
        ),
    ),
}
"""By the name that `plan.machine` takes."""

REACHED_HERE, COPIED_HERE = Span(0.5, 1.0), Span(0.4, 1.2)
"""Of what was measured on this machine. Products were timed one by one, without attention, small heads, and the rest of
the run beside them; a copy of 64 MiB knows no cache, which elementwise work on small tensors profits from."""
_LIKE_THIS = "python -m dinox_train.platform tune --config …, with the files of this run, measures it in seconds"


@dataclass(frozen=True)
class Unmeasured:
    """Why nothing is said of this machine's speed, and how to have it measured."""

    words: str


def this_machine(device: torch.device, vit: ViTConfig, stages: Sequence[Stage], precision: str) -> Machine | Unmeasured:
    """`device` by what runs, or `tune`, have measured and kept. Nothing is measured here, and nothing is written."""
    facts = find(device)
    kept, dtype = Kept(facts), product_dtype(precision)
    bandwidth = kept_bandwidth(kept)
    name = products_named(vit, product_rows(vit, tuple(stages), dtype), dtype)
    exact = kept_products(kept, name)
    others = (kept_products(kept, other) for other in kept.names() if _of_dtype(other, dtype))
    products = exact or next((found for found in others if found), None)
    if bandwidth is None or products is None:
        return Unmeasured(f"nothing was measured of {facts.name} in {precision} yet: {_LIKE_THIS}")
    return _measured(facts, bandwidth, products, precision, same=exact is not None)


def _of_dtype(name: str, dtype: torch.dtype) -> bool:
    return name.startswith("products ") and name.endswith(f" {str(dtype).removeprefix('torch.')}")


def _measured(
    facts: Facts, bandwidth: Bandwidth, products: Sequence[Measured], precision: str, *, same: bool
) -> Machine:
    tflops, gb_per_s = tflops_of(products), bandwidth.device or bandwidth.host
    of_what = "of this network" if same else f"of another network or batch (this one's: {_LIKE_THIS})"
    return Machine(
        words=f"this machine, {facts.name}, {tflops:.3g} TFLOP/s {precision} and {gb_per_s:.3g} GB/s as measured",
        tflops=tflops,
        reached=REACHED_HERE if same else Span(0.6 * REACHED_HERE.low, 1.3 * REACHED_HERE.high),
        gb_per_s=gb_per_s,
        copied=COPIED_HERE,
        launch_s=LAUNCH_S if facts.is_gpu else 0.0,
        watts=None,
        sources=(
            f"ceiling: matrix products {of_what} and copies, measured here and kept",
            f"reached: {REACHED_HERE.low:.0%} to {REACHED_HERE.high:.0%} of them, an estimate"
            + ("" if same else ", wider for another network's"),
        ),
    )


def tflops_of(products: Sequence[Measured]) -> float:
    """Of a block's products in all their layouts together, each by its faster library."""
    best: dict[tuple[str, str], Measured] = {}
    for one in products:
        key = one.name, one.layout
        if key not in best or one.tflops > best[key].tflops:
            best[key] = one
    # A run's operations are shared by size, not by what was timed of each: seconds for one row of all of them.
    work = sum(2e-12 * one.inputs * one.outputs * one.count for one in best.values())
    seconds = sum(2e-12 * one.inputs * one.outputs * one.count / one.tflops for one in best.values())
    return work / seconds

"""What a run does about its machine before its first update: find, measure or recall, set, and say all of it.

Invariant: measuring takes seconds and happens once for each machine, version and network; nothing is tuned here, what
`tune` has kept is read.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dinox_model import ViTConfig
from dinox_model.kernels import tiles
from dinox_model.linear import Routes
from dinox_train.platform import memory
from dinox_train.platform.bandwidth import Bandwidth, measure_bandwidth
from dinox_train.platform.device import idle_accelerator
from dinox_train.platform.facts import Facts, find
from dinox_train.platform.kept import Kept
from dinox_train.platform.products import Measured, layouts_in_words, linears_of, measure_products, routes_of
from dinox_train.platform.switches import settle

TUNED_TILES, TUNED_PRODUCTS = "tuned tiles", "tuned products"
"""Names under which `tune` keeps what it found."""
_WARNING = "warning: "


@dataclass(frozen=True, kw_only=True)
class Platform:
    """A machine, as a run has found and set it."""

    facts: Facts
    bandwidth: Bandwidth
    products: tuple[Measured, ...]
    routes: Routes
    lines: tuple[str, ...]
    """For the log."""
    warnings: tuple[str, ...]
    """What somebody should change."""

    @property
    def peak_tflops(self) -> float | None:
        """Of the fastest product that was measured, 10^12 operations a second; None: none was."""
        return max((one.tflops for one in self.products), default=None)

    def record(self) -> dict[str, Any]:
        """For env.json."""
        return {
            "facts": self.facts.record(),
            "copies_gb_per_s": asdict(self.bandwidth),
            "products": [asdict(one) | {"tflops": one.tflops} for one in self.products],
            "routes": asdict(self.routes),
            "said": [*self.lines, *self.warnings],
        }


def start(
    device: torch.device,
    vit: ViTConfig,
    rows: int,
    dtype: torch.dtype,
    *,
    routed: bool,
    environment: MutableMapping[str, str] = os.environ,
) -> Platform:
    """Set what is safe, then find and measure what `device` does with the blocks of `vit`.

    rows: tokens of a micro-batch; dtype: of its products. routed: whether products may go to the faster library.
    Called before the device has done anything.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # kernels of ours are launched on the current one
    facts = find(device)
    said = [f"machine: {facts.words()}", *(f"environment: {line}" for line in settle(facts, environment))]
    if (idle := idle_accelerator(device)) is not None:
        said.append(_WARNING + idle)
    limit = memory.limit_for(facts)
    if limit is not None:
        memory.apply(limit, device)
        said.append(f"memory: {limit.words()}")
    kept = Kept(facts, environment)
    bandwidth = recalled_bandwidth(kept, device)
    said.append(bandwidth.words())
    if facts.is_gpu and bandwidth.looks_unified not in (None, facts.unified):
        said.append(
            f"{_WARNING}torch says that host and device {'share a' if facts.unified else 'have each its'} memory, and "
            "copies between them look otherwise: see `copies` above"
        )
    products = recalled_products(kept, vit, rows, dtype, device)
    said += layouts_in_words(products)
    tuned = _use_tuned(kept, facts)
    routes, why = routes_of(products) if routed else (Routes(), "kernels.linear is reference")
    if tuned["products"]:
        routes, why = Routes(), "products are tuned one by one"
    said += [f"routing of products: {'off' if routes.are_torchs_own else routes.words()} ({why})", *tuned["said"]]
    return Platform(
        facts=facts,
        bandwidth=bandwidth,
        products=products,
        routes=routes,
        lines=tuple(line for line in said if not line.startswith((_WARNING, f"environment: {_WARNING}"))),
        warnings=tuple(
            line.removeprefix("environment: ").removeprefix(_WARNING)
            for line in said
            if line.startswith((_WARNING, f"environment: {_WARNING}"))
        ),
    )


def recalled_bandwidth(kept: Kept, device: torch.device) -> Bandwidth:
    """As kept, or measured and kept."""
    found = kept_bandwidth(kept)
    if found is None:
        found = measure_bandwidth(device)
        kept.put("bandwidth", asdict(found))
    return found


def kept_bandwidth(kept: Kept) -> Bandwidth | None:
    """As kept; None: it was not measured."""
    found = kept.get("bandwidth")
    return Bandwidth(**found) if _has_fields(found, Bandwidth) else None


def recalled_products(
    kept: Kept, vit: ViTConfig, rows: int, dtype: torch.dtype, device: torch.device
) -> tuple[Measured, ...]:
    """As kept for these Linears, rows and dtype, or measured and kept."""
    name = products_named(vit, rows, dtype)
    found = kept_products(kept, name)
    if found is None:
        found = measure_products(linears_of(vit), rows, dtype, device)
        kept.put(name, [asdict(one) for one in found])
    return found


def products_named(vit: ViTConfig, rows: int, dtype: torch.dtype) -> str:
    """Under which name the products of these Linears, rows and dtype are kept."""
    sizes = ",".join(f"{one.inputs}x{one.outputs}" for one in linears_of(vit))
    return f"products {sizes} rows {rows} {str(dtype).removeprefix('torch.')}"


def kept_products(kept: Kept, name: str) -> tuple[Measured, ...] | None:
    """As kept under that name; None: they were not measured."""
    found = kept.get(name)
    if not (isinstance(found, list) and found and all(_has_fields(one, Measured) for one in found)):
        return None
    return tuple(Measured(**one) for one in found)


def _has_fields(found: Any, kind: type) -> bool:
    return isinstance(found, Mapping) and found.keys() == {field.name for field in dataclasses.fields(kind)}


def _use_tuned(kept: Kept, facts: Facts) -> dict[str, Any]:
    """Take what `tune` has kept for this machine and version."""
    said: list[str] = []
    rows, file = kept.get(TUNED_TILES), kept.get(TUNED_PRODUCTS)
    if isinstance(rows, Mapping) and _prefers(rows, said):
        said.append(f"tiles: tuned here for {', '.join(rows)}")
    products = False
    if facts.is_gpu and isinstance(file, str) and (kept.folder / file).is_file():
        torch.cuda.tunable.enable(True)
        torch.cuda.tunable.tuning_enable(False)  # never inside a run
        products = torch.cuda.tunable.read_file(str(kept.folder / file))
        if not products:
            torch.cuda.tunable.enable(False)
        said.append(f"products: {'tuned here' if products else _WARNING + 'what was tuned is of other versions'}")
    return {"products": products, "said": said}


def _prefers(rows: Mapping[str, Sequence[Mapping[str, Any]]], said: list[str]) -> bool:
    try:
        tiles.prefer(rows)
    except (ValueError, TypeError, AttributeError) as error:
        said.append(f"{_WARNING}the tiles that were tuned here are not used: {error}")
        return False
    return True

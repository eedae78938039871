"""Tuning outside any run: matrix products one by one (TunableOp), and the tiles of attention's kernels.

What is found is kept for this machine and version; runs read it (`start.py`). Invariant: a run never tunes: timing
noise would change its kernels, and one shape after the other would stop it for minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from dinox_model import ViTConfig
from dinox_model.kernels import tiles
from dinox_model.kernels.choice import AttentionShape
from dinox_model.kernels.dispatch import attend_packed
from dinox_model.kernels.language import can_run_on
from dinox_model.kernels.probe import Timer, timer_of
from dinox_model.linear import product
from dinox_train.platform.facts import Facts
from dinox_train.platform.kept import Kept
from dinox_train.platform.products import Linear, Measured, layouts_in_words, linears_of, measure_products, operands
from dinox_train.platform.start import TUNED_PRODUCTS, TUNED_TILES, products_named, recalled_bandwidth

ATTENTION_KERNELS = ("attention_forward", "attention_keys_values", "attention_queries")
NOTHING_TO_TUNE = "nothing to tune on a CPU: torch has one BLAS library here, and attention is torch's own"
_DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a configuration puts through a device."""

    vit: ViTConfig
    rows: int
    """Tokens of a micro-batch."""
    dtype: torch.dtype
    shapes: tuple[AttentionShape, ...]


def tune(work: Work, facts: Facts, device: torch.device, kept: Kept) -> Iterator[str]:
    """Tune what there is to tune, and keep it; lines as it goes, the gain in them."""
    linears = linears_of(work.vit)
    before = measure_products(linears, work.rows, work.dtype, device)
    kept.put(products_named(work.vit, work.rows, work.dtype), [asdict(one) for one in before])  # for runs and --plan
    recalled_bandwidth(kept, device)
    yield from layouts_in_words(before)
    if not facts.is_gpu:
        yield NOTHING_TO_TUNE
        return
    yield from tune_products(linears, work, facts, device, kept, before)
    if can_run_on(device):
        yield from tune_tiles(work.shapes, facts, device, kept)
    else:
        yield "tiles: no Triton for this device, so none to tune (the extra [kernels])"


def tune_products(
    linears: Sequence[Linear],
    work: Work,
    facts: Facts,
    device: torch.device,
    kept: Kept,
    before: Sequence[Measured],
) -> Iterator[str]:
    """Let TunableOp try all solutions for the blocks' products, and keep its table."""
    if facts.kind != "amd":
        yield "products: torch tunes matrix products on AMD only; on NVIDIA cuBLAS chooses by itself"
        return
    tunable, path = torch.cuda.tunable, kept.path.with_suffix(".tunableop.csv")
    kept.folder.mkdir(parents=True, exist_ok=True)
    tunable.enable(True)
    tunable.tuning_enable(True)
    tunable.set_filename(str(path))
    for linear in linears:
        for layout, make in operands(linear, work.rows, work.dtype, device).items():
            a, b = make()
            product(a, b, None, "default")
            yield f"tuned {linear.name}, {layout}"
    tunable.tuning_enable(False)
    written = tunable.write_file(str(path))
    after = measure_products(linears, work.rows, work.dtype, device, libraries=("default",))
    gain = seconds_of(before) / seconds_of(after)
    if not written:
        yield f"products: {path} cannot be written, so nothing is kept; {gain:.2f} times as fast as before"
    elif gain < 1.01:
        path.unlink()
        kept.put(TUNED_PRODUCTS, None)
        yield f"products: {gain:.2f} times as fast as before: no gain, nothing is kept"
    else:
        kept.put(TUNED_PRODUCTS, path.name)
        yield f"products: {gain:.2f} times as fast as before, kept in {path}"
    tunable.enable(False)


def seconds_of(measured: Sequence[Measured]) -> float:
    """Of a block's products with torch's own choice of the library."""
    return sum(one.seconds * one.count for one in measured if one.library == "default")


def tune_tiles(
    shapes: Sequence[AttentionShape],
    facts: Facts,
    device: torch.device,
    kept: Kept,
    *,
    timer: Timer | None = None,
    attend: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Iterator[str]:
    """Time each tile of the table that any architecture has, kernel by kernel, and keep what is faster than ours here.

    Tiles that do not compile or launch here drop out. timer, attend: for tests.
    """
    run = attend or partial(attend_packed, backend="triton")
    rows: dict[str, list[dict[str, Any]]] = {}
    for shape in shapes:
        for kernel in ATTENTION_KERNELS:
            best, gain, tried = _best_tiles(kernel, shape, facts, device, rows, timer or timer_of(device), run)
            about = f"tiles of {kernel}, {shape.tokens} tokens: {tried} tried"
            if best is None:
                yield f"{about}, none is faster than the table's"
                continue
            rows.setdefault(kernel, []).insert(0, _row(best, shape, facts))
            yield f"{about}, {dict(best.sizes)} with {best.num_warps} warps is {gain:.2f} times as fast as the table's"
    tiles.prefer(rows)
    kept.put(TUNED_TILES, rows or None)
    yield f"tiles: kept in {kept.path}" if rows else "tiles: the table's are the fastest, nothing is kept"


def _best_tiles(
    kernel: str,
    shape: AttentionShape,
    facts: Facts,
    device: torch.device,
    rows: Mapping[str, list[dict[str, Any]]],
    timer: Timer,
    run: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[tiles.Tiles | None, float, int]:
    """The fastest other than the table's, its gain over the table's, and how many were tried."""
    tiles.prefer(rows)
    where = {"arch": facts.architecture, "dtype": _DTYPE_NAMES[shape.dtype], "head_dim": shape.head_dim}
    present = tiles.tiles_for(kernel, length=shape.tokens, **where)
    packed = torch.randn(
        (min(shape.images, 64), shape.tokens, 3, shape.heads, shape.head_dim), device=device, dtype=shape.dtype
    ).requires_grad_()

    def seconds(candidate: tiles.Tiles) -> float:
        tiles.prefer({**rows, kernel: [_row(candidate, shape, facts), *rows.get(kernel, [])]})
        return timer({kernel: lambda: run(packed).sum().backward()}, device)[kernel]

    found: list[tuple[float, tiles.Tiles]] = []
    for candidate in candidates(kernel):
        try:
            found.append((seconds(candidate), candidate))
        except Exception:  # whatever the compiler or the driver raises: these tiles are none for here
            continue
    tiles.prefer(rows)
    if not found:
        return None, 1.0, 0
    best_s, best = min(found, key=lambda one: one[0])
    before_s = next((taken for taken, one in found if one == present), None)
    gain = 1.0 if before_s is None else before_s / best_s
    worth = best != present and (before_s is None or gain > 1.02)
    return best if worth else None, gain, len(found)


def candidates(kernel: str) -> tuple[tiles.Tiles, ...]:
    """All tiles that the package's table has for a kernel, on any architecture, each once."""
    found: list[tiles.Tiles] = []
    for row in tiles.table().get(kernel, ()):
        how = {name: row[name] for name in ("sizes", "num_warps", "num_stages", "waves_per_eu") if name in row}
        if "sizes" in how and tiles.Tiles(**how) not in found:
            found.append(tiles.Tiles(**how))
    return tuple(found)


def _row(one: tiles.Tiles, shape: AttentionShape, facts: Facts) -> dict[str, Any]:
    """Of the table: these tiles for sequences of just this length."""
    return {
        "arch": [facts.architecture],
        "head_dim": [shape.head_dim],
        "dtype": [_DTYPE_NAMES[shape.dtype]],
        "length": [shape.tokens, shape.tokens],
        **{name: value for name, value in asdict(one).items() if name != "sizes"},
        "sizes": dict(one.sizes),
    }

"""Tries the device that a run would take: copies, matrix products by layout, attention forward and backward.

As a run does it, by the same functions: what is measured here is kept for the run, and what a run has measured is read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from checkup.machine import Trials
from dinox_model import PRESETS, ViTConfig
from dinox_model.kernels.choice import AUTO, AttentionShape, choose_attention
from dinox_train.platform.facts import Facts
from dinox_train.platform.kept import Kept
from dinox_train.platform.products import Measured, layouts_in_words, routes_of
from dinox_train.platform.start import recalled_bandwidth, recalled_products

_IMAGES = 16
"""Of the shape that attention is tried on, where no configuration says it."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a run puts through the device: its network, the rows of its products, its longest sequence."""

    vit: ViTConfig
    rows: int
    shape: AttentionShape
    attention: str = AUTO


def usual_work(device: torch.device) -> Work:
    """vit_b on views of 224 pixels; in bf16 on a GPU."""
    vit = PRESETS["vit_b"]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens = (224 // vit.patch_size) ** 2 + vit.num_prefix_tokens
    shape = AttentionShape(images=_IMAGES, tokens=tokens, heads=vit.num_heads, head_dim=vit.head_width, dtype=dtype)
    return Work(vit=vit, rows=_IMAGES * tokens, shape=shape)


def try_device(device: torch.device, facts: Facts, work: Work, environment: Mapping[str, str] = os.environ) -> Trials:
    """What comes out of it. What the device cannot do at all is told in `attention_error`."""
    kept = Kept(facts, environment)
    try:
        copies = recalled_bandwidth(kept, device)
        products = recalled_products(kept, work.vit, work.rows, work.shape.dtype, device)
    except RuntimeError as error:  # no code for this architecture, a driver that is too old, a faulty device
        return Trials(facts=facts, attention_error=_first_line(error))
    routes, why = routes_of(products)
    taken = {"forward": routes.forward, "grad_input": routes.grad_input, "grad_weight": routes.grad_weight}
    tried = {
        "facts": facts,
        "copies": copies,
        "layouts": tuple(layouts_in_words(products)),
        "tflops": {layout: _tflops(products, layout, library) for layout, library in taken.items()},
        "routing": f"{'off' if routes.are_torchs_own else routes.words()}: {why}",
    }
    try:
        choice = choose_attention(work.attention, work.shape, device)
    except (RuntimeError, ValueError) as error:
        return Trials(**tried, attention_error=_first_line(error))
    return Trials(
        **tried,
        attention=choice.backend,
        attention_reason=f"{choice.about}: {choice.reason}",
        attention_warning=choice.warning,
    )


def _tflops(products: tuple[Measured, ...], layout: str, library: str) -> float:
    """Over all Linears of a block."""
    some = [one for one in products if (one.layout, one.library) == (layout, library)]
    return sum(one.count * one.tflops * one.seconds for one in some) / sum(one.count * one.seconds for one in some)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

"""What a network makes of the fixed slices and views: embeddings for retrieval, patches and attention for pictures.

Legend: s slices, n patches of a slice on a grid (h, w), d features, a heads, r registers, m views in the gallery.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinox_model import Preprocess, VisionTransformer, attention_maps
from monitoring.places import Place
from monitoring.protocol import ASKED
from monitoring.windows import Shown, Windows

PIXELS_SIDE = 32
"""Views are averaged to so many pixels a side, where pixels themselves stand in the place of features."""

Embed = Callable[[Shown], Tensor]
"""Images to a vector each, float32 (b, d), on any device."""


@dataclass(frozen=True)
class Embeddings:
    """Of the views of all runs, float32 on the host."""

    queries: np.ndarray
    """(q, d): one view of a slice of each run."""
    gallery: np.ndarray
    """(m, d): the other view of every slice, run by run."""


@dataclass(frozen=True)
class Attention:
    """Softmax weights of the last block for one slice, float32 on the host: shares of what a token takes in."""

    heads: np.ndarray
    """(a, h, w): what CLS takes from each patch; of a network without CLS, what patches take on average."""
    registers: np.ndarray
    """(r, h, w): what each register takes from each patch, on average over heads."""


def embed_runs(runs: Sequence[tuple[Place, ...]], windows: Windows, preprocess: Preprocess, embed: Embed) -> Embeddings:
    """Embed two views of each slice of the runs, the first one of the slice that is asked for only."""
    queries, gallery, done = [], [], 0
    for run in runs:
        one, other = windows.views(run, done, preprocess)
        asked = slice(ASKED, ASKED + 1)
        both = Shown(
            torch.cat((one.pixels[asked], other.pixels)), torch.cat((one.mm_per_pixel[asked], other.mm_per_pixel))
        )
        found = embed(both).float().cpu().numpy()
        queries.append(found[:1])
        gallery.append(found[1:])
        done += len(run)
    return Embeddings(np.concatenate(queries), np.concatenate(gallery))


@torch.no_grad()
def embed_with(model: VisionTransformer, shown: Shown) -> Tensor:
    """CLS features (b, d), or the mean of the patches' where a network has no CLS token."""
    found = model(shown.pixels, mm_per_pixel=_mm(model, shown))
    return found.patches.mean(dim=1) if found.cls is None else found.cls


def embed_pixels(shown: Shown) -> Tensor:
    """The pixels themselves, averaged to 32 x 32 of each slice of a window, their mean over all taken away."""
    small = F.adaptive_avg_pool2d(shown.pixels, PIXELS_SIDE).flatten(1)
    return small - small.mean(dim=1, keepdim=True)


@torch.no_grad()
def patch_features(model: VisionTransformer, shown: Shown) -> tuple[np.ndarray, tuple[int, int]]:
    """float32 (n, d) of one slice, row by row, and (h, w)."""
    found = model(shown.pixels, mm_per_pixel=_mm(model, shown))
    return found.patches[0].float().cpu().numpy(), found.grid


@torch.no_grad()
def attention_of(model: VisionTransformer, shown: Shown) -> Attention:
    """The last block's attention for one slice, as the network computes it."""
    (maps,) = attention_maps(model, shown.pixels, mm_per_pixel=_mm(model, shown))
    heads = maps.from_cls[0] if maps.has_cls else maps.from_patches[0].mean(dim=(1, 2))
    return Attention(heads.cpu().numpy(), maps.from_registers[0].mean(dim=0).cpu().numpy())


def _mm(model: VisionTransformer, shown: Shown) -> Tensor | None:
    return shown.mm_per_pixel if model.config.uses_mm_per_pixel else None

"""What is probed, and what stands beside it: networks, raw pixels, statistics of size and intensity; one face for all.

Invariant: none has learnt anything from the labels, and none is told more of a window than the others, except that
`statistics` measures a finding's outline, which pooling by that outline shows to the others in part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from inference.network import Network
from torch import Tensor

from dinox_model import Preprocess
from probing.findings import Finding

POOLED_SIDE = 16
"""Raw pixels of a window are averaged to so many along either side."""
PERCENTILES = (5, 25, 50, 75, 95)
TISSUES_HU = ((-1100, -950), (-950, -500), (-500, -100), (-100, 100), (100, 3000))
"""Air, lung, ground-glass and fat's lower end, soft tissue, bone and contrast: shares of a slice in these ranges."""


@dataclass(frozen=True)
class Encoded:
    """Of b windows."""

    window: Tensor
    """(b, d): one vector for each."""
    patches: Tensor
    """(b, h·w, p): one for each patch, row by row."""
    grid: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Windows to vectors."""

    name: str
    digest: str | None
    """Of a network's weights."""
    depth: int
    step: int
    step_mm: float | None
    edge: str | None
    """As `Network.edge`."""
    patch_size: int
    window_features: tuple[str, ...]
    """What a probe of windows takes, `cls` and `mean` (of the patches) of networks; the logistic probe of the first is
    the figure of a task: fixed, never the best of several."""
    finding_features: tuple[str, ...]
    """The same of findings; `mask` is the mean of the patches that the outline covers, by their share."""
    encode: Callable[[np.ndarray, np.ndarray], Encoded]
    """int16 HU (b, depth, y, x) and spacing (b, 3) in mm."""
    of_finding: Callable[[np.ndarray, Finding], np.ndarray] | None = None
    """Instead of pooled patches: int16 HU (y, x) of the middle slice and the finding, to (d,)."""


def network_encoder(name: str, network: Network) -> Encoder:
    """A network as training and inference see windows: through `dinox_model.encode`."""

    def encode(hu: np.ndarray, spacing_mm: np.ndarray) -> Encoded:
        features = network.encode(hu, spacing_mm)
        return Encoded(features.pooled.float(), features.patches.float(), features.grid)

    kinds = ("cls", "mean") if network.has_cls else ("mean",)
    return Encoder(
        name=name,
        digest=network.digest,
        depth=network.depth,
        step=network.step or 1,
        step_mm=network.step_mm,
        edge=network.edge,
        patch_size=network.patch_size,
        window_features=kinds,
        finding_features=("mask", *kinds),
        encode=encode,
    )


def pixel_encoder(network: Network, preprocess: Preprocess) -> Encoder:
    """The network's input itself: pixels averaged over the window, or those of a patch as they are."""

    def encode(hu: np.ndarray, spacing_mm: np.ndarray) -> Encoded:
        side = network.patch_size
        x = preprocess.apply(torch.from_numpy(hu), side)
        patches = F.unfold(x, side, stride=side).transpose(1, 2)
        pooled = F.adaptive_avg_pool2d(x, POOLED_SIDE).flatten(1)
        return Encoded(pooled, patches, (x.shape[2] // side, x.shape[3] // side))

    return Encoder(
        name="raw pixels",
        digest=None,
        depth=network.depth,
        step=network.step or 1,
        step_mm=network.step_mm,
        edge=network.edge,
        patch_size=network.patch_size,
        window_features=("pixels",),
        finding_features=("mask", "pixels"),
        encode=encode,
    )


def statistics_encoder(patch_size: int) -> Encoder:
    """Intensities of the middle slice and how much of it is which tissue; of a finding, its size and intensities."""

    def encode(hu: np.ndarray, spacing_mm: np.ndarray) -> Encoded:
        x = torch.from_numpy(hu).float()
        shares = [((x >= low) & (x < high)).float().mean(dim=(1, 2, 3)) for low, high in TISSUES_HU]
        area = torch.from_numpy(spacing_mm[:, 1] * spacing_mm[:, 2]).float() * hu.shape[2] * hu.shape[3]
        window = torch.cat([_intensities(x.flatten(1)), torch.stack([*shares, area * (1 - shares[0])], dim=1)], dim=1)
        height, width = hu.shape[2:]
        padded = F.pad(x, (0, -width % patch_size, 0, -height % patch_size), mode="replicate")
        patches = F.unfold(padded, patch_size, stride=patch_size).transpose(1, 2)
        return Encoded(window, _intensities(patches), (padded.shape[2] // patch_size, padded.shape[3] // patch_size))

    def of_finding(hu: np.ndarray, finding: Finding) -> np.ndarray:
        inside = hu[finding.on_slice(finding.center, hu.shape[:2])]
        found = _intensities(torch.from_numpy(inside.astype(np.float32))[None])[0].numpy()
        return np.concatenate([finding.sizes(), found]).astype(np.float32)

    return Encoder(
        name="size and intensity",
        digest=None,
        depth=1,
        step=1,
        step_mm=None,
        edge=None,
        patch_size=patch_size,
        window_features=("statistics",),
        finding_features=("statistics",),
        encode=encode,
        of_finding=of_finding,
    )


def _intensities(hu: Tensor) -> Tensor:
    """Mean, standard deviation, minimum, maximum and percentiles over the last axis: (…, n) to (…, 9), in 1000 HU."""
    count = hu.shape[-1]
    points = hu.sort(dim=-1).values[..., [round((count - 1) * one / 100) for one in PERCENTILES]]
    moments = [hu.mean(-1), hu.std(-1, correction=0), hu.amin(-1), hu.amax(-1)]
    return torch.cat([torch.stack(moments, dim=-1), points], dim=-1) / 1000

"""Features of items by one encoder: each window read once, encoded once, and pooled in every way that is asked for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from inference.encoding import ahead
from inference.scan import Scan

from probing.encoders import Encoded, Encoder
from probing.findings import Finding
from probing.tasks import Item, Task


def unit_features(encoder: Encoder, scans: dict[int, Scan], task: Task, batch_size: int) -> dict[str, np.ndarray]:
    """float32 (u, d) of a task's units, by kind of feature. scans: by index of the volume."""
    kinds = encoder.finding_features if task.about_findings else encoder.window_features
    rows = item_features(encoder, scans, task.items, kinds, batch_size)
    count = np.bincount(task.unit_of, minlength=len(task.labels))[:, None]
    found = {}
    for kind, values in rows.items():
        sums = np.zeros((len(task.labels), values.shape[1]))
        np.add.at(sums, task.unit_of, values)
        found[kind] = (sums / count).astype(np.float32)
    return found


def item_features(
    encoder: Encoder, scans: dict[int, Scan], items: Sequence[Item], kinds: Sequence[str], batch_size: int
) -> dict[str, np.ndarray]:
    """float32 (i, d) of items, by kind."""
    rows: dict[str, list[np.ndarray | None]] = {kind: [None] * len(items) for kind in kinds}
    for numbers, hu, encoded in encoded_batches(encoder, scans, items, batch_size):
        chosen = [items[number] for number in numbers]
        for kind in kinds:
            values = _pooled(kind, encoder, chosen, hu, encoded)
            for number, row in zip(numbers, values, strict=True):
                rows[kind][number] = row
    return {kind: np.stack([row for row in found if row is not None]) for kind, found in rows.items()}


def encoded_batches(encoder: Encoder, scans: dict[int, Scan], items: Sequence[Item], batch_size: int):
    """Numbers of items, their int16 HU (b, depth, y, x), and what the encoder makes of them; volume after volume."""
    by_volume: dict[int, list[int]] = defaultdict(list)
    for number, item in enumerate(items):
        by_volume[item.volume].append(number)
    batches = [
        (volume, numbers[start : start + batch_size])
        for volume, numbers in sorted(by_volume.items())
        for start in range(0, len(numbers), batch_size)
    ]

    def read(batch: tuple[int, list[int]]) -> np.ndarray:
        scan = scans[batch[0]]
        centers = np.array([items[number].center for number in batch[1]])
        return scan.windows(centers, encoder.depth, scan.step(encoder.step, encoder.step_mm), encoder.edge)

    for (volume, numbers), hu in zip(batches, ahead(read, batches), strict=True):
        spacing_mm = np.tile(scans[volume].spacing_mm, (len(hu), 1))
        try:
            yield numbers, hu, encoder.encode(hu, spacing_mm)
        except torch.OutOfMemoryError as error:
            raise ValueError(f"too little memory for {len(hu)} windows at a time (--batch-size): {error}") from error


def _pooled(kind: str, encoder: Encoder, items: Sequence[Item], hu: np.ndarray, encoded: Encoded) -> np.ndarray:
    """float32 (b, d)."""
    if kind == "mean":
        return encoded.patches.mean(dim=1).cpu().numpy()
    if encoder.of_finding is not None and items[0].finding is not None:
        middle = hu[:, hu.shape[1] // 2]
        return np.stack([encoder.of_finding(image, _of(item)) for image, item in zip(middle, items, strict=True)])
    if kind != "mask":
        return encoded.window.cpu().numpy()
    weights = np.stack(
        [patch_shares(_of(item).on_slice(item.center, hu.shape[2:]), encoder.patch_size) for item in items]
    )
    shares = torch.from_numpy(weights).to(encoded.patches)
    shares = shares / shares.sum(dim=1, keepdim=True)
    return torch.einsum("bn,bnd->bd", shares, encoded.patches).cpu().numpy()


def _of(item: Item) -> Finding:
    assert item.finding is not None
    return item.finding


def patch_shares(mask: np.ndarray, side: int) -> np.ndarray:
    """float32 (h·w,): the share of each patch that a mask (y, x) covers; what is padded is none of it."""
    height, width = mask.shape
    padded = F.pad(torch.from_numpy(mask.astype(np.float32))[None], (0, -width % side, 0, -height % side))
    return F.avg_pool2d(padded, side).flatten().numpy()

"""Outlining findings from frozen patches: a linear and an upsampling head, the same steps for every encoder, and Dice
by patient on slices of patients that the head never saw.

Nothing is chosen: steps, learning rate and threshold are the protocol's. Masks are the findings' consensus.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from inference.scan import Scan
from torch import Tensor

from dinox_io import ShardSet
from dinox_model import ViTConfig, ViTFeatures
from dinox_model.heads import UpsamplingDecoder, UpsamplingDecoderConfig
from dinox_model.heads.dense import prime_factors
from probing import protocol
from probing.bootstrap import Resamples
from probing.crossfit import Split
from probing.encoders import Encoder
from probing.errors import ProbeError
from probing.features import encoded_batches
from probing.findings import Finding
from probing.tasks import Item

HEADS = {"linear": 0, "upsampling": 2}
"""By the number of stages that learn (dinox_model.heads)."""


@dataclass(frozen=True, eq=False)
class Slice:
    """A slice to outline: its window, and which pixels of it (y, x) are of findings."""

    item: Item
    patient: str
    mask: np.ndarray


def slices_of(shards: ShardSet, findings: Sequence[Finding]) -> list[Slice]:
    """For up to DENSE_PATIENTS patients with outlines: the slice that shows most of each of up to DENSE_FINDINGS
    findings, and as many slices without any, of the same volumes; all chosen by the patient's pseudonym alone.

    Raises ProbeError where no finding has an outline.
    """
    by_patient: dict[str, list[Finding]] = defaultdict(list)
    by_volume: dict[int, list[Finding]] = defaultdict(list)
    for finding in findings:
        by_volume[finding.volume].append(finding)
        if finding.is_outlined:
            by_patient[finding.patient].append(finding)
    if not by_patient:
        raise ProbeError("dense: no finding of these patients has an outline (a mask)")
    found = []
    for patient in protocol.shuffled(by_patient, "dense patients", protocol.FOLD_SEED)[: protocol.DENSE_PATIENTS]:
        own = by_patient[patient]
        random = protocol.generator(protocol.FOLD_SEED, "dense slices", patient)
        for number in random.permutation(len(own))[: protocol.DENSE_FINDINGS].tolist():
            volume, center = own[number].volume, own[number].center
            depth, *shape = shards.volumes[volume].shape
            marked = {int(z) for one in by_volume[volume] for z in one.slices}
            free = [z for z in range(depth) if z not in marked]
            centers = [center] + ([free[int(random.integers(len(free)))]] if free else [])
            for z in centers:
                masks = [one.on_slice(z, (shape[0], shape[1])) for one in by_volume[volume]]
                found.append(Slice(Item(volume, z), patient, np.logical_or.reduce(masks)))
    unique = {(one.item.volume, one.item.center): one for one in found}
    return [unique[key] for key in sorted(unique)]


@dataclass(frozen=True, eq=False)
class Patches:
    """What an encoder made of slices: standardised by nothing yet."""

    encoder: str
    side: int
    values: list[Tensor]
    """float32 (h·w, d) each, on the CPU."""
    grids: list[tuple[int, int]]


def patches_of(encoder: Encoder, scans: dict[int, Scan], slices: Sequence[Slice], batch_size: int) -> Patches:
    """The patches of each slice."""
    values: dict[int, Tensor] = {}
    grids: dict[int, tuple[int, int]] = {}
    for numbers, _, encoded in encoded_batches(encoder, scans, [one.item for one in slices], batch_size):
        for number, rows in zip(numbers, encoded.patches.cpu(), strict=True):
            values[number], grids[number] = rows, encoded.grid
    order = range(len(slices))
    return Patches(encoder.name, encoder.patch_size, [values[one] for one in order], [grids[one] for one in order])


def dense_table(
    slices: Sequence[Slice],
    encoders: Sequence[Patches],
    parts: Sequence[Split],
    *,
    tested: str,
    compare: str,
    seed: int,
    device: str,
) -> dict[str, Any]:
    """Dice by patient of every encoder and head, as it stands in probe.json.

    device: where heads are trained. compare: the encoder that the first one is compared with, head by head.
    """
    patients = np.array([one.patient for one in slices])
    asked = sorted(set(patients[np.isin(patients, sorted(set().union(*[part.test for part in parts])))]))
    resamples = Resamples(np.array(asked), seed)
    rows, dice = [], {}
    for one in encoders:
        for head in HEADS:
            overlaps = _outlined(head, one, slices, patients, parts, seed, device)
            values = np.array([_dice(*overlaps[patient]) for patient in asked])
            dice[one.encoder, head] = values
            interval = resamples.interval(*resamples.mean(values)).json() if len(values) else None
            rows.append({"encoder": one.encoder, "head": head, "dice_by_patient": interval})
    first = encoders[0].encoder
    differences = [
        {
            "head": head,
            "of": first,
            "minus": compare,
            "dice_by_patient": resamples.interval(*resamples.mean(dice[first, head] - dice[compare, head])).json(),
        }
        for head in HEADS
        if (compare, head) in dice and asked
    ]
    return {
        "task": "dense",
        "tested": tested,
        "counts": {
            "slices": len(slices),
            "tested_slices": int(np.isin(patients, asked).sum()),
            "tested_patients": len(asked),
            "tested_pixels": int(sum(one.mask.sum() for one in slices if one.patient in set(asked))),
            "folds": len(parts),
        },
        "rows": rows,
        "differences": differences,
    }


def _dice(both: int, outlined: int, true: int) -> float:
    """2·|A ∩ B| / (|A| + |B|) over all of a patient's slices; there are true pixels among them."""
    return 2 * both / (outlined + true) if outlined + true else 1.0


def _outlined(
    head: str,
    patches: Patches,
    slices: Sequence[Slice],
    patients: np.ndarray,
    parts: Sequence[Split],
    seed: int,
    device: str,
) -> dict[str, list[int]]:
    """For each tested patient: pixels in both masks, in the head's, in the true one."""
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for part in parts:
        known = np.flatnonzero(np.isin(patients, sorted(part.train))).tolist()
        asked = np.flatnonzero(np.isin(patients, sorted(part.test))).tolist()
        if not asked:
            continue
        trained = _train(head, patches, slices, known, seed, device) if known else None
        for number in asked:
            mask = slices[number].mask
            outlined = np.zeros_like(mask) if trained is None else trained.outline(number, mask.shape)
            for place, pixels in enumerate((outlined & mask, outlined, mask)):
                found[patients[number]][place] += int(pixels.sum())
    return found


class _Trained:
    """A head, and how it is fed."""

    def __init__(self, head: str, patches: Patches, known: Sequence[int], seed: int, device: str) -> None:
        width = patches.values[0].shape[1]
        rows = torch.cat([patches.values[number] for number in known])
        self._mean, self._std = rows.mean(dim=0), rows.std(dim=0, correction=0).clamp(min=1e-6)
        # A head asks a network's config for width and patch size alone.
        shape = ViTConfig(
            width=width, num_layers=1, num_heads=1, mlp_hidden=1, patch_size=patches.side, positions="learned",
            learned_grid=(1, 1),
        )  # fmt: skip
        stages = min(HEADS[head], len(prime_factors(patches.side)))
        config = UpsamplingDecoderConfig(classes=1, hidden=protocol.DENSE_HIDDEN, num_stages=stages)
        self.decoder = UpsamplingDecoder(config, shape, seed=seed).to(device)
        self._patches, self._device = patches, device

    def logits(self, numbers: Sequence[int]) -> Tensor:
        """(b, y, x) of slices of one grid, with what was padded."""
        rows = torch.stack([(self._patches.values[one] - self._mean) / self._std for one in numbers]).to(self._device)
        grid = self._patches.grids[numbers[0]]
        features = ViTFeatures(None, rows[:, :0], rows, grid)
        return self.decoder(features)[:, 0]

    @torch.no_grad()
    def outline(self, number: int, shape: tuple[int, int]) -> np.ndarray:
        """bool (y, x)."""
        return (self.logits([number])[0, : shape[0], : shape[1]] > 0).cpu().numpy()


def _train(
    head: str, patches: Patches, slices: Sequence[Slice], known: Sequence[int], seed: int, device: str
) -> _Trained:
    """DENSE_STEPS of AdamW on cross-entropy and soft Dice, the learning rate falling to 0 as a cosine."""
    trained = _Trained(head, patches, known, seed, device)
    optimizer = torch.optim.AdamW(
        trained.decoder.parameters(), lr=protocol.DENSE_RATE, weight_decay=protocol.DENSE_DECAY
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, protocol.DENSE_STEPS)
    by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number in known:
        by_shape[slices[number].mask.shape].append(number)
    groups = [by_shape[shape] for shape in sorted(by_shape)]
    shares = np.array([len(group) for group in groups]) / len(known)
    random = protocol.generator(seed, "dense steps")
    for _ in range(protocol.DENSE_STEPS):
        group = groups[int(random.choice(len(groups), p=shares))]
        count = min(protocol.DENSE_BATCH, len(group))
        numbers = [group[int(place)] for place in random.choice(len(group), count, replace=False)]
        true = torch.from_numpy(np.stack([slices[one].mask for one in numbers])).float().to(device)
        logits = trained.logits(numbers)[:, : true.shape[1], : true.shape[2]]
        chance = logits.sigmoid()
        overlap = 1 - (2 * (chance * true).sum() + 1) / (chance.sum() + true.sum() + 1)
        loss = F.binary_cross_entropy_with_logits(logits, true) + overlap
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return trained

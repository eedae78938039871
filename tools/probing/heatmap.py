"""Where a network looks at findings, and what looks like them to it: one sheet, and the AUROC of patches inside against
outside, beside the same network at random initialisation.

Similarity of a patch to findings is its cosine to the mean of what OTHER patients' findings look like, both less the
mean patch of those patients: a finding is never compared with itself, and nobody's own slice says what is usual.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from inference.scan import Scan
from preview.page import FAINT, ORANGE, Page
from preview.tiles import LUNG, gray

import dinox_model
from dinox_model import VisionTransformer
from probing import protocol
from probing.auroc import auroc
from probing.bootstrap import Resamples
from probing.case import Case
from probing.errors import ProbeError
from probing.features import patch_shares
from probing.findings import Finding

CROP, TILE, GAP, HEAD, COLUMNS = 96, 96, 4, 56, 2
MARGIN = 12
MAPS = ("attention", "similarity")


@dataclass(frozen=True, eq=False)
class Seen:
    """What one network makes of one finding's slice."""

    attention: np.ndarray | None
    """float32 (h·w,): of CLS in the last block, the mean of its heads; None for a network without CLS."""
    patches: np.ndarray
    """float32 (h·w, d)."""
    shares: np.ndarray
    """float32 (h·w,): how much of each patch the finding covers."""
    real: np.ndarray
    """bool (h·w,): patches that are not wholly padding."""
    grid: tuple[int, int]


NETWORKS = ("pretrained", "random initialisation")


def sheet_of(
    case: Case, models: Sequence[VisionTransformer], device: str, count: int, seed: int
) -> tuple[Page, dict[str, Any]]:
    """The sheet of `count` random findings of the tested patients, and the figures of both networks (see NETWORKS).

    Raises ProbeError where those patients have no finding.
    """
    tested = set().union(*case.tested.values())
    findings = chosen_findings([one for one in case.findings if one.patient in tested], count, seed)
    if not findings:
        raise ProbeError("heatmap: the tested patients have no finding")
    patients = np.array([finding.patient for finding in findings])
    columns: dict[str, list[np.ndarray | None]] = {}
    grids: list[tuple[int, int]] = []
    slices: list[np.ndarray] = []
    found: dict[str, Any] = {}
    for name, model in zip(NETWORKS, models, strict=True):
        looks = [look(model.to(device), device, finding, case.scans[finding.volume]) for finding in findings]
        seen, slices = [one for one, _ in looks], [hu for _, hu in looks]
        maps, grids = maps_of(seen, patients), [one.grid for one in seen]
        columns |= {f"{kind}, {name}": values for kind, values in maps.items()}
        found[name] = figures(maps, seen, patients, seed)
    page = draw_sheet(findings, slices, columns, grids, models[0].config.patch_size)
    return page, {"findings": len(findings), "patients": len(np.unique(patients)), "maps": found}


def chosen_findings(findings: Sequence[Finding], count: int, seed: int) -> list[Finding]:
    """`count` random findings (all, where there are fewer), in a fixed order."""
    order = protocol.generator(seed, "heatmap").permutation(len(findings))[:count]
    return [findings[int(number)] for number in order]


def look(model: VisionTransformer, device: str, finding: Finding, scan: Scan) -> tuple[Seen, np.ndarray]:
    """What a network makes of the slice that shows most of a finding, and the HU (y, x) of that slice."""
    preprocess, side = model.preprocess, model.config.patch_size
    depth = model.config.in_channels
    step = scan.step(preprocess.step or 1, preprocess.step_mm)
    hu = scan.windows(np.array([finding.center]), depth, step, preprocess.edge)
    spacing = torch.tensor([scan.spacing_mm])
    mm = spacing[:, 1:].float().to(device) if model.config.uses_mm_per_pixel else None
    with torch.no_grad():
        x = preprocess.apply(torch.from_numpy(hu).to(device), side)
        features = dinox_model.encode(model, hu, spacing)
        attention = None
        if model.config.cls_token:
            [maps] = dinox_model.attention_maps(model, x, mm_per_pixel=mm)
            attention = maps.from_cls[0].mean(dim=0).flatten().float().cpu().numpy()
    middle = hu[0, depth // 2]
    seen = Seen(
        attention=attention,
        patches=features.patches[0].float().cpu().numpy(),
        shares=patch_shares(finding.on_slice(finding.center, middle.shape), side),
        real=patch_shares(np.ones(middle.shape, bool), side) > 0,
        grid=features.grid,
    )
    return seen, middle


def similarities(seen: Sequence[Seen], patients: np.ndarray) -> list[np.ndarray | None]:
    """float (h·w,) of each finding's slice; None where there is no other patient."""
    found: list[np.ndarray | None] = []
    looks = np.stack([one.shares @ one.patches / one.shares.sum() for one in seen])
    usual = np.stack([one.patches[one.real].mean(axis=0) for one in seen])
    for one, patient in zip(seen, patients, strict=True):
        others = patients != patient
        if not others.any():
            found.append(None)
            continue
        centre = usual[others].mean(axis=0)
        wanted = looks[others].mean(axis=0) - centre
        rows = one.patches - centre
        lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(wanted)
        found.append(rows @ wanted / np.maximum(lengths, 1e-12))
    return found


def maps_of(seen: Sequence[Seen], patients: np.ndarray) -> dict[str, list[np.ndarray | None]]:
    """Each of MAPS for each finding."""
    return {"attention": [one.attention for one in seen], "similarity": similarities(seen, patients)}


def figures(
    maps: dict[str, list[np.ndarray | None]], seen: Sequence[Seen], patients: np.ndarray, seed: int
) -> dict[str, Any]:
    """AUROC of the patches that a finding touches against all others of its slice: the mean over patients of the mean
    over their findings, with the interval over patients."""
    found: dict[str, Any] = {}
    for name, values in maps.items():
        of_patient: dict[str, list[float]] = {}
        for value, one, patient in zip(values, seen, patients.tolist(), strict=True):
            if value is None:
                continue
            inside = one.shares[one.real] > 0
            area = float(auroc(value[one.real], inside, np.zeros(len(inside), int))[0])
            if np.isfinite(area):
                of_patient.setdefault(patient, []).append(area)
        names = sorted(of_patient)
        resamples = Resamples(np.array(names), seed)
        means = np.array([np.mean(of_patient[patient]) for patient in names])
        interval = resamples.interval(*resamples.mean(means)).json() if names else None
        found[name] = {"auroc_by_patient": interval, "patients": len(names)}
    return found


def draw_sheet(
    findings: Sequence[Finding],
    slices: Sequence[np.ndarray],
    columns: dict[str, list[np.ndarray | None]],
    grids: Sequence[tuple[int, int]],
    side: int,
) -> Page:
    """A strip for each finding: its slice around it, outlined, and each map of `columns` over the same pixels."""
    width = (1 + len(columns)) * (TILE + GAP) + MARGIN
    rows = -(-len(findings) // COLUMNS)
    page = Page(2 * MARGIN + COLUMNS * width, HEAD + rows * (TILE + GAP) + MARGIN)
    for column in range(min(COLUMNS, len(findings))):
        for place, name in enumerate(["finding", *columns]):
            for line, word in enumerate(name.replace(",", "").split()):
                page.text(MARGIN + column * width + place * (TILE + GAP), 12 + 16 * line, word, size=7, color=FAINT)
    for number, (finding, hu) in enumerate(zip(findings, slices, strict=True)):
        row, column = divmod(number, COLUMNS)
        left, top = MARGIN + column * width, HEAD + row * (TILE + GAP)
        mask = finding.on_slice(finding.center, hu.shape)
        corner = _corner(mask)
        crop = np.repeat(_cut(gray(hu, LUNG), corner)[..., None], 3, axis=2)
        crop[_cut(_border(mask), corner)] = tuple(int(ORANGE[place : place + 2], 16) for place in (1, 3, 5))
        page.picture(left, top, crop)
        for place, name in enumerate(columns, start=1):
            values = columns[name][number]
            if values is not None:
                pixels = _as_pixels(values, grids[number], side)[: hu.shape[0], : hu.shape[1]]
                page.picture(left + place * (TILE + GAP), top, _cut(pixels, corner))
    return page


def _as_pixels(values: np.ndarray, grid: tuple[int, int], side: int) -> np.ndarray:
    """uint8 (y, x): from the 1st to the 99.5th percentile of the slice."""
    low, high = np.percentile(values, [1, 99.5])
    shown = np.clip((values - low) / max(high - low, 1e-12), 0, 1).reshape(grid)
    return np.kron((255 * shown).astype(np.uint8), np.ones((side, side), np.uint8))


def _corner(mask: np.ndarray) -> tuple[int, int]:
    """Upper left corner of the crop around a mask, within the slice where that is large enough."""
    rows, columns = np.nonzero(mask)
    middle = int(rows.mean()), int(columns.mean())
    y, x = (max(0, min(at - CROP // 2, size - CROP)) for at, size in zip(middle, mask.shape, strict=True))
    return y, x


def _cut(pixels: np.ndarray, corner: tuple[int, int]) -> np.ndarray:
    """The crop; what lies beyond the slice is 0."""
    part = pixels[corner[0] : corner[0] + CROP, corner[1] : corner[1] + CROP]
    found = np.zeros((CROP, CROP), pixels.dtype)
    found[: part.shape[0], : part.shape[1]] = part
    return found


def _border(mask: np.ndarray) -> np.ndarray:
    """Pixels just outside a mask."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown & ~mask

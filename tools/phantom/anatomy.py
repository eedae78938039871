"""A chest painted slice by slice: from the patient's drawn shape to noiseless HU.

Order matters: what is painted later covers what is painted earlier, from the outside inwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from phantom.body import (
    CHEST_POWER,
    LUNG_SIDES,
    Body,
    cage_half_axes,
    dome_height,
    draw_body,
    ellipse_distance,
    heart_distance,
    lung_distance,
    outer_half_axes,
    smoothstep,
)
from phantom.grid import Array, Canvas, Grid
from phantom.nodules import Nodule, draw_nodules
from phantom.tree import Segments, bronchi, hilum, pulmonary_vessels, venous_hilum

FAT_HU, MUSCLE_HU, BLOOD_HU, MARROW_HU, CORTEX_HU, LUMEN_HU = -105.0, 52.0, 42.0, 190.0, 620.0, -985.0


@dataclass(frozen=True)
class Patient:
    """Everything about one phantom patient that does not depend on the reconstruction."""

    body: Body
    z_low: float  # height in the body (mm) at which the scan begins
    arteries: Segments
    veins: Segments
    bronchi: Segments
    nodules: list[Nodule]


def draw_patient(random: np.random.Generator, scan_mm: float) -> Patient:
    """A patient with one to four nodules (fewer where they do not fit), scanned over `scan_mm` about the middle."""
    body = draw_body(random)
    z_low = (body.lung_height - scan_mm) / 2.0 + random.uniform(-6.0, 6.0)
    arteries, veins = pulmonary_vessels(body, random)
    nodules = draw_nodules(body, int(random.integers(1, 5)), (z_low, z_low + scan_mm), random)
    return Patient(body, z_low, arteries, veins, bronchi(arteries), nodules)


def render(patient: Patient, grid: Grid, z: float, *, edge_mm: float, thickness_mm: float) -> Array:
    """Noiseless HU, float32 (rows, columns), of the slice at height z (mm): a thick slice is the mean of thin ones."""
    cuts = max(1, round(thickness_mm / 2.5))
    total = np.zeros((grid.rows, grid.columns), np.float32)
    for cut in range(cuts):
        total += _thin_slice(patient, grid, z + ((cut + 0.5) / cuts - 0.5) * thickness_mm, edge_mm)
    return total / np.float32(cuts)


def _thin_slice(patient: Patient, grid: Grid, z: float, edge_mm: float) -> Array:
    body, whole = patient.body, Canvas.blank(grid, edge_mm)
    _table(whole, body)
    trunk = whole.part(*outer_half_axes(body, z))
    chest_half_axes = cage_half_axes(body, z)
    chest = ellipse_distance(trunk.x, trunk.y, *chest_half_axes, CHEST_POWER)
    _wall(trunk, body, chest, z)
    _shoulders(trunk, body, z)
    inside = trunk.part(*chest_half_axes)
    chest = ellipse_distance(inside.x, inside.y, *chest_half_axes, CHEST_POWER)
    _abdomen(inside, body, chest, z)
    _heart(inside, body, z)
    lungs = _lungs(inside, body, chest, z)
    _spine(trunk, body, z)
    _great_vessels(trunk, body, z)
    _central_airways(trunk, body, z)
    _lung_tubes(inside, patient, lungs, z)
    for nodule in patient.nodules:
        _nodule(inside, nodule, z)
    return whole.hu


def _table(canvas: Canvas, body: Body) -> None:
    top = max(outer_half_axes(body, height)[1] for height in (0.0, 0.5 * body.lung_height)) + 4.0
    depth = canvas.y - (top - 0.0011 * canvas.x**2 + 8.0)
    canvas.paint(canvas.coverage(np.maximum(np.abs(depth - 5.0) - 14.0, np.abs(canvas.x) - 205.0)), -930.0)
    for shift in (-9.0, 19.0):
        canvas.paint(canvas.coverage(np.maximum(np.abs(depth - shift) - 1.2, np.abs(canvas.x) - 205.0)), -250.0)


def _wall(canvas: Canvas, body: Body, chest: Array, z: float) -> None:
    """Skin, fat, muscle, ribs, and the fat in which the organs of the chest lie."""
    half_x, half_y = outer_half_axes(body, z)
    skin = ellipse_distance(canvas.x, canvas.y, half_x, half_y, 2.4)
    canvas.paint(canvas.coverage(skin), 5.0)
    canvas.paint(canvas.coverage(skin + 2.2), FAT_HU)
    angle = np.arctan2(canvas.x, canvas.y)  # 0 at the spine, ±pi at the breastbone
    flesh = skin + body.fat * (1.0 + 0.25 * np.cos(2.0 * angle))
    canvas.paint(canvas.coverage(flesh), MUSCLE_HU)
    # Sheets of fat between the muscles.
    sheet = np.abs(flesh + 7.0 + 2.0 * np.sin(5.0 * angle + z / 40.0)) - 1.0
    canvas.paint(0.7 * canvas.coverage(sheet) * (chest > 10.0), FAT_HU)
    # A rib runs round the chest and sinks on its way to the front: it crosses a slice as a slanted bar in the wall.
    sink = 34.0 * (1.0 - np.cos(angle)) + 0.06 * np.abs(canvas.x)
    off = np.abs(np.mod((z + sink) / body.rib_pitch + 0.15 * np.sign(canvas.x), 1.0) - 0.5) * body.rib_pitch
    fading = smoothstep(-70.0, -20.0, z) * (1.0 - 0.9 * smoothstep(0.98, 1.05, z / body.lung_height))
    bar = np.maximum(np.abs(chest - 5.5) - 4.2, off - 4.6)
    bar = np.maximum(bar, 0.16 * half_x - np.abs(canvas.x) - 40.0 * (canvas.y > 0))
    front = smoothstep(2.2, 2.6, np.abs(angle))  # cartilage in front
    canvas.paint(fading * canvas.coverage(bar), CORTEX_HU - 480.0 * front)
    canvas.paint(fading * canvas.coverage(bar + 2.4), MARROW_HU - 60.0 * front)
    _shoulder_blades(canvas, body, chest, np.abs(angle), z)
    canvas.paint(canvas.coverage(chest), FAT_HU + 15.0)
    lining = np.abs(chest + 1.0) - 1.2
    canvas.paint(0.8 * canvas.coverage(lining), MUSCLE_HU)


def _shoulder_blades(canvas: Canvas, body: Body, chest: Array, angle: Array, z: float) -> None:
    """Thin plates that lie on the ribs at the back; `angle` is 0 at the spine."""
    grown = smoothstep(0.32, 0.7, z / body.lung_height)
    if grown > 0.0:
        lift = 12.0 + 0.2 * body.muscle * (1.0 + 3.0 * grown * smoothstep(0.5, 1.2, angle))
        reach = body.depth * (np.abs(angle - 0.92) - 0.2 * grown)
        plate = np.maximum(np.abs(chest - lift) - 2.8, reach)
        canvas.paint(canvas.coverage(plate), CORTEX_HU - 150.0)
        canvas.paint(canvas.coverage(plate + 1.6), MARROW_HU)


def _shoulders(canvas: Canvas, body: Body, z: float) -> None:
    """Breastbone, collar bones; above the lungs the muscles of the neck."""
    t = z / body.lung_height
    half_y = cage_half_axes(body, z)[1]
    if 0.30 < t < 0.92:
        center = (0.0, -half_y - 9.0)
        width = 15.0 + 8.0 * smoothstep(0.75, 0.9, t)
        canvas.ellipse(center, (width, 7.0), CORTEX_HU - 200.0)
        canvas.ellipse(center, (width - 2.5, 4.6), MARROW_HU - 60.0)
    if t > 0.86:
        lift = (t - 0.86) / 0.14
        for side in LUNG_SIDES:
            center = (side * (28.0 + 60.0 * lift), -half_y - 8.0 + 10.0 * lift)
            canvas.ellipse(center, (28.0, 6.5), CORTEX_HU, angle=side * 0.35)
            canvas.ellipse(center, (24.0, 3.6), MARROW_HU + 60.0, angle=side * 0.35)
            canvas.ellipse((side * 34.0, 0.1 * body.depth), (20.0 * min(lift, 1.0), 24.0 * min(lift, 1.0)), MUSCLE_HU)


def _abdomen(canvas: Canvas, body: Body, chest: Array, z: float) -> None:
    """What lies under the domes of the diaphragm: liver on the right, stomach and spleen on the left."""
    top = max(body.dome_right, body.dome_left)
    if z > top + 2.0:
        return
    under = np.maximum(0.7 * (z - dome_height(body, canvas.x, canvas.y)), chest + 3.0)
    inside = canvas.coverage(under)
    canvas.paint(inside, FAT_HU)
    canvas.paint(canvas.coverage(np.abs(under + 1.2) - 1.2), MUSCLE_HU)  # the diaphragm itself
    liver = np.maximum(under + 2.0, canvas.x - 28.0 - 0.25 * (z - 20.0))
    liver = np.maximum(liver, 0.55 * (canvas.y - 0.42 * body.depth) + 0.6 * (canvas.x + 10.0))
    canvas.paint(canvas.coverage(liver), body.liver_hu)
    covered = canvas.coverage(liver + 8.0)
    for k in range(5):  # veins of the liver converge on the vena cava
        turn = 2.2 + 0.45 * k + 0.1 * np.sin(z / 30.0)
        axis = np.abs(np.sin(turn) * (canvas.x + 20.0) - np.cos(turn) * (canvas.y - 12.0) + (z - 20.0) * 0.35 * (k - 2))
        canvas.paint(0.6 * covered * canvas.coverage(axis - 2.6), body.liver_hu - 22.0)
    hold = canvas.coverage(under + 2.0)
    spleen = ellipse_distance(canvas.x - 0.68 * body.width, canvas.y - 0.40 * body.depth, 30.0, 42.0)
    canvas.paint(hold * canvas.coverage(spleen), 52.0)
    stomach = ellipse_distance(canvas.x - 0.42 * body.width, canvas.y + 0.22 * body.depth, 44.0, 34.0)
    canvas.paint(hold * canvas.coverage(stomach), 45.0)
    canvas.paint(hold * canvas.coverage(stomach + 4.0), 12.0)
    bubble = np.maximum(stomach + 4.0, canvas.y + 0.36 * body.depth)  # air rises to the front, with a level
    canvas.paint(hold * canvas.coverage(bubble), -960.0)


def _heart(canvas: Canvas, body: Body, z: float) -> None:
    sac = heart_distance(body, canvas.x, canvas.y, z)
    if float(sac.min()) > 3.0:
        return
    canvas.paint(canvas.coverage(sac), FAT_HU + 10.0)
    canvas.paint(canvas.coverage(sac + 4.0), 54.0)
    wave = np.sin(0.055 * canvas.x - 0.075 * canvas.y + 0.03 * z)
    chambers = np.maximum(sac + 13.0, -12.0 * np.abs(wave) + 2.5)
    canvas.paint(canvas.coverage(chambers), BLOOD_HU - 6.0)
    canvas.paint(0.6 * canvas.coverage(np.maximum(np.abs(sac + 8.0) - 1.0, 12.0 * wave)), FAT_HU)


def _lungs(canvas: Canvas, body: Body, chest: Array, z: float) -> Array:
    """Paint both lungs, denser towards the back where the patient lies on them; returns their coverage."""
    if not -2.0 < z < body.lung_height:
        return np.zeros_like(canvas.hu)
    wave = body.phase
    density = (
        body.lung_hu
        + 32.0 * (canvas.y / body.depth)
        + 9.0 * np.sin(canvas.x / 31.0 + z / 47.0 + wave[0]) * np.sin(canvas.y / 27.0 - z / 39.0 + wave[1])
        + 6.0 * np.sin(canvas.x / 13.0 - z / 19.0 + wave[2]) * np.sin(canvas.y / 11.0 + z / 23.0 + wave[3])
    )
    lungs = canvas.coverage(lung_distance(body, canvas.x, canvas.y, z, chest))
    canvas.paint(lungs, density)
    slant = 0.62 * (z - 0.47 * body.lung_height) + 0.72 * (canvas.y - 4.0) + 0.05 * np.abs(canvas.x)
    fissure = np.abs(slant + 5.0 * np.sin(canvas.x / 24.0 + wave[4])) - 0.35
    canvas.paint(0.35 * lungs * canvas.coverage(fissure), -600.0)
    return lungs


def _spine(canvas: Canvas, body: Body, z: float) -> None:
    k = body.depth / 88.0
    half_y = max(cage_half_axes(body, z)[1], 0.62 * body.depth)
    back = min(half_y * 0.78, 0.74 * body.depth)
    disc = smoothstep(0.36, 0.46, abs((z / 26.0) % 1.0 - 0.5))
    canvas.ellipse((0.0, back + 4.0 * k), (30.0 * k, 26.0 * k), MUSCLE_HU)
    for side in LUNG_SIDES:
        canvas.ellipse((side * 23.0 * k, back + 33.0 * k), (21.0 * k, 13.0 * k), MUSCLE_HU)
    canvas.ellipse((0.0, back), (18.5 * k, 15.0 * k), CORTEX_HU * (1.0 - disc) + 90.0 * disc)
    canvas.ellipse((0.0, back), (16.5 * k, 13.0 * k), MARROW_HU * (1.0 - disc) + 85.0 * disc)
    arch = 1.0 - 0.75 * disc
    for side in LUNG_SIDES:
        canvas.ellipse((side * 13.0 * k, back + 15.0 * k), (5.0 * k, 9.0 * k), CORTEX_HU - 120.0, opacity=arch)
        process = (side * 24.0 * k, back + 22.0 * k)
        canvas.ellipse(process, (16.0 * k, 4.5 * k), CORTEX_HU - 160.0, angle=-side * 0.45, opacity=arch)
        canvas.ellipse(process, (13.5 * k, 2.2 * k), MARROW_HU, angle=-side * 0.45, opacity=arch)
    canvas.ellipse((0.0, back + 33.0 * k), (3.6 * k, 13.0 * k), CORTEX_HU - 140.0, opacity=arch)
    canvas.ellipse((0.0, back + 18.0 * k), (10.5 * k, 9.0 * k), -20.0)
    canvas.ellipse((0.0, back + 18.0 * k), (6.5 * k, 5.5 * k), 38.0)


def _great_vessels(canvas: Canvas, body: Body, z: float) -> None:
    height, depth = body.lung_height, body.depth
    arch = 0.74 * height
    behind = 0.46 * depth
    tubes: list[tuple[tuple[float, float, float], tuple[float, float, float], float]] = [
        ((14.0, behind + 2.0, -60.0), (21.0, behind, 0.35 * height), 12.0),  # descending aorta
        ((21.0, behind, 0.35 * height), (20.0, 0.36 * depth, arch), 12.0),
        ((20.0, 0.36 * depth, arch), (4.0, -0.02 * depth, arch + 7.0), 12.5),  # arch
        ((4.0, -0.02 * depth, arch + 7.0), (-10.0, -0.24 * depth, 0.62 * height), 14.0),
        ((-10.0, -0.24 * depth, 0.62 * height), (-2.0, -0.22 * depth, 0.42 * height), 15.5),  # ascending aorta
        ((-27.0, -0.08 * depth, 0.40 * height), (-24.0, -0.16 * depth, 0.86 * height), 9.0),  # superior vena cava
        ((-24.0, -0.16 * depth, 0.86 * height), (14.0, -0.34 * depth, 0.90 * height), 6.5),
        ((-23.0, 0.05 * depth, -60.0), (-24.0, 0.0, 0.26 * height), 12.0),  # inferior vena cava
        ((14.0, -0.36 * depth, 0.44 * height), (16.0, -0.10 * depth, 0.575 * height), 13.0),  # pulmonary trunk
        ((16.0, -0.10 * depth, 0.575 * height), tuple(hilum(body, 1.0).tolist()), 10.5),
        ((14.0, -0.06 * depth, 0.565 * height), tuple(hilum(body, -1.0).tolist()), 9.5),
        ((0.0, 0.05 * depth, 0.42 * height), tuple(venous_hilum(body, 1.0).tolist()), 9.0),  # veins
        ((0.0, 0.05 * depth, 0.42 * height), tuple(venous_hilum(body, -1.0).tolist()), 9.0),
        ((-3.0, -0.14 * depth, arch), (-17.0, -0.16 * depth, 1.25 * height), 6.0),  # branches of the arch
        ((6.0, -0.02 * depth, arch), (19.0, -0.05 * depth, 1.25 * height), 4.5),
        ((15.0, 0.14 * depth, arch), (30.0, 0.05 * depth, 1.25 * height), 5.5),
    ]
    for start, end, radius in tubes:
        canvas.tube(start, end, radius, z, BLOOD_HU)
    canvas.ellipse((6.0, 0.42 * depth), (8.0, 5.5), 36.0)  # gullet
    if (z / 37.0) % 1.0 < 0.35:
        canvas.ellipse((6.5, 0.41 * depth), (2.4, 1.5), -500.0)
    for k, (x, y, level, radius) in enumerate(
        ((-14.0, 0.10, 0.66, 5.0), (18.0, -0.12, 0.66, 4.0), (2.0, 0.18, 0.54, 6.0))
    ):
        canvas.ball((x, y * depth, level * height), (radius, radius * 0.8, radius + k), z, 40.0)  # lymph nodes


def _central_airways(canvas: Canvas, body: Body, z: float) -> None:
    split = np.array([2.0, 0.22 * body.depth, 0.61 * body.lung_height])
    top = np.array([0.0, 0.10 * body.depth, 1.3 * body.lung_height])
    ends = [hilum(body, side) + np.array([-side * 2.0, 7.0, -6.0]) for side in LUNG_SIDES]
    for wall, value in ((1.6, 25.0), (0.0, LUMEN_HU)):
        canvas.tube(split, top, 8.6 + wall, z, value)
        canvas.tube(split, ends[0], 6.6 + wall, z, value)
        canvas.tube(split, ends[1], 5.6 + wall, z, value)


def _lung_tubes(canvas: Canvas, patient: Patient, lungs: Array, z: float) -> None:
    """Bronchi with their walls, then arteries and veins."""
    canvas.paint(0.9 * lungs * canvas.tubes(patient.bronchi, z, 1.45), -120.0)
    canvas.paint(lungs * canvas.tubes(patient.bronchi, z), LUMEN_HU + 35.0)
    canvas.paint(lungs * np.maximum(canvas.tubes(patient.arteries, z), canvas.tubes(patient.veins, z)), BLOOD_HU)


def _nodule(canvas: Canvas, nodule: Nodule, z: float) -> None:
    low, high = nodule.low, nodule.high
    if not low[2] - canvas.edge_mm <= z <= high[2] + canvas.edge_mm:
        return
    x, y, hu = canvas.window((low[0], low[1]), (high[0], high[1]))
    value: Any = np.maximum(hu, nodule.hu)  # vessels stay visible through ground glass
    hu += canvas.coverage(nodule.distance(x, y, z)) * (value - hu)

"""A run folder with everything that a report shows, made up: lines, events, readings, a monitor's looks, pictures."""

from __future__ import annotations

import json
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from dinox_train.config import to_yaml, validate

PROTOTYPES, BATCH = 1024, 32
PNG = b"\x89PNG\r\n\x1a\n" + b"not looked at any further"


def png(height: int, width: int) -> bytes:
    """A picture of noise that a browser can show."""
    rows = np.random.default_rng(0).integers(0, 255, (height, 1 + width), np.uint8)
    rows[:, 0] = 0  # no filter
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b""))
    parts = (struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def make_lines(updates: int, total: int, *, validation: bool = True, collapsed: bool = False) -> list[dict[str, Any]]:
    """Lines as the trainer writes them, of a run that learns or of one that collapsed."""
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(updates, 3)).tolist()
    uniform = math.log(PROTOTYPES)
    lines = []
    for update in range(1, updates + 1):
        first, second, third = noise[update - 1]
        learnt = 0.0 if collapsed else 1 - math.exp(-5 * update / total)
        loss = uniform * (1 - 0.5 * learnt) + 0.01 * first
        evaluates = validation and update % max(1, total // 4) == 0
        lines.append(
            {
                "update": update,
                "applied": True,
                "images": update * BATCH,
                "views": update * BATCH * 10,
                "epoch": update * BATCH // 3000,
                "loss": loss,
                "loss_dino": loss,
                "loss_ibot": None,
                "loss_koleo": None,
                "loss_gram": None,
                "lr": 1e-4 * math.cos(update / total),
                "grad_norm": math.exp(0.3 * second),
                "images_per_s": 40 + third,
                "data_wait_fraction": 0.02 + 0.001 * abs(third),
                "read_bytes": 10**6,
                "decoded_bytes": 3 * 10**6,
                "memory_bytes": 3 * 2**30,
                "teacher_entropy": 1 - 0.3 * learnt,
                "feature_std": 0.001 + 0.6 * learnt,
                "effective_rank": 1 + 20 * learnt,
                "prototype_use": (1 + 40 * learnt) / PROTOTYPES,
                "loss_val": loss + 0.1 if evaluates else None,
                "knn_z": 0.8 * learnt if evaluates else None,
                "knn_label": None,
            }
        )
    return lines


def make_run(
    folder: Path,
    lines: list[dict[str, Any]],
    total: int,
    events: list[dict[str, Any]] | None = None,
    *,
    folder_name: str = "runs/chest",
) -> Path:
    """A run folder with all its files; the report is not written yet."""
    config = {
        "run": {"folder": folder_name},
        "model": {"preset": "vit_s"},
        "train": {"updates": total, "batch_size": BATCH},
        "objective": {"prototypes": PROTOTYPES},
        "evaluate": {"every": max(1, total // 4)},
    }
    (folder / "pictures").mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(validate(config)), encoding="utf-8")
    (folder / "env.json").write_text(json.dumps({"python": "3.11.9", "packages": {"torch": "2.13.0"}, "gpu": None}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    started = [{"update": 0, "event": "started", "text": "at update 0"}]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in started + (events or [])))
    return folder


def reading(update: int, **figures: Any) -> dict[str, Any]:
    """A sample of the machine, as RUN/system.jsonl holds it."""
    whole = {"gpu_busy": 0.97, "gpu_temperature_c": 71.0, "gpu_throttled": False, "host_free_bytes": 8 * 2**30}
    unread = dict.fromkeys(("gpu_power_w", "gpu_clock_mhz", "pressure_io", "disk_free_bytes"))
    return {"version": 1, "update": update, "elapsed_s": 10.0 * update, **whole, **unread, **figures}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def look(folder: Path, update: int, value: float) -> None:
    """What a monitor leaves of a checkpoint."""
    step = folder / "monitor" / f"step-{update:08d}"
    step.mkdir(parents=True, exist_ok=True)
    figure = {"value": value, "low": value - 0.1, "high": value + 0.1, "chance": 1 / 256}
    retrieval = {"gallery": 256, "patients": 9, "top1": figure, "top5": figure, "mrr": figure}
    figures = {
        "format": "dinox-monitor",
        "version": 1,
        "update": update,
        "held_out": True,
        "retrieval": retrieval,
        "gram_drift": {"first": {"update": 100, "rms": 0.1}, "previous": None, "gram_teacher": None},
        "baseline": {"random": {"retrieval": retrieval | {"top1": figure | {"value": 0.125}}}, "pixels": None},
    }
    (step / "figures.json").write_text(json.dumps(figures))
    for path in (step / "pca.png", step.parent / "pca_over_time.png"):
        path.write_bytes(PNG)


def make_full_run(folder: Path) -> Path:
    """A run of 400 updates of which everything is known, and not all is well."""
    lines = make_lines(400, 800)
    for line in lines:
        update = line["update"]
        line |= {"stage_s": dict.fromkeys(("wait", "transfer", "views", "teacher", "student", "backward"), 0.1)}
        line |= {"images_per_s": 30.0, "model_flops_utilisation": 0.4, "patch_similarity": 0.3 + update / 1000}
        line |= {"shortcut_accuracy": 0.4, "shortcut_chance": 0.3, "shortcut_name": "manufacturer", "knn_label": 0.7}
        line["applied"] = update not in (90, 91)
    long = "Lower optimizer.learning_rate, raise objective.koleo.weight and look at pictures/views.png. " * 3
    events = [
        {"update": 90, "event": "masked", "text": "update 90 was not applied"},
        {"update": 120, "event": "alarm", "alarm": "rank_low", "text": f"rank_low: few directions. {long}"},
        {"update": 180, "event": "alarm over", "alarm": "rank_low", "text": "rank_low: 12 again"},
        {"update": 200, "event": "throttling", "text": f"the clock is held down. {long}"},
        {"update": 220, "event": "rollback", "text": "back to update 150"},
        {"update": 250, "event": "resumed", "text": "at update 250"},
        {"update": 300, "event": "alarm", "alarm": "knn_z_falls", "text": f"knn_z_falls: worse and worse. {long}"},
    ]
    make_run(folder, lines, 800, events)
    known = {"gpu_power_w": 300.0, "gpu_clock_mhz": 2500.0, "pressure_io": 0.01, "disk_free_bytes": 90 * 2**30}
    write_lines(folder / "system.jsonl", [reading(update, **known) for update in range(400)])
    names = ("progress", "time to the end", "health", "speed", "memory", "heat", "validation")
    (folder / "digest.txt").write_text("".join(f"{name}: {long}\n" for name in names))
    environment = {"a_key_without_any_space_" * 4: "a_value_without_any_space_" * 9, "packages": {"torch": "2.13.0"}}
    (folder / "env.json").write_text(json.dumps(environment))
    for update in range(100, 401, 100):
        look(folder, update, 0.2 + update / 1000)
    pictures = [*(folder / "monitor").glob("*.png"), *(folder / "monitor").glob("*/*.png")]
    for path in (*pictures, folder / "pictures" / "views.png", folder / "pictures" / "patch_features.png"):
        path.write_bytes(png(200, 1400))
    return folder

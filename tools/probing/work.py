"""A probe from its parts: encoders made, tasks encoded, tables computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from inference.network import Network, network_of, open_network

import dinox_model
from dinox_model import VisionTransformer
from probing.case import Case
from probing.dense import dense_table, patches_of, slices_of
from probing.encoders import Encoder, network_encoder, pixel_encoder, statistics_encoder
from probing.errors import ProbeError, UsageError
from probing.features import unit_features
from probing.table import Features, make_table
from probing.tasks import DENSE, tasks_named

PRETRAINED, RANDOM = "pretrained", "random initialisation"
Say = Callable[[str], None]


def untrained(model: VisionTransformer, seed: int) -> VisionTransformer:
    """The same network with first weights: same shape, same preprocessing."""
    network = dinox_model.build(model.config, seed=seed)
    network.preprocess = model.preprocess
    return network.eval()


def encoders_of(
    model: VisionTransformer, device: str | None, dtype: str | None, beside: Sequence[Path], seed: int, say: Say
) -> tuple[Network, list[Encoder]]:
    """The network that is probed, ready to run, and all encoders, it the first. UsageError for two of one name."""
    network = network_of(model, device, dtype)
    if network.depth % 2 == 0:
        raise ProbeError(f"windows have an odd number of slices, one in the middle; this network takes {network.depth}")
    found = [
        network_encoder(PRETRAINED, network),
        network_encoder(RANDOM, network_of(untrained(model, seed), network.device, network.dtype)),
        pixel_encoder(network, model.preprocess),
        statistics_encoder(network.patch_size),
    ]
    for path in beside:
        if not path.exists():
            raise UsageError(f"--beside {path}: no such file or folder")
        other = open_network(path, network.device, network.dtype)
        for note in other.notes:
            say(note)
        found.append(network_encoder(path.resolve().name, other))
    names = [encoder.name for encoder in found]
    if len(set(names)) < len(names):
        raise UsageError(
            f"--beside: two folders of one name among {', '.join(names)}; tables could not tell them apart"
        )
    return network, found


def tables(
    case: Case, encoders: Sequence[Encoder], names: Sequence[str], *, batch_size: int, seed: int, device: str, say: Say
) -> list[dict[str, Any]]:
    """The tables of these tasks, for each kind of tested patients."""
    found = []
    for name in names:
        if name == DENSE:
            found += _dense(case, encoders, batch_size, seed, device, say)
            continue
        for task in tasks_named(name, case.shards, case.joined, case.findings, case.patients):
            say(f"{task.name}: {len(task.items)} windows ({task.selection})")
            features = []
            for encoder in encoders:
                by_kind = unit_features(encoder, case.scans, task, batch_size)
                kinds = encoder.finding_features if task.about_findings else encoder.window_features
                features.append(Features(encoder=encoder.name, headline=kinds[0], by_kind=by_kind))
                say(f"  encoded: {encoder.name}")
            for which in case.tested:
                found.append(make_table(task, features, case.splits(which), tested=which, compare=RANDOM, seed=seed))
                say(f"  probed: patients {which}")
    return found


def _dense(
    case: Case, encoders: Sequence[Encoder], batch_size: int, seed: int, device: str, say: Say
) -> list[dict[str, Any]]:
    slices = slices_of(case.shards, case.findings)
    say(f"dense: {len(slices)} slices")
    patches = []
    for encoder in encoders:
        patches.append(patches_of(encoder, case.scans, slices, batch_size))
        say(f"  encoded: {encoder.name}")
    found = []
    for which in case.tested:
        table = dense_table(slices, patches, case.splits(which), tested=which, compare=RANDOM, seed=seed, device=device)
        found.append(table)
        say(f"  outlined: patients {which}")
    return found

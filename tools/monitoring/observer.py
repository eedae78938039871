"""One look at one checkpoint: figures.json, attention.png and pca.png, and the pictures over time anew.

    OUTPUT/step-XXXXXXXX/   attention.png  pca.png  maps.safetensors  figures.json: written last, so all is there
           attention_over_time.png  pca_over_time.png  over_time.json: of which looks those two are  baseline.json

Invariant: figures are a function of the checkpoint, the set, the choice, and the looks that figures.json names (first
and previous); on a CPU with equal threads and torch, byte for byte. Looks at what a rollback of the run undid stay, and
nothing is compared with them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dinox_io.atomic import write_atomically
from dinox_model import Preprocess, VisionTransformer, ViTConfig, build
from dinox_train.branch import Branch, of_this_run
from dinox_train.checkpoint import checkpoint_folder
from dinox_train.report.monitored import OVER_TIME_LOOKS
from monitoring.choice import Choice, ChoiceError
from monitoring.colours import colours_of, principal_scores, turned_onto
from monitoring.features import (
    Embed,
    attention_of,
    embed_pixels,
    embed_runs,
    embed_with,
    patch_features,
)
from monitoring.kept import BEFORE, FIRST, MAPS, NEWEST, Reference, read_arrays, read_reference, write_arrays
from monitoring.protocol import ASKED, FORMAT, RUN_LENGTH, SEED, VERSION
from monitoring.retrieval import figures as retrieval_figures
from monitoring.retrieval import rank
from monitoring.sheets import (
    Maps,
    save_attention,
    save_attention_over_time,
    save_colours,
    save_colours_over_time,
    spread,
)
from monitoring.snapshots import Opened, Snapshot
from monitoring.statistics import dense_collapse, finite, gram_drift, of_embeddings
from monitoring.windows import Windows

FIGURES, BASELINE = "figures.json", "baseline.json"


@dataclass(frozen=True)
class Seen:
    """What a network makes of the fixed slices."""

    patches: np.ndarray
    """float32 (s, n, d)."""
    grid: tuple[int, int]


@dataclass(frozen=True)
class Kept:
    """What a look leaves behind beside its pictures."""

    attention: np.ndarray
    """float32 (s, h, w): mean over heads."""
    colours: np.ndarray
    """uint8 (s, h, w, 3)."""
    seen: Seen
    scores: np.ndarray
    """(s·n, 3), turned onto those before."""


class Observer:
    """Looks at checkpoints of one run and writes into OUTPUT."""

    def __init__(self, output: Path, choice: Choice, windows: Windows, device: torch.device, *, own_set: bool) -> None:
        self.output, self._choice, self._windows, self._device = output, choice, windows, device
        self._own_set = own_set
        self._baseline: dict[str, Any] = {}

    def look(self, opened: Opened) -> dict[str, Any]:
        """Look at a checkpoint; returns what figures.json says.

        Raises Gone, CheckpointError, ShardError, OSError; ChoiceError where the run goes on with another set by now.
        """
        snapshot = opened.snapshot
        now = tuple(digest for digest, _ in opened.checkpoint.state["shards"])
        if self._own_set and now != self._choice.sets:
            raise ChoiceError(
                f"update {snapshot.update}: the run went on with another set (a patient was withdrawn, say; "
                f"then delete {self.output}, which may show that patient): give another --output"
            )
        model = opened.network(self._device)
        config, preprocess = model.config, model.preprocess
        folder = checkpoint_folder(self.output, snapshot.update)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FIGURES).unlink(missing_ok=True)
        seen = self._slices(model)
        branch = Branch.of(opened.checkpoint.state)
        first, previous = self._references(branch, seen)
        figures = self._about(opened) | self._embedded(preprocess, partial(embed_with, model))
        figures["embedding"] = "cls" if config.cls_token else "mean of patches"
        figures["patch_similarity"] = dense_collapse(seen.patches)
        means, figures["attention"] = self._attention(folder, model)
        del model  # one network at a time
        scores, colours = _coloured(seen, previous)
        save_colours(folder / "pca.png", self._grays(preprocess), colours)
        self._keep(folder, opened, Kept(means, colours, seen, scores), first_look=first is None)
        figures["gram_drift"] = {
            "first": _drift(seen, first),
            "previous": _drift(seen, previous),
            "gram_teacher": self._from_gram_teacher(opened, config, preprocess, seen),
        }
        figures["baseline"] = self._baselines(config, preprocess)
        write_json(folder / FIGURES, figures)
        self._over_time(preprocess, snapshot.folder.parent)
        return figures

    def _about(self, opened: Opened) -> dict[str, Any]:
        choice = self._choice
        return {
            "format": FORMAT,
            "version": VERSION,
            "update": opened.checkpoint.update,
            "updates": opened.config.train.updates,
            "checkpoint": {"digest": opened.snapshot.digest},
            "went_back_to": list(Branch.of(opened.checkpoint.state).went_back_to),
            "sets": list(choice.sets),
            "own_set": self._own_set,
            "side": choice.side or "all",
            "held_out": choice.held_out,
            "seed": SEED,
            "slices": len(choice.slices),
            "view_pixels": choice.sizes.view,
            "picture_pixels": choice.sizes.picture,
            "device": "cpu" if self._device.type == "cpu" else torch.cuda.get_device_name(self._device),
            "dtype": "fp32",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

    def _embedded(self, preprocess: Preprocess, embed: Embed) -> dict[str, Any]:
        """Statistics of the gallery's embeddings, and retrieval; null where nothing can be said."""
        choice = self._choice
        if not choice.runs:
            return {"feature_std": None, "effective_rank": None, "mean_norm": None, "retrieval": None}
        found = embed_runs(choice.runs, self._windows, preprocess, embed)
        number = np.repeat(np.arange(len(choice.runs)), RUN_LENGTH)
        ranking = rank(found.queries, found.gallery, ASKED + RUN_LENGTH * np.arange(len(choice.runs)), number)
        facts = {
            "gallery": choice.num_gallery,
            "queries": len(choice.runs),
            "patients": len(set(choice.patients)),
            "neighbours": RUN_LENGTH - 1,
        }
        retrieval = None if ranking is None else facts | retrieval_figures(ranking, choice.patients, RUN_LENGTH, SEED)
        return {**of_embeddings(found.gallery), "retrieval": retrieval}

    def _slices(self, model: VisionTransformer) -> Seen:
        shown = [self._windows.whole(place, model.preprocess) for place in self._choice.slices]
        found = [patch_features(model, one) for one in shown]
        return Seen(np.stack([patches for patches, _ in found]), found[0][1])

    def _references(self, branch: Branch, seen: Seen) -> tuple[Reference | None, Reference | None]:
        """The first look, and the one before this: the newest of those kept, unless a look that was cut short is done
        again, or a rollback undid its checkpoint."""
        first, *newest = (self._reference(name, branch, seen) for name in (FIRST, NEWEST, BEFORE))
        return first, newest[0] or newest[1] or first

    def _reference(self, name: str, branch: Branch, seen: Seen) -> Reference | None:
        """What a look before this one kept; None where it is of no earlier checkpoint of the run as it is now."""
        found = read_reference(self.output / name, seen.patches.shape)
        return found if found is not None and found.update < branch.update and found.branch.leads_to(branch) else None

    def _attention(self, folder: Path, model: VisionTransformer) -> tuple[np.ndarray, dict[str, Any]]:
        """Write the picture of attention; returns its mean over heads (s, h, w), and what figures.json says of it."""
        choice, windows = self._choice, self._windows
        found = [attention_of(model, windows.whole(place, model.preprocess)) for place in choice.slices]
        whose = "CLS" if model.config.cls_token else "patches"
        save_attention(folder / "attention.png", self._grays(model.preprocess), found, whose)
        shares = np.stack([one.heads.sum(axis=(1, 2)) for one in found]).mean(axis=0)
        said = {"layer": "last", "of": whose, "to_patches_by_head": [finite(float(share)) for share in shares]}
        return np.stack([one.heads.mean(axis=0) for one in found]), said

    def _keep(self, folder: Path, opened: Opened, kept: Kept, *, first_look: bool) -> None:
        """Write what later looks and pictures over time need."""
        branch, digest = Branch.of(opened.checkpoint.state), str(opened.snapshot.digest)
        facts = {"update": str(branch.update), "digest": digest}
        write_arrays(folder / MAPS, {"attention": kept.attention, "colours": kept.colours}, facts)
        scores = kept.scores.astype(np.float32)
        now = Reference(branch.update, digest, kept.seen.patches, scores, branch.went_back_to)
        if self._reference(NEWEST, branch, kept.seen) is not None:
            (self.output / NEWEST).replace(self.output / BEFORE)
        for name in (FIRST, NEWEST) if first_look else (NEWEST,):
            now.write(self.output / name)

    def _from_gram_teacher(
        self, opened: Opened, config: ViTConfig, preprocess: Preprocess, seen: Seen
    ) -> dict[str, Any] | None:
        teacher = opened.gram_teacher(config, self._device)
        if teacher is None:
            return None
        teacher.preprocess = preprocess
        return {"rms": gram_drift(seen.patches, self._slices(teacher).patches)}

    def _baselines(self, config: ViTConfig, preprocess: Preprocess) -> dict[str, Any]:
        """The same figures of the network as it would begin, and of the pixels themselves; computed once."""
        if self._baseline:
            return self._baseline
        path = self.output / BASELINE
        key = {"version": VERSION, "network": config.to_dict(), "preprocess": preprocess.to_dict()}
        key |= {"device": self._device.type, "threads": torch.get_num_threads(), "torch": torch.__version__}
        before = json.loads(path.read_bytes()) if path.exists() else {}
        # As it is read back: tuples are lists there.
        if before.get("of") != json.loads(json.dumps(key)):
            begun = build(config, seed=SEED).to(self._device).eval()
            figures = {
                "random": self._embedded(preprocess, partial(embed_with, begun)),
                "pixels": {"retrieval": self._embedded(preprocess, embed_pixels)["retrieval"]},
            }
            before = {"of": key, "figures": figures}
            write_json(path, before)
        self._baseline = before["figures"]
        return self._baseline

    def _grays(self, preprocess: Preprocess) -> list[np.ndarray]:
        return [self._windows.gray(place, preprocess) for place in self._choice.slices]

    def _over_time(self, preprocess: Preprocess, checkpoints: Path) -> None:
        slices = self._grays(preprocess)
        folders = sorted(path.parent for path in self.output.glob(f"step-*/{FIGURES}"))
        done = [found for folder in folders if (found := _figures(folder)) is not None]
        shown = spread(of_this_run(done, checkpoints))
        if not shown:  # the run has just gone back
            return
        looks = [maps for one in shown if (maps := _maps(checkpoint_folder(self.output, one["update"]))) is not None]
        looks = [look for look in looks if look.attention.shape == looks[-1].attention.shape]
        save_attention_over_time(self.output / "attention_over_time.png", slices, looks)
        save_colours_over_time(self.output / "pca_over_time.png", slices, looks)
        drawn = [[one["update"], one["checkpoint"]["digest"]] for one in shown]
        write_json(self.output / OVER_TIME_LOOKS, {"looks": drawn})


def figures_of(output: Path, snapshot: Snapshot) -> dict[str, Any] | None:
    """What a whole look at this very checkpoint said; None where there was none."""
    found = _figures(checkpoint_folder(output, snapshot.update))
    return found if found is not None and found["checkpoint"]["digest"] == snapshot.digest else None


def _figures(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / FIGURES).read_bytes())
    except (OSError, ValueError):
        return None
    return found if found.get("version") == VERSION else None


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Whole or not at all, the same bytes for the same value."""
    write_atomically(path, (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())


def _coloured(seen: Seen, before: Reference | None) -> tuple[np.ndarray, np.ndarray]:
    """Scores (s·n, 3), turned onto those of the look before, and colours uint8 (s, h, w, 3)."""
    scores = principal_scores(seen.patches.reshape(-1, seen.patches.shape[-1]))
    scores = turned_onto(scores, None if before is None else before.scores)
    return scores, colours_of(scores).reshape(len(seen.patches), *seen.grid, 3)


def _drift(seen: Seen, reference: Reference | None) -> dict[str, Any] | None:
    if reference is None:
        return None
    return {"update": reference.update, "rms": gram_drift(seen.patches, reference.patches)}


def _maps(folder: Path) -> Maps | None:
    found = read_arrays(folder / MAPS)
    if found is None:
        return None
    arrays, facts = found
    return Maps(int(facts["update"]), arrays["attention"], arrays["colours"])

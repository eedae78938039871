"""What a monitor looks at, chosen once and kept: OUTPUT/slices.json says it, and every later look keeps to it.

Invariant: figures and pictures in one OUTPUT are of one set, one side, the same slices, views and sizes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinox_io.atomic import write_atomically
from dinox_train.data import Dataset
from dinox_train.sections import DataSection
from monitoring.places import Place, Stack, choose_runs, choose_slices, stacks_of
from monitoring.protocol import ASKED, FORMAT, GALLERY, RUN_LENGTH, SEED, SLICES, VERSION, Sizes

SLICES_FILE = "slices.json"


class ChoiceError(ValueError):
    """Something else was chosen here before, or there is nothing to choose from."""


@dataclass(frozen=True)
class Choice:
    """The places of pictures and of retrieval."""

    slices: tuple[Place, ...]
    runs: tuple[tuple[Place, ...], ...]
    """Of neighbouring slices; none where no volume of the side has so many."""
    sizes: Sizes
    side: str | None
    held_out: bool
    """Whether the run never trains on them."""
    sets: tuple[str, ...]
    """Digests."""
    asked: int
    """How many slices the gallery should have; the side may have fewer."""

    @property
    def num_gallery(self) -> int:
        return sum(map(len, self.runs))

    @property
    def patients(self) -> list[str]:
        """Whose each query is."""
        return [run[ASKED].stack.patient for run in self.runs]

    def about(self) -> dict[str, Any]:
        """What slices.json says."""
        return {
            "format": f"{FORMAT}-slices",
            "version": VERSION,
            "seed": SEED,
            "sets": list(self.sets),
            "side": self.side or "all",
            "held_out": self.held_out,
            "view_pixels": self.sizes.view,
            "picture_pixels": self.sizes.picture,
            "gallery": self.num_gallery,
            "slices": [_row(place) for place in self.slices],
        }


def choose(
    dataset: Dataset, data: DataSection, sizes: Sizes, folder: Path, slices: int | None, gallery: int | None
) -> Choice:
    """What was chosen in `folder` before, or a choice, which is written there.

    slices, gallery: how many; None: as before, or the default. Raises ChoiceError where something else was asked for
    than was chosen before, or the side has no window.
    """
    path = folder / SLICES_FILE
    before = json.loads(path.read_bytes()) if path.exists() else None
    side = dataset.val_side or dataset.train_side
    stacks = stacks_of([source.shards for source in dataset.sources], side, data)
    if not stacks:
        raise ChoiceError(f"the side {side or 'all'} has no window of {data.depth} slices")
    asked = gallery or (before["gallery"] if before else GALLERY)
    choice = Choice(
        slices=tuple(choose_slices(stacks, slices or (len(before["slices"]) if before else SLICES), SEED)),
        runs=tuple(choose_runs(stacks, asked // RUN_LENGTH, RUN_LENGTH, SEED)),
        sizes=sizes,
        side=side,
        held_out=dataset.val_side is not None,
        sets=tuple(digest for digest, _ in dataset.began),
        asked=asked,
    )
    if before is None:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(choice.about(), indent=1, sort_keys=True) + "\n").encode())
    elif differing := [name for name, value in choice.about().items() if before.get(name) != value]:
        raise ChoiceError(
            f"{folder} holds looks of another {', '.join(sorted(differing))} ({SLICES_FILE} says which): give another "
            "--output, or what was given then"
        )
    return choice


def _row(place: Place) -> dict[str, Any]:
    stack: Stack = place.stack
    return {"set": stack.set, "volume": stack.id, "patient": stack.patient, "slice": place.center, "step": stack.step}


def told(choice: Choice) -> Sequence[str]:
    """For people: what is looked at, and what is missing."""
    lines = [
        f"{len(choice.slices)} slices in pictures; retrieval among {choice.num_gallery} slices, a query of each run of "
        f"{RUN_LENGTH}, of {len(set(choice.patients))} patients "
        + ("that are held out" if choice.held_out else "that are NOT held out: there is no validation side")
    ]
    if choice.num_gallery < choice.asked:
        lines.append(f"the side has no more than {choice.num_gallery} slices in runs of {RUN_LENGTH}: chance is higher")
    return lines

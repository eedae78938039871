"""Which set is measured: the one that is given, else the configuration's own, else a phantom; it is said which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dinox_io.cloud import is_address
from dinox_train.sections import DataSection
from knee_search.phantom_set import phantom_set

PHANTOM = "the phantom"


@dataclass(frozen=True)
class ChosenSet:
    """`path`: a folder, the file of a manifest, or an address. `about`: what results call it, without its folder."""

    path: str
    about: str


def chosen_set(given: str | None, data: DataSection, folder: Path, tell: Callable[[str], None]) -> ChosenSet:
    """given: by the command line. folder: where a phantom is made, where one is needed. PhantomFailed."""
    if given is not None:
        return ChosenSet(given, Path(given).name)
    own, told = _own(data)
    if is_address(own) or Path(own).exists():
        tell(f"the set of the configuration is measured, {own}{told}")
        return ChosenSet(own, Path(own).name + told)
    why = "names no set (fake)" if own == "fake" else f"names {own}, and nothing lies there"
    tell(f"data.shards {why}: a phantom is measured (--shards names another set)")
    return ChosenSet(str(phantom_set(folder, tell)), PHANTOM)


def _own(data: DataSection) -> tuple[str, str]:
    """The set of the configuration; of several the one that most windows are drawn from, and words for that."""
    if isinstance(data.shards, str):
        return data.shards, ""
    largest = max(data.shards, key=lambda one: 1.0 if one.weight is None else one.weight)
    return largest.path, f" (of {len(data.shards)} sets the one with the largest weight)" if len(
        data.shards
    ) > 1 else ""

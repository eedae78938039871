"""Which side of the split a patient is on.

Invariant: a side is a pure function of the patient's pseudonym, the split seed and the two fractions: it never depends
on what else is in the set, so that adding series moves nobody; only an identical volume under patients of different
sides moves, and then out of all of them.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Literal

Side = Literal["train", "val", "test", "none"]


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """ValueError unless both are at least 0 and together below 1 (something must be left to train on)."""
    if not (val_fraction >= 0 and test_fraction >= 0 and val_fraction + test_fraction < 1):
        raise ValueError(
            f"--val-fraction {val_fraction} and --test-fraction {test_fraction} must be at least 0 and together below 1"
        )


def side_of(patient: str, seed: int, val_fraction: float, test_fraction: float) -> Side:
    """The side of a patient (pseudonym): test below `test_fraction`, then val, then train.

    The patient's place in [0, 1) is the first 8 bytes of sha256("split NUL seed NUL pseudonym") over 2**64. With very
    few patients either side may be empty; a larger `val_fraction` only adds patients to val.
    """
    check_fractions(val_fraction, test_fraction)
    digest = hashlib.sha256(f"split\0{seed}\0{patient}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < test_fraction:
        return "test"
    return "val" if place < test_fraction + val_fraction else "train"


def resolve_leaks(
    volumes: Iterable[tuple[str, str, str]], sides: Mapping[str, Side]
) -> tuple[dict[str, Side], list[dict[str, object]]]:
    """Sides of volumes, with identical volumes of patients on different sides taken out.

    Args:
        volumes: (volume id, patient pseudonym, digest) of the whole set, old and new.
        sides: the side of each patient.

    Returns:
        the side of each volume id ("none" where its digest also stands with a patient of another side), and the list of
        such digests: {"digest", "volumes", "sides"}, sorted.
    """
    by_digest: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for volume, patient, digest in volumes:
        by_digest[digest].append((volume, patient))
    result: dict[str, Side] = {}
    leaks: list[dict[str, object]] = []
    for digest, holders in sorted(by_digest.items()):
        found = sorted({sides[patient] for _, patient in holders})
        for volume, patient in holders:
            result[volume] = sides[patient] if len(found) == 1 else "none"
        if len(found) > 1:
            leaks.append({"digest": digest, "volumes": sorted(volume for volume, _ in holders), "sides": found})
    return result, leaks

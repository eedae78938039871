"""Whether weights that learnt from a data set may be passed on, by what its `--about` says: rules as data.

Invariant: nothing is allowed that no rule names. Weights are taken to be derived from the data; whoever holds another
view of the law decides for themselves, and not by this program.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

NON_COMMERCIAL, SHARE_ALIKE = "non-commercial", "share-alike"

OPEN: Sequence[tuple[str, frozenset[str]]] = (
    (r"CC0(-1\.0)?|PDDL-1\.0|Unlicense|public domain", frozenset()),
    (r"CC-BY-[1-4]\.\d|ODC-By-1\.0|MIT|Apache-2\.0|BSD-[23]-Clause|CDLA-Permissive-[12]\.0", frozenset()),
    (r"CC-BY-SA-[1-4]\.\d|ODbL-1\.0|CDLA-Sharing-1\.0", frozenset({SHARE_ALIKE})),
    (r"CC-BY-NC-[1-4]\.\d", frozenset({NON_COMMERCIAL})),
    (r"CC-BY-NC-SA-[1-4]\.\d", frozenset({NON_COMMERCIAL, SHARE_ALIKE})),
)
"""Whole licences (upper or lower case, blanks as dashes) that allow it, and what the weights' own licence must keep."""
FORBIDDEN: Sequence[tuple[str, str]] = (
    (r"\bND\b|no[- ]?deriv", "it allows no derivatives, and weights are derived from the data"),
    (
        r"(not|never) (to )?be (shared|released|published|redistributed|passed on)|no (sharing|redistribution|release)"
        r"|(may|must|shall) not (share|release|publish|redistribute|be (shared|released|published|redistributed))"
        r"|do not (share|release|publish|redistribute)|confidential|internal use only|all rights reserved",
        "it is not to be shared",
    ),
)
"""Words anywhere in the terms that forbid it, and why."""
_KEEPS = {NON_COMMERCIAL: r"\bNC\b|non-?commercial", SHARE_ALIKE: r"\bSA\b|ODbL|CDLA-Sharing|share-?alike"}


@dataclass(frozen=True)
class Judgement:
    """Of one data set."""

    name: str
    licence: str | None
    forbidden: str | None
    """Why its weights may not be passed on, or None."""
    unknown: str | None
    """What somebody must look up first, or None."""
    conditions: frozenset[str]
    """What the weights' licence must keep."""


def judge(about: Mapping[str, str] | None, digest: str) -> Judgement:
    """By what the manifest of the set of this digest says of it; None: nothing."""
    if about is None:
        name = f"the set {digest[:16]}…"
        return Judgement(name, None, None, f"{name} says nothing of its licence (pack_shards --about)", frozenset())
    return judge_terms(about["name"], about["licence"], about["weights_may_be_released"])


def judge_terms(name: str, licence: str, may_be_released: str = "yes") -> Judgement:
    """By terms; may_be_released: yes, no or ask, as whoever packed the set wrote it down."""
    if may_be_released == "no":
        return Judgement(name, licence, f"{name}: weights_may_be_released is no", None, frozenset())
    for pattern, why in FORBIDDEN:
        if re.search(pattern, licence, re.IGNORECASE):
            return Judgement(name, licence, f"{name}: {why} ({_short(licence)})", None, frozenset())
    asked = f"{name}: weights_may_be_released is ask: ask its owner first" if may_be_released == "ask" else None
    spelt = "-".join(licence.split())
    for pattern, conditions in OPEN:
        if re.fullmatch(pattern.replace(" ", "-"), spelt, re.IGNORECASE):
            return Judgement(name, licence, None, asked, conditions)
    needed = frozenset(kind for kind, pattern in _KEEPS.items() if re.search(pattern, licence, re.IGNORECASE))
    unknown = asked or f"{name}: no rule knows its licence ({_short(licence)})"
    return Judgement(name, licence, None, unknown, needed)


def licence_of_weights(judgements: Iterable[Judgement], given: str | None) -> str:
    """The licence that the card names: the given one, or that of the data where all have the same.

    Raises ValueError where there is none to take, or the given one drops what the data's keeps.
    """
    all_of_them = list(judgements)
    if given is None:
        found = {one.licence for one in all_of_them}
        licence = next(iter(found)) if len(found) == 1 else None
        if licence is None:
            raise ValueError("the data name no licence, or several: give that of the weights by --licence")
        return licence
    for one in all_of_them:
        for condition in sorted(one.conditions):
            if not re.search(_KEEPS[condition], given, re.IGNORECASE):
                raise ValueError(
                    f"--licence {given}: {one.name} is {condition} ({_short(one.licence or '')}), and so must the "
                    "licence of the weights be"
                )
    return given


def _short(licence: str) -> str:
    text = " ".join(licence.split())
    return text if len(text) <= 80 else text[:79] + "…"

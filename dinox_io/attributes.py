"""Values of DICOM attributes as plain Python: a text, a number, or nothing.

Invariant: a value that is absent, of another count, not finite or no number is None, never a guess. Data sets are read
by keyword only, so that this file needs no pydicom.
"""

import math
from collections.abc import Iterable
from typing import Any

Numbers = tuple[float, ...]


def text(dataset: Any, keyword: str) -> str:
    """The value as text without padding; "" if absent, several values joined by backslashes."""
    value = dataset.get(keyword)
    if value is None:
        return ""
    if _is_multiple(value):
        value = "\\".join(str(item) for item in value)
    return str(value).strip(" \0")


def numbers(dataset: Any, keyword: str, count: int) -> Numbers | None:
    """`count` finite numbers, or None."""
    try:
        value = dataset.get(keyword)  # converts its text only now
        if value is None or value == "":
            return None
        found = tuple(float(item) for item in (value if _is_multiple(value) else [value]))
    except (TypeError, ValueError, OverflowError):
        return None
    return found if len(found) == count and all(map(math.isfinite, found)) else None


def number(dataset: Any, keyword: str) -> float | None:
    """One finite number, or None."""
    found = numbers(dataset, keyword, 1)
    return found[0] if found else None


def integer(dataset: Any, keyword: str, default: int) -> int:
    """One number as an integer; `default` if there is none."""
    found = number(dataset, keyword)
    return default if found is None else int(found)


def _is_multiple(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes)

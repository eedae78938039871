"""What a data set says of itself (`--about FILE.yaml`): its name, licence, citation, and what may be done with weights.

Invariant: what comes out is a flat JSON object of the keys below, each a short text that may be printed anywhere; it
stands in the manifest as `about`, and no key of it is ever made up.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_FILE_BYTES = 1 << 16
RELEASE = ("yes", "no", "ask")

# Key: the most characters it may have. What it says, for people.
KEYS: Mapping[str, tuple[int, str]] = {
    "name": (200, "what the data set is called"),
    "version": (100, "which release of it"),
    "doi": (200, "its DOI, such as 10.7937/K9/TCIA.2015.LO9QL9SX"),
    "url": (1000, "where it is found, https://…"),
    "licence": (2000, "SPDX identifier such as CC-BY-3.0, or the terms in words"),
    "citation": (10_000, "what to cite"),
    "weights_may_be_released": (100, "may weights that were trained on it be released: yes, no or ask"),
    "description": (10_000, "what is in it"),
    "notes": (10_000, "what else is worth knowing"),
}
REQUIRED = ("name", "licence", "weights_may_be_released")
_ONE_LINE = frozenset({"name", "version", "doi", "url", "licence", "weights_may_be_released"})
_DOI = re.compile(r"10\.\d{4,9}/\S+")
_URL = re.compile(r"https?://\S+")


def read_about(path: str | Path) -> dict[str, Any]:
    """The data set's description in a YAML file: {key: text}, of the keys in `KEYS`, sorted.

    Raises:
        ValueError: it cannot be read, is larger than 64 KiB, or is not what is asked for; names file, key and what is
            allowed. Values are read as text, so `version: 1.10` stays "1.10" and `weights_may_be_released: no` "no".
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"{path}: has more than {MAX_FILE_BYTES:,} bytes: give a short description of the data set")
    about: dict[str, Any] = {}
    for key, value, line in _entries(data, path):
        where = f"{path}, line {line}: {key}"
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, 1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"{path}, line {line}: {key[:60]!r} is no key{meant}: allowed are {', '.join(KEYS)}")
        if key in about:
            raise ValueError(f"{where} stands twice")
        about[key] = _checked(key, value, where)
    for key in REQUIRED:
        if key not in about:
            raise ValueError(f"{path}: {key} is missing ({KEYS[key][1]})")
    return dict(sorted(about.items()))


def is_about(value: object) -> bool:
    """Whether a manifest's `about` is None or what `read_about` gives (newer keys are let through, and bounded)."""
    if value is None:
        return True
    return isinstance(value, dict) and all(
        isinstance(key, str)
        and isinstance(text, str)
        and len(text) <= MAX_FILE_BYTES
        and (key not in KEYS or _problem(key, text) is None)
        for key, text in value.items()
    )


def _entries(data: bytes, path: Path) -> list[tuple[str, str | None, int]]:
    """(key, text or None where it is none, line from 1) in the order of the file."""
    import yaml  # here, so that reading shards needs no YAML

    try:
        # Composed, never constructed: no object is made of what the file says, and `no` stays a text.
        root = yaml.compose(data, yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path}: is not YAML ({reason or type(error).__name__})") from None
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path}: must hold lines of `key: text`, with the keys {', '.join(KEYS)}")
    entries: list[tuple[str, str | None, int]] = []
    for key, value in root.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else "a key that is no text"
        text = value.value if isinstance(value, yaml.ScalarNode) else None
        if value.tag == "tag:yaml.org,2002:null":
            text = ""
        entries.append((name, text, key.start_mark.line + 1))
    return entries


def _checked(key: str, value: str | None, where: str) -> str:
    if value is None:
        raise ValueError(f"{where} must be a text ({KEYS[key][1]})")
    text = value.strip()
    if not text:
        raise ValueError(f"{where} is empty: leave it out, or say {KEYS[key][1]}")
    problem = _problem(key, text)
    if problem:
        raise ValueError(f"{where} {problem}")
    return text


def _problem(key: str, text: str) -> str | None:
    """What is wrong with the text of a key, or None."""
    limit, meaning = KEYS[key]
    if len(text) > limit:
        return f"has {len(text):,} characters, at most {limit:,} are allowed"
    if not all(letter.isprintable() or (letter == "\n" and key not in _ONE_LINE) for letter in text):
        return "holds a control character or a line break: give plain text"
    if key == "weights_may_be_released" and text not in RELEASE:
        return f"is {text[:60]!r}, not one of {', '.join(RELEASE)}"
    if (key == "doi" and not _DOI.fullmatch(text)) or (key == "url" and not _URL.fullmatch(text)):
        return f"is {text!r}: give {meaning}"
    return None

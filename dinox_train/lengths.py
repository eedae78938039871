"""Lengths that a configuration gives in images, in updates: `warmup_updates: 100k images`.

The same recipe at another batch size keeps its lengths in images. They become updates once, before anything reads them,
so that the resolved configuration shows what is run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_IMAGES = re.compile(r"(\d+(?:\.\d+)?)\s*([kM]?)\s+images?")
_OTHER_NAMES = (("gram", "start"), ("gram", "refresh_every"))
"""Lengths whose names do not end in `updates`: section and key."""


def updates_of_images(text: str, batch_size: int) -> int | None:
    """The updates that it takes to see so many images (`100000 images`, `100k images`, `1.5M images`), rounded up.

    None for a text of another form.
    """
    found = _IMAGES.fullmatch(text.strip())
    if not found:
        return None
    images = round(float(found[1]) * {"": 1, "k": 1_000, "M": 1_000_000}[found[2]])
    return -(-images // batch_size)


def lengths_in_updates(tree: Any, batch_size: int) -> Any:
    """A copy of a configuration's tree (nested mappings) in which lengths given in images are numbers of updates.

    batch_size: images per update where the tree does not say it in train.batch_size. What is no such length stays as
    it is: whoever checks the tree says what is wrong with it.
    """
    if not isinstance(tree, Mapping):
        return tree
    train = tree.get("train")
    given = train.get("batch_size") if isinstance(train, Mapping) else getattr(train, "batch_size", None)
    if isinstance(given, int) and given > 0:
        batch_size = given
    return _converted(tree, "", batch_size)


def _converted(value: Any, section: str, batch_size: int) -> Any:
    if isinstance(value, Mapping):
        return {name: _item(section, str(name), item, batch_size) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_converted(item, section, batch_size) for item in value)
    return value


def _item(section: str, name: str, value: Any, batch_size: int) -> Any:
    if isinstance(value, str) and (name.endswith("updates") or (section, name) in _OTHER_NAMES):
        updates = updates_of_images(value, batch_size)
        return value if updates is None else updates
    return _converted(value, name, batch_size)

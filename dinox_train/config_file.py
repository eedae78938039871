"""Configuration files and `a.b=value` as nested mappings, and back; what the keys mean is config.py's.

Invariant: nothing is guessed. A key that stands twice, a tag that makes objects and text that is no YAML are refused,
with file and line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml


class ConfigError(ValueError):
    """A configuration that is refused: what, where it stands, what to do."""


class _StrictLoader(yaml.SafeLoader):
    """YAML without tags that make objects, repeated keys refused; `3e-4` is a number, and `off` a word (YAML 1.2)."""


_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.[\d_]+)([eE][-+]?\d+)$"),
    list("-+.0123456789"),
)


def read_yaml(file: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """Keys and values of a file, and the line of each key. Raises ConfigError with file and line."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be read ({error.strerror}). Give an existing YAML file, e.g. configs/demo.yaml."
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: is not UTF-8 text. A configuration is a YAML file.") from None
    try:
        node = yaml.compose(text, _StrictLoader)
        lines = dict(_key_lines(node, (), file)) if node is not None else {}
        tree = _StrictLoader(text).get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file}:{mark.line + 1}" if mark else str(file)
        raise ConfigError(f"{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if tree is None:
        return {}, {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: must hold keys and values (`train:` …), not a {type(tree).__name__}.")
    return tree, lines


def _key_lines(node: yaml.Node, path: tuple[str, ...], file: Path) -> Iterator[tuple[tuple[str, ...], int]]:
    """Each key's path and line; refuses a key that stands twice in one mapping."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in seen:
            raise ConfigError(f"{file}:{line}: key `{'.'.join((*path, name))}` stands already in line {seen[name]}.")
        seen[name] = line
        yield (*path, name), line
        yield from _key_lines(value, (*path, name), file)


def parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    """Path and value of `a.b=value`. Raises ConfigError."""
    key, equals, value = text.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise ConfigError(f"command line: `{text}` is not of the form a.b=value (e.g. train.updates=2000).")
    try:
        return path, _StrictLoader(value).get_single_data()
    except yaml.YAMLError:
        raise ConfigError(f"command line: the value of `{text}` is not valid YAML; quote it.") from None


def overlay(tree: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Put `part` over `tree`, key by key; what is no mapping is replaced as a whole."""
    for name, value in part.items():
        if isinstance(value, Mapping) and isinstance(tree.get(name), dict):
            overlay(tree[name], value)
        else:
            tree[name] = dict(value) if isinstance(value, Mapping) else value


def put(tree: Any, path: Sequence[str], value: Any, text: str, walked: tuple[str, ...] = ()) -> None:
    """Put what the command line says at `path`; the number of an item leads into a list: `stages.0.updates`."""
    name, *rest = path
    where = ".".join(walked)
    key: Any = name
    if isinstance(tree, list):
        if not (name.isdecimal() and int(name) < len(tree)):
            known = f"items 0 to {len(tree) - 1}" if tree else "no items"
            raise ConfigError(f"command line: `{text}`: `{where}` has {known}, and `{name}` is none of them.")
        key = int(name)
    elif name.isdecimal():
        raise ConfigError(
            f"command line: `{text}`: no file gives a list `{where or name}` that has an item {name}. Give all of it, "
            f"'{where or name}=[{{KEY: value}}]', or write it into a file and overlay that."
        )
    there = tree[key] if isinstance(tree, list) else tree.get(key)
    if rest:
        if not isinstance(there, dict | list):
            there = tree[key] = {}
        put(there, rest, value, text, (*walked, name))
    elif isinstance(value, Mapping) and isinstance(there, dict):
        overlay(there, value)
    else:
        tree[key] = value


def written(tree: Mapping[str, Any]) -> str:
    """`tree` as YAML text that `read_yaml` reads back to an equal one (tuples as lists)."""
    return yaml.safe_dump(_lists(tree), sort_keys=False, allow_unicode=True)


def _lists(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _lists(item) for name, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, tuple) else value

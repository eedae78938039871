"""What the fields of a frozen dataclass may hold: checked when one is made, read from mappings and YAML, and described
as a JSON schema.

A field's type hint is the only place where its rule stands: `int`, `float`, `bool`, a `Literal` of names, `X | None`, a
tuple of such, and `Annotated[number, Bounds(…)]`. Invariant: what `check` lets through, `from_mapping` makes again from
its JSON or YAML form.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import math
import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Made = TypeVar("Made")


@dataclass(frozen=True)
class Bounds:
    """Limits of a number, each of them optional; a float must be finite in any case."""

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None

    def fault(self, value: float) -> str | None:
        """What is wrong with `value`, as the rest of a sentence."""
        if self.minimum is not None and value < self.minimum:
            return f"must be at least {self.minimum:g}, not {value}"
        if self.maximum is not None and value > self.maximum:
            return f"must be at most {self.maximum:,.15g}, not {value}"
        if self.above is not None and value <= self.above:
            return f"must be more than {self.above:g}, not {value}"
        if self.below is not None and value >= self.below:
            return f"must be less than {self.below:g}, not {value}"
        return None

    def schema(self) -> dict[str, float]:
        """The same in the words of JSON schema."""
        words = {
            "minimum": self.minimum,
            "maximum": self.maximum,
            "exclusiveMinimum": self.above,
            "exclusiveMaximum": self.below,
        }
        return {word: limit for word, limit in words.items() if limit is not None}


Count = Annotated[int, Bounds(minimum=1, maximum=2**24)]
"""A product of two is a length that torch's 64-bit sizes can hold."""


def check(instance: Any) -> None:
    """Raises ValueError that names the first field of a dataclass whose value does not fit its type hint."""
    kind = type(instance)
    for name, hint in get_type_hints(kind, include_extras=True).items():
        fault = _fault(getattr(instance, name), hint)
        if fault:
            raise ValueError(f"{kind.__name__}.{name} {fault}")


def from_mapping(kind: type[Made], values: Mapping[str, Any]) -> Made:
    """The dataclass `kind` from JSON or YAML values (lists where it has tuples).

    Raises ValueError for an unknown key (naming the nearest), a missing one, or a value that does not fit.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"a {kind.__name__} is made of keys and values, not of {values!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise ValueError(f"unknown key {key!r} of a {kind.__name__}{nearest(str(key), fields)}")
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in values]
    if missing:
        raise ValueError(f"a {kind.__name__} needs {', '.join(missing)} too")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def to_mapping(instance: Any) -> dict[str, Any]:
    """All fields as JSON values."""
    values = dataclasses.asdict(instance)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def from_yaml(text: str) -> Mapping[str, Any]:
    """The keys and values of a YAML text. `1e-5` is a number here, and no tag makes an object.

    Raises ValueError for what is no YAML, no mapping, or has a key twice.
    """
    import yaml

    class StrictLoader(yaml.SafeLoader):
        """YAML 1.1 as PyYAML reads it, but with YAML 1.2's numbers."""

    number = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.[\d_]+)([eE][-+]?\d+)$")
    StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    try:
        node = StrictLoader(text).get_single_node()
        values = StrictLoader(text).get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {error}") from error
    if not isinstance(node, yaml.MappingNode) or not isinstance(values, dict):
        raise ValueError("YAML must hold keys and values here (`width: 384`)")
    keys = [key.value for key, _ in node.value]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise ValueError(f"key {twice!r} stands twice")
    return values


def to_yaml(values: Mapping[str, Any]) -> str:
    """Keys and values, in their order, as YAML that `from_yaml` reads back."""
    import yaml

    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)


def json_schema(kind: type) -> dict[str, Any]:
    """A JSON schema (draft 2020-12) of what `from_mapping` takes for `kind`.

    Descriptions are the texts below the fields in the source; an installation without sources has none. Rules between
    fields are no part of it.
    """
    hints, texts = get_type_hints(kind, include_extras=True), _texts_below_fields(kind)
    properties: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        properties[field.name] = _schema_of(hints[field.name])
        if field.name in texts:
            properties[field.name]["description"] = texts[field.name]
        if field.default is not dataclasses.MISSING:
            properties[field.name]["default"] = field.default
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": kind.__name__,
        "description": inspect.getdoc(kind) or "",
        "type": "object",
        "properties": properties,
        "required": [field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING],
        "additionalProperties": False,
    }


def nearest(name: str, known: Iterable[str]) -> str:
    """The rest of an error message about an unknown name: the known one it may have been meant to be, or all of
    them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _fault(value: object, hint: Any) -> str | None:
    """What is wrong with `value`, as the rest of a sentence; None where it fits."""
    if get_origin(hint) is Annotated:
        kind, bounds = get_args(hint)
        return _fault(value, kind) or bounds.fault(value)
    if get_origin(hint) in (Union, UnionType):
        kind = next(argument for argument in get_args(hint) if argument is not NoneType)
        return None if value is None else _fault(value, kind)
    if get_origin(hint) is Literal:
        names = [str(name) for name in get_args(hint)]
        if value in names:
            return None
        close = nearest(value, names) if isinstance(value, str) else ""
        return f"must be one of {', '.join(names)}, not {value!r}" + (close if "did you mean" in close else "")
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        if isinstance(value, tuple) and len(value) == len(kinds) and not any(map(_fault, value, kinds)):
            return None
        return f"must be {len(kinds)} values, each {_name(kinds[0])}, not {value!r}"
    if hint is float and type(value) in (int, float):
        return None if math.isfinite(value) else f"must be finite, not {value}"  # type: ignore[arg-type]
    return None if type(value) is hint else f"must be of type {_name(hint)}, not {value!r}"


def _name(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        limits = ", ".join(f"{word} {limit:g}" for word, limit in get_args(hint)[1].schema().items())
        return f"{_name(get_args(hint)[0])} ({limits})"
    return hint.__name__


def _schema_of(hint: Any) -> dict[str, Any]:
    if get_origin(hint) is Annotated:
        kind, bounds = get_args(hint)
        return _schema_of(kind) | bounds.schema()
    if get_origin(hint) in (Union, UnionType):
        kind = next(argument for argument in get_args(hint) if argument is not NoneType)
        return {"anyOf": [_schema_of(kind), {"type": "null"}]}
    if get_origin(hint) is Literal:
        return {"type": "string", "enum": list(get_args(hint))}
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        items = [_schema_of(kind) for kind in kinds]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(kinds), "maxItems": len(kinds)}
    return {"type": {int: "integer", float: "number", bool: "boolean", str: "string"}[hint]}


def _texts_below_fields(kind: type) -> dict[str, str]:
    try:
        source = textwrap.dedent(inspect.getsource(kind))
    except OSError:
        return {}
    body = ast.parse(source).body[0].body  # type: ignore[attr-defined]
    texts: dict[str, str] = {}
    for statement, below in itertools.pairwise(body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            texts[ast.unparse(statement.target)] = " ".join(str(below.value.value).split())
    return texts

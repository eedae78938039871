"""JSON with one spelling: what is hashed and stored in shards and manifests.

Canonical: keys sorted, no spaces, UTF-8, no NaN or infinity. Reading is as strict: no duplicate keys, bounded depth.
"""

from __future__ import annotations

import json
from typing import Any

from dinox_io.errors import ShardError


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value. ValueError or TypeError if it is none (NaN, an array, a set)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def parse_json_object(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object from untrusted bytes; ShardError, naming `what`, for anything else."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{what} is not JSON as it was written ({type(error).__name__}: {error})") from None
    if not isinstance(value, dict):
        raise ShardError(f"{what} is not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a key stands twice")
    return members


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")

"""KEY.json: what a shard says of one volume beside its pixels; written canonically, read without trust.

Invariant: a record that is accepted has a known version, encoding, filter and codec, a bounded shape, and numbers
where numbers belong. Keys that the format does not define are ignored.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from dinox_io import hounsfield
from dinox_io.canonical import canonical_json, parse_json_object
from dinox_io.codec import CODECS, MAX_SLICE_VALUES, check_filter
from dinox_io.errors import ShardError
from dinox_io.volume import Volume

FORMAT_VERSION = 1
META_SUFFIX = ".json"
ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,89}")

# Members of KEY.json that the format defines; a volume's facts may not take their names.
RESERVED_KEYS = frozenset(
    {"version", "id", "patient", "series", "shape", "dtype", "unit", "encoding", "quant", "filter", "codec"}
    | {"spacing_mm", "z_mm", "direction", "sha256"}
)


def record_of(volume: Volume, *, filter: str, digest: str) -> bytes:
    """KEY.json of a volume. ValueError for an unknown filter, an impossible id, or facts that take a reserved name."""
    check_filter(filter)
    if not ID_PATTERN.fullmatch(volume.id):
        raise ValueError(f"volume id {volume.id!r} cannot name a member: letters, digits, - and _, at most 90")
    if taken := RESERVED_KEYS & volume.facts.keys():
        raise ValueError(f"volume {volume.id}: facts may not be named {', '.join(sorted(taken))}: the format has those")
    return canonical_json(
        volume.facts
        | {
            "version": FORMAT_VERSION,
            "id": volume.id,
            "patient": volume.patient,
            "series": volume.series,
            "shape": [int(size) for size in volume.hu.shape],
            "dtype": "<i2",
            "unit": "HU",
            "encoding": hounsfield.ENCODING,
            "quant": 1,
            "filter": filter,
            "codec": "zstd",
            "spacing_mm": [float(spacing) for spacing in volume.spacing_mm],
            "z_mm": [float(z) for z in volume.z_positions_mm],
            "direction": [float(cosine) for cosine in volume.orientation],
            "sha256": digest,
        }
    )


@dataclass(frozen=True, kw_only=True)
class VolumeMeta:
    """The members of KEY.json that this version needs, checked."""

    id: str
    patient: str
    series: str
    shape: tuple[int, int, int]
    filter: str
    spacing_mm: tuple[float, float, float]
    z_positions_mm: np.ndarray
    """float64 (z,)."""
    orientation: tuple[float, ...]
    digest: str


def parse_meta(data: bytes, key: str, file_name: str) -> VolumeMeta:
    """Check KEY.json: an unknown version, encoding, filter or codec is refused, an unknown key ignored. ShardError."""
    where = f"{file_name}: {key}{META_SUFFIX}"
    members = parse_json_object(data, where)
    for name, value in (("version", FORMAT_VERSION), ("id", key), ("dtype", "<i2"), ("unit", "HU"), ("quant", 1)):
        expect(members, name, value, where)
    try:
        hounsfield.check_encoding(str(members.get("encoding")))
        check_filter(str(members.get("filter")))
    except ValueError as error:
        raise ShardError(str(error), file=where) from None
    if members.get("codec") not in CODECS:
        raise ShardError(f"unknown codec {members.get('codec')!r}: this version knows {', '.join(CODECS)}", file=where)
    shape = _shape(members.get("shape"), where)
    return VolumeMeta(
        id=key,
        patient=_text(members, "patient", where),
        series=_text(members, "series", where),
        shape=shape,
        filter=members["filter"],
        spacing_mm=_three(_numbers(members, "spacing_mm", 3, where)),
        z_positions_mm=np.array(_numbers(members, "z_mm", shape[0], where), np.float64),
        orientation=tuple(_numbers(members, "direction", 9, where)),
        digest=_text(members, "sha256", where),
    )


def expect(members: dict[str, Any], name: str, value: object, where: str) -> None:
    """ShardError unless the member is there with this very value and type."""
    found = members.get(name)
    if found != value or type(found) is not type(value):
        raise ShardError(f"{name} is {found!r}, this version reads {value!r}", file=where)


def _text(members: dict[str, Any], name: str, where: str) -> str:
    value = members.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= 200:
        raise ShardError(f"{name} is missing or no text", file=where)
    return value


def _numbers(members: dict[str, Any], name: str, count: int, where: str) -> list[float]:
    values = members.get(name)
    if not isinstance(values, list) or len(values) != count or not {int, float}.issuperset(map(type, values)):
        raise ShardError(f"{name} is not {count} numbers", file=where)
    try:
        return list(map(float, values))
    except OverflowError:
        raise ShardError(f"{name} is not {count} numbers", file=where) from None


def _three(values: list[float]) -> tuple[float, float, float]:
    return values[0], values[1], values[2]


def _shape(shape: object, where: str) -> tuple[int, int, int]:
    if (
        not isinstance(shape, list)
        or len(shape) != 3
        or not all(type(size) is int and 0 < size < 1 << 31 for size in shape)
        or shape[1] * shape[2] > MAX_SLICE_VALUES
    ):
        raise ShardError(f"shape {shape!r} is none of a volume", file=where)
    return shape[0], shape[1], shape[2]

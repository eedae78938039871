"""What all sections of a configuration are: immutable, strict about types, closed to unknown keys."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0, lt=2**31)]
Side = Annotated[int, Field(gt=0, le=2**14)]
"""Pixels: up to here positions are exact to 1/1024 of one in fp32."""
Length = Annotated[int, Field(gt=0, le=2**24)]
"""Of an axis of a matrix, as dinox_model takes them."""
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Range = tuple[float, float]


class Section(BaseModel):
    """A part of the configuration: immutable, strict about types, closed to unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

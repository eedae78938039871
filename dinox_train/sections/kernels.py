"""The section `kernels`: which form of each computation runs. It changes speed and memory, not the mathematics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import model_validator

from dinox_model.config import nearest
from dinox_train.sections.section import Section

WORDS = ("auto", "reference")
Fused = Literal["auto", "reference", "triton"]


class KernelsSection(Section):
    """`kernels: auto` and `kernels: reference` mean that word for each; in a mapping, what is left out is auto.

    auto: the fastest form that is right, tried when the run begins, on a GPU; on a CPU torch's operators. reference:
    torch's operators. Any other name: that form, and an error that says why where it cannot run or is wrong.
    """

    attention: Literal[
        "auto", "reference", "triton", "flash-attn", "sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "math"
    ] = "auto"
    """Attention of the networks. reference: the backend that torch picks; sdpa-… and math: that one of torch's;
    triton: ours; flash-attn: that package, where it is installed."""
    rotate: Fused = "auto"
    """Rotary positions: triton turns queries and keys where they lie."""
    residual_norm: Fused = "auto"
    """Residual, LayerScale and the norm after it: triton does them in one pass."""
    linear: Literal["auto", "reference"] = "auto"
    """auto: matrix products of each layout go to the BLAS library that was measured to be faster; reference: torch's
    choice."""
    cross_entropy: Fused = "auto"
    """Sinkhorn and the cross-entropies of DINO and iBOT: triton never writes the teacher's targets to memory."""
    optimizer: Fused = "auto"
    """AdamW and the teacher's average: triton does both in one pass."""
    crop: Fused = "auto"
    """Window, crop, resize and flip of views: triton does them in one pass over int16."""
    unfilter: Literal["auto", "host", "reference", "triton"] = "auto"
    """Where the shards' filter is undone: host, by the loader's threads; reference and triton, on the device, by
    torch's operators or ours. auto: host on a CPU."""

    @model_validator(mode="before")
    @classmethod
    def _one_word(cls, given: Any) -> Any:
        if isinstance(given, str):
            if given not in WORDS:
                raise ValueError(f"{given!r} is none: give auto, reference or a mapping{nearest(given, WORDS)}")
            names = dict.fromkeys(cls.model_fields, given)
            return names | {"unfilter": "host"} if given == "reference" else names
        if isinstance(given, Mapping):
            for name, value in given.items():
                cls._check_backend(str(name), value)
        return given

    @classmethod
    def _check_backend(cls, name: str, value: Any) -> None:
        field = cls.model_fields.get(name)
        known = getattr(field.annotation, "__args__", ()) if field is not None else ()
        if isinstance(value, str) and known and value not in known:
            raise ValueError(f"{name} has no form {value!r}; it has {', '.join(known)}{nearest(value, known)}")

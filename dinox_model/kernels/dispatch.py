"""Which form of each kernel a network runs with: the choices that are handed to it, and attention by its backend.

A `Kernels` is made once, when a run begins (`probe.py` tries what there is), and `dinox_model.execution.use` puts it on
the network's modules. Invariant: nothing here looks at the machine, and nothing here falls back: a backend that cannot
run raises.

Legend: b images, t tokens, a heads, e features of a head.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

REFERENCE_BACKEND = "reference"
"""torch's own operators, with the choices that torch itself makes; what every kernel is compared with."""
SDPA: Mapping[str, SDPBackend] = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""torch's scaled_dot_product_attention, held to one of its backends."""
PACKED = ("triton", "flash-attn")
"""Backends that read queries, keys and values from the one buffer that the GEMM wrote."""
ATTENTION = (REFERENCE_BACKEND, *PACKED, *SDPA)
"""All backends of attention."""
FUSED = (REFERENCE_BACKEND, "triton")
"""Those of kernels that have a reference and one Triton form."""


def check_backend(name: str, backend: str, known: tuple[str, ...]) -> None:
    """Raises ValueError unless `backend` is one of `known`, naming the nearest."""
    if backend not in known:
        from dinox_model.config import nearest

        raise ValueError(f"kernels.{name}: unknown backend {backend!r}{nearest(backend, known)}")


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The choices of a network. Raises ValueError for a backend that is none, naming the nearest."""

    attention: str = REFERENCE_BACKEND
    """One of ATTENTION, for sequences whose length `attention_by_length` does not name."""
    attention_by_length: tuple[tuple[int, str], ...] = ()
    """Tokens of a sequence, and the backend for them: global and local views differ in what is fastest."""
    rotate: str = REFERENCE_BACKEND
    """One of FUSED: RoPE of queries and keys where they lie, instead of on copies of them."""
    residual_norm: str = REFERENCE_BACKEND
    """One of FUSED: residual, LayerScale and the norm after them in one pass."""

    def __post_init__(self) -> None:
        for backend in (self.attention, *(backend for _, backend in self.attention_by_length)):
            check_backend("attention", backend, ATTENTION)
        for name in ("rotate", "residual_norm"):
            check_backend(name, getattr(self, name), FUSED)

    def attention_of(self, num_tokens: int) -> str:
        """The backend for sequences of so many tokens."""
        return next((backend for length, backend in self.attention_by_length if length == num_tokens), self.attention)

    def wants_packed(self, num_tokens: int) -> bool:
        """Whether a chosen kernel reads queries, keys and values of such sequences from one buffer."""
        return self.rotate != REFERENCE_BACKEND or self.attention_of(num_tokens) in PACKED


REFERENCE = Kernels()
"""torch's operators throughout."""


_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "dinox::product", "dinox::linear"}
_ATTENTIONS = ("aten::_scaled_dot_product", "dinox::attention", "flash_attn::")


def is_product(operator: str) -> bool:
    """Whether an operator, by its name as torch has it (`aten::mm`), is a matrix product or attention, ours too."""
    name = operator.partition(".")[0]
    return name in _PRODUCTS or name.startswith(_ATTENTIONS)


def attend(query_BATE: Tensor, key_BATE: Tensor, value_BATE: Tensor, backend: str) -> Tensor:
    """softmax(q k^T / sqrt(e)) v of (b, a, t, e) each, one dtype, to (b, a, t, e).

    backend: one of ATTENTION but those of PACKED. Raises RuntimeError where torch cannot run it on such tensors.
    """
    if backend == REFERENCE_BACKEND:
        return F.scaled_dot_product_attention(query_BATE, key_BATE, value_BATE)
    with sdpa_kernel(SDPA[backend]):
        return F.scaled_dot_product_attention(query_BATE, key_BATE, value_BATE)


def attend_packed(qkv_BT3AE: Tensor, backend: str) -> Tensor:
    """The same of queries, keys and values in one buffer, (b, t, 3, a, e), to (b, t, a, e); any backend of ATTENTION.

    Raises RuntimeError or ValueError where the backend cannot run on such tensors.
    """
    if backend == "triton":
        from dinox_model.kernels.attention import attention

        return attention(qkv_BT3AE)
    if backend == "flash-attn":
        return _flash_attn()(qkv_BT3AE)
    query_BATE, key_BATE, value_BATE = qkv_BT3AE.transpose(1, 3).unbind(2)
    return attend(query_BATE, key_BATE, value_BATE, backend).transpose(1, 2)


def has_flash_attn() -> bool:
    """Whether the package flash-attn is installed. It is never asked for: where it is, it is a candidate."""
    return importlib.util.find_spec("flash_attn") is not None


def _flash_attn() -> Any:
    try:
        return importlib.import_module("flash_attn").flash_attn_qkvpacked_func
    except ImportError as error:
        raise RuntimeError("kernels.attention: flash-attn is not installed; choose another backend, or auto") from error


def sdpa_choice(query_BATE: Tensor, key_BATE: Tensor, value_BATE: Tensor) -> str:
    """Which of SDPA's backends torch takes by itself for such tensors: a name of SDPA, or `other`."""
    choice = torch._fused_sdp_choice(query_BATE, key_BATE, value_BATE)
    return next((name for name, backend in SDPA.items() if backend.value == choice), "other")

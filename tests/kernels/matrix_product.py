"""A small kernel of known make, to test what reads compiled kernels: a product of two matrices, and its launches."""

from __future__ import annotations

from typing import Any

from dinox_model.kernels.language import kernel, tl
from dinox_model.kernels.tiles import Launch, Tiles


@kernel
def matrix_product(
    left, right, out, inner, stride_left, stride_right, stride_out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr
):
    rows, columns, depth = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, inner, K):
        a = tl.load(left + rows[:, None] * stride_left + (start + depth)[None, :])
        b = tl.load(right + (start + depth)[:, None] * stride_right + columns[None, :])
        total = tl.dot(a, b, total)
    tl.store(out + rows[:, None] * stride_out + columns[None, :], total)


def product_launch(dtype: str = "bf16", size: int = 64, warps: int = 4, aligned: bool = True, **changes: Any) -> Launch:
    """One launch of it with square tiles of `size`; `aligned` False loses the wide loads."""
    strides = ("stride_left", "stride_right", "stride_out")
    pointer = f"*{dtype}"
    given: dict[str, Any] = {
        "kernel": "matrix_product",
        "function": matrix_product,
        "signature": {
            "left": pointer,
            "right": pointer,
            "out": "*fp32",
            "inner": "i32",
            **dict.fromkeys(strides, "i32"),
        },
        "constants": {},
        "aligned": ("left", "right", "out", *strides) if aligned else (),
        "tiles": Tiles(sizes={"M": size, "N": size, "K": min(size, 64)}, num_warps=warps),
        "dtype": dtype,
        "uses_dot": True,
    }
    return Launch(**(given | changes))

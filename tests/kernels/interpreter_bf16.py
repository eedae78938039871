"""bfloat16 that is right in Triton's interpreter.

The interpreter (triton 3.6 to 3.9) keeps bfloat16 as bit patterns in uint16: it adds and multiplies the patterns, and
cuts fp32 off instead of rounding it. `bf16_as_in_hardware` puts right what kernels use: each operation then widens to
fp32, computes, and rounds to nearest even, as torch does, bit for bit (tests/kernels/test_interpreter_bf16.py).

Not mended: atomics on bfloat16, and reductions other than Triton's own max, min and sum. They are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def narrowed(values: np.ndarray) -> np.ndarray:
    """fp32 to the uint16 patterns of bfloat16: nearest, ties to even; every NaN becomes 0x7fc0."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def widened(patterns: np.ndarray) -> np.ndarray:
    """The uint16 patterns of bfloat16 to fp32, exact."""
    return (patterns.astype(np.uint32) << 16).view(np.float32)


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def _wide(handle: Any) -> Any:
    return TensorHandle(widened(handle.data), tl.float32) if _is_bf16(handle) else handle


def _rounded(handle: Any) -> Any:
    """An fp32 result as bfloat16; a comparison's result as it is."""
    if handle.data.dtype == bool:
        return TensorHandle(handle.data, tl.int1)
    return TensorHandle(narrowed(handle.data), tl.bfloat16)


def _in_fp32(original: Callable[..., Any]) -> Callable[..., Any]:
    """The builder's operation, done in fp32 and rounded where any operand is bfloat16."""

    def operation(self: Any, *operands: Any) -> Any:
        handles = [operand for operand in operands if isinstance(operand, TensorHandle)]
        if original.__name__ == "ternary_op" and operands[-1] is np.where:  # a choice: bits stay as they are
            return original(self, *operands)
        if not any(map(_is_bf16, handles)):
            return original(self, *operands)
        wide = [_wide(operand) if isinstance(operand, TensorHandle) else operand for operand in operands]
        return _rounded(original(self, *wide))

    return operation


def _cast(original: Callable[..., Any]) -> Callable[..., Any]:
    def cast(self: Any, source: Any, target: Any, *rounding: Any) -> Any:
        if target.scalar == tl.bfloat16 and not _is_bf16(source):
            return TensorHandle(narrowed(source.data.astype(np.float32)), tl.bfloat16)
        return original(self, _wide(source) if target.scalar != tl.bfloat16 else source, target, *rounding)

    return cast


def _dot(original: Callable[..., Any]) -> Callable[..., Any]:
    def dot(self: Any, left: Any, right: Any, added: Any, *options: Any) -> Any:
        return original(self, _wide(left), _wide(right), added, *options)

    return dot


def _refuse_bf16(original: Callable[..., Any]) -> Callable[..., Any]:
    def refuse(self: Any, *operands: Any) -> Any:
        if any(isinstance(operand, TensorHandle) and _is_bf16(operand) for operand in operands):
            raise TypeError(f"{original.__name__} on bfloat16 in the interpreter: convert to float32 first")
        return original(self, *operands)

    return refuse


def _reduce(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: Any, values: Any) -> Any:
        if any(_is_bf16(value.handle) for value in (values if isinstance(values, tuple) else (values,))):
            raise TypeError("a reduction of bfloat16 in the interpreter: convert to float32 first")
        return original(self, values)

    return apply


def _constant(_self: Any, value: float) -> Any:
    return TensorHandle(narrowed(np.array([value], np.float32)), tl.bfloat16)


@contextmanager
def bf16_as_in_hardware() -> Iterator[None]:
    """While it is open, kernels that the interpreter runs compute bfloat16 as torch does."""
    builder: Any = InterpreterBuilder
    replaced = {name: _in_fp32(getattr(builder, name)) for name in ("binary_op", "ternary_op", "unary_op")}
    replaced |= {name: _in_fp32(getattr(builder, name)) for name in ("create_fma", "create_erf", "create_rsqrt")}
    replaced |= {name: _cast(getattr(builder, name)) for name in ("cast_impl", "create_fp_to_fp")}
    replaced |= {"create_dot": _dot(builder.create_dot), "create_atomic_rmw": _refuse_bf16(builder.create_atomic_rmw)}
    replaced |= {"get_bf16": _constant}
    reduction: Any = interpreter.ReduceScanOpInterface
    with ExitStack() as stack:
        for name, operation in replaced.items():
            stack.enter_context(patch.object(builder, name, operation, create=True))
        stack.enter_context(patch.object(reduction, "apply", _reduce(reduction.apply)))
        yield

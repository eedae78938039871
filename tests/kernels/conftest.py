"""Kernels are tested in Triton's interpreter, on the CPU, with bfloat16 put right.

TRITON_INTERPRET is set in tests/conftest.py, before anything imports Triton; where a GPU is present it is not, and what
runs on it is tested by `benchmarks/gpu_suite.py`. A file that needs no interpreter says `NEEDS_INTERPRETER = False`.
"""

from collections.abc import Iterator

import pytest

from dinox_model.kernels.language import INTERPRETED, triton


@pytest.fixture(scope="session")
def bf16() -> Iterator[None]:
    from tests.kernels.interpreter_bf16 import bf16_as_in_hardware

    with bf16_as_in_hardware():
        yield


@pytest.fixture(autouse=True, scope="module")
def interpreter(request: pytest.FixtureRequest) -> None:
    """Skips a module where kernels cannot be interpreted."""
    if not getattr(request.module, "NEEDS_INTERPRETER", True):
        return
    if triton is None:
        pytest.skip("Triton is not installed (the extra [kernels])")
    if not INTERPRETED:
        pytest.skip("kernels are compiled in this process: set TRITON_INTERPRET=1 to test them in the interpreter")
    request.getfixturevalue("bf16")

"""transformers as benchmarks import it: the one place that does."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any


def transformers() -> Any:
    """The package. ModuleNotFoundError where it is not installed.

    It looks for a package `kernels`, and would take benchmarks/kernels.py, beside every benchmark that runs, for it.
    """
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type] # how "there is none" is written
    return import_module("transformers")

"""The monitor's own process, beside a training that must not feel it.

Invariant: what is wanted here can always be had without rights; where a system has no such thing it is left out.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

LOWEST_PRIORITY = 19
_FIRST_TO_GO = "1000"
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def step_aside(threads: int) -> None:
    """The lowest priority for cores and disk, `threads` threads, and the first to go when memory runs out.

    Called before numpy and torch are imported, which count the threads of their libraries then.
    """
    for name in _THREADS:
        os.environ[name] = str(threads)
    os.nice(max(LOWEST_PRIORITY - os.nice(0), 0))
    with suppress(ImportError, AttributeError, OSError, ValueError):
        import psutil

        psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)
    with suppress(OSError):
        # Where the kernel must end a process, it shall not be the training's.
        Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_GO)

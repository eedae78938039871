"""What the C library does with memory that was freed; a matter of speed on the CPU, and of nothing else.

A forward on the CPU takes and frees the same tens of MB for each layer. glibc gives large pieces back to the system as
soon as they are free, and the system hands them out again page by page, each zeroed: that was 15 to 30 % of the time of
vit_s' forward (docs/decisions.md). GPUs have torch's own allocator, which keeps what it has.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h's numbers
_NEVER = -1


def keep_freed_memory() -> bool:
    """Have this process keep freed memory for its next tensors, from now on. Called by programs, never by a library.

    The process then holds on to the most that it ever used. Returns whether the C library can do that (glibc can).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no such function, or no such library: macOS, musl, Windows
        return False
    # All from the heap, and the heap's end is never cut off.
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))

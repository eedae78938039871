"""What the supervisor says, on standard error."""

from __future__ import annotations

import sys
import time
from contextlib import suppress


def say(text: str) -> None:
    """A line with the time; a closed terminal is no reason to end."""
    with suppress(OSError, ValueError):
        print(f"supervise {time.strftime('%Y-%m-%d %H:%M:%S')}: {text}", file=sys.stderr, flush=True)

"""How fast a network ran, and how much memory that took."""

import resource
import sys
import time
from dataclasses import dataclass, field

import numpy as np
import torch

from dinox_io.progress import size_text


@dataclass
class Meter:
    """Latencies of batches, each from HU on the host to features on the host."""

    batch_size: int
    device: str
    weights_bytes: int = 0
    """On the device, beyond what torch counts."""
    without_first: bool = True
    """The first batch is not among the latencies: it pays for loading code and choosing algorithms."""
    latencies_s: list[float] = field(default_factory=list)
    """Of whole batches."""
    windows: int = 0
    batches: int = 0
    begin_s: float = field(default_factory=time.perf_counter)

    def add(self, windows: int, latency_s: float) -> None:
        """A batch was encoded."""
        if (self.batches or not self.without_first) and windows == self.batch_size:
            self.latencies_s.append(latency_s)
        self.batches += 1
        self.windows += windows

    def lines(self) -> list[str]:
        """For people."""
        wall_s = time.perf_counter() - self.begin_s
        lines = [f"{self.windows} windows in {wall_s:.1f} s: {self.windows / wall_s:.2f} a second, all told"]
        if self.latencies_s:
            median_ms, p95_ms = 1e3 * np.percentile(self.latencies_s, [50, 95])
            lines.append(
                f"a batch of {self.batch_size}: median {median_ms:.1f} ms, p95 {p95_ms:.1f} ms, from HU to features "
                f"({len(self.latencies_s)} batches{', the first one left out' if self.without_first else ''}): "
                f"{self.batch_size / median_ms * 1e3:.2f} windows a second"
            )
        else:
            lines.append(f"latency unknown: no second whole batch of {self.batch_size} windows")
        return [*lines, f"peak memory: {self._memory()}"]

    def _memory(self) -> str:
        unit = 1 if sys.platform == "darwin" else 1024
        text = f"{size_text(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)} of this process"
        if torch.device(self.device).type == "cuda":
            text += f", {size_text(torch.cuda.max_memory_allocated(self.device) + self.weights_bytes)} on {self.device}"
        return text

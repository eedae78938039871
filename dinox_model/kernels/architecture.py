"""Which GPU architecture a device has, as the table of tiles names it; facts of each architecture we compile for.

Names are those of the compilers: "gfx1151" (AMD), "sm_90" (NVIDIA), "interpreter" where Triton interprets on the CPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from dinox_model.kernels.language import INTERPRETED


@dataclass(frozen=True)
class Architecture:
    """What the compiler and the compile proof need to know of a GPU."""

    name: str
    vendor: str
    """amd | nvidia"""
    warp: int
    """Lanes that run together."""
    shared_bytes: int
    """Shared memory (LDS) that one program can have, bytes."""
    about: str
    in_thread_transpose: bool = False
    """AMD only: kernels are compiled with TRITON_HIP_USE_IN_THREAD_TRANSPOSE=1, which later Tritons do of themselves
    (triton-lang/triton#10185, #10390): a quarter of the loads from shared memory in attention."""

    @property
    def capability(self) -> int:
        """NVIDIA only: 90 for sm_90."""
        return int(self.name.removeprefix("sm_"))


ARCHITECTURES = {
    each.name: each
    for each in (
        # NVIDIA's limits: CUDA programming guide, table "technical specifications per compute capability".
        Architecture("gfx1151", "amd", 32, 65536, "Strix Halo", True),
        Architecture("gfx1100", "amd", 32, 65536, "Radeon RX 7900", True),
        Architecture("gfx1201", "amd", 32, 65536, "Radeon RX 9070", True),
        Architecture("gfx942", "amd", 64, 65536, "Instinct MI300", True),
        Architecture("gfx950", "amd", 64, 163840, "Instinct MI350"),
        Architecture("sm_80", "nvidia", 32, 166912, "A100"),
        Architecture("sm_89", "nvidia", 32, 101376, "RTX 4090, L40S"),
        Architecture("sm_90", "nvidia", 32, 232448, "H100, H200"),
        Architecture("sm_100", "nvidia", 32, 232448, "B200"),
    )
}
"""Those that every shipped kernel is compiled for, without owning them."""


def architecture(device: torch.device) -> str:
    """The name of `device`'s architecture: "gfx1151", "sm_90"; "interpreter" for the CPU where Triton interprets, else
    "cpu". Any other device type is its own name ("mps"). Cached: asking again costs nothing."""
    if device.type == "cpu":
        return "interpreter" if INTERPRETED else "cpu"
    if device.type != "cuda":
        return device.type
    return _of_gpu(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _of_gpu(index: int) -> str:
    if torch.version.hip is not None:  # "gfx942:sramecc+:xnack-"
        return str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"

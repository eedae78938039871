"""A made-up machine whose knee is known: it measures points as processes would, at once."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from knee_search.points import CRASHED, OUT_OF_MEMORY, Point
from knee_search.settings import of_record

GIB = 2**30


@dataclass
class MadeUpMachine:
    """Cores that compute and decoders share; times in seconds of a window."""

    cores: int = 4
    compute_s: float = 0.05
    piece_s: float = 0.1
    """Of each micro-batch, whatever its size."""
    decode_s: float = 0.002
    image_bytes: float = 0.05 * GIB
    memory_bytes: float = 8 * GIB
    storage_gbps: float = 1.0
    noise: float = 0.0
    crashes: set[int] = field(default_factory=set)
    """Numbers of threads with which a run crashes."""
    interrupt_after: int | None = None
    clock_s: float = 0.0
    asked: list[tuple[str, dict[str, Any], int]] = field(default_factory=list)

    def clock(self) -> float:
        return self.clock_s

    def __call__(self, kind: str, settings: Mapping[str, Any], repeat: int, seconds: float) -> Point:
        if self.interrupt_after is not None and len(self.asked) >= self.interrupt_after:
            raise KeyboardInterrupt
        self.asked.append((kind, dict(settings), repeat))
        self.clock_s += 5.0 + seconds
        status, result = getattr(self, f"_{kind}")(settings, random.Random(str((kind, settings, repeat))))
        return Point(
            kind=kind, settings=dict(settings), repeat=repeat, status=status, result=result, wall_s=5 + seconds
        )

    def _updates(self, update_s: float, chance: random.Random) -> list[float]:
        luck = chance.gauss(1.0, self.noise)
        return [update_s * luck * chance.gauss(1.0, self.noise) for _ in range(12)]

    def _probe(self, settings: Mapping[str, Any], chance: random.Random) -> tuple[str, dict[str, Any]]:
        return "ok", {
            "facts": {"host_memory_bytes": 16 * GIB},
            "machine": "made up",
            "unified": True,
            "is_gpu": False,
            "cores": self.cores,
            "memory_bytes": self.memory_bytes,
            "can_compile": False,
            "bandwidth": {"host": 20.0, "device": None},
            "peak_tflops": 1.0,
            "parameters": 10**6,
            "flops_per_image": 2e10,
            "activation_bytes_per_image": self.image_bytes,
            "run_slices": 10,
            "set": {"bytes": 10**9, "window_bytes": 3 * 2**19, "windows": 5000},
        }

    def _decode(self, settings: Mapping[str, Any], chance: random.Random) -> tuple[str, dict[str, Any]]:
        rate = min(settings["threads"], self.cores) / self.decode_s
        slice_bytes = 2**19
        return "ok", {
            "windows": 1000,
            "windows_per_s": rate,
            "cpu_s_per_window": self.decode_s,
            "slice_bytes": slice_bytes,
            "decoded_bytes": 1250 * slice_bytes,
            "read_bytes": 1250 * 2 * 10**5,
            "read_s": 0.1,
            "decode_s": 1.5,
            "unfilter_s": 0.4,
            "decoded_again": 0,
        }

    def _storage(self, settings: Mapping[str, Any], chance: random.Random) -> tuple[str, dict[str, Any]]:
        rates = [
            {"threads": count, "state": state, "resident": float(state == "warm"), "gb_per_s": self.storage_gbps}
            for state in ("cold", "warm")
            for count in settings["threads"]
        ]
        facts = {"file_system": "made up", "copies": 1, "files_bytes": 2 * 10**9, "same_disk": True}
        return "ok", {"rates": rates, "read_bytes": settings["read_bytes"], **facts}

    def _alone_s(self, settings: Mapping[str, Any]) -> float:
        """Of an update."""
        factor = 1.3 if settings["checkpointing"] == "block" else 1.0
        pieces = settings["batch_size"] // settings["micro_batch"]
        return factor * self.compute_s * settings["batch_size"] + self.piece_s * pieces

    def _needs(self, settings: Mapping[str, Any]) -> float:
        factor = 0.3 if settings["checkpointing"] == "block" else 1.0
        return GIB + factor * self.image_bytes * settings["micro_batch"]

    def _compute(self, settings: Mapping[str, Any], chance: random.Random) -> tuple[str, dict[str, Any]]:
        if self._needs(settings) > self.memory_bytes:
            return OUT_OF_MEMORY, {}
        return "ok", {
            "update_s": self._updates(self._alone_s(settings), chance),
            "batch_size": settings["batch_size"],
            "device_memory_bytes": None,
            "host_memory_bytes": self._needs(settings),
            "stage_s": {},
        }

    def _beside(self, settings: Mapping[str, Any], chance: random.Random) -> tuple[str, dict[str, Any]]:
        """The loader takes half of what its threads could have; each window it loads delays compute by its share."""
        alone = self._alone_s(settings)
        loads = 0.5 * min(settings["threads"], self.cores) / self.decode_s
        window_s = alone / settings["batch_size"]
        busy = min(loads * self.decode_s / self.cores, 0.9)
        return "ok", {
            "update_alone_s": self._updates(alone, chance),
            "update_beside_s": self._updates(window_s / (1 - busy) * settings["batch_size"], chance),
            "loader_alone": [2 * loads],
            "loader_beside": [loads],
            "batch_size": settings["batch_size"],
        }

    def _run(self, settings: Mapping[str, Any], chance: random.Random) -> tuple[str, dict[str, Any]]:
        one = of_record(settings)
        if one.threads in self.crashes:
            return CRASHED, {}
        window_s = self._alone_s(settings) / one.batch_size + self.decode_s / self.cores
        io_s = 1250 * 2e5 / 1000 / (self.storage_gbps * 1e9)
        decode_s = self.decode_s / min(one.threads, self.cores)
        rate = min(1 / window_s, 1 / io_s, 1 / decode_s)
        updates = self._updates(one.batch_size / rate, chance)
        waits = max(0.0, 1 - window_s * rate)
        return "ok", {
            "update_s": updates,
            "batch_size": one.batch_size,
            "waits": waits,
            "memory_bytes": self._needs(settings),
            "host_memory_bytes": self._needs(settings),
            "read_s": io_s * 1000,
            "decode_s": self.decode_s * 1000,
            "unfilter_s": 0.0,
            "resident": None,
        }

"""One point of the search: the settings that a run may change without changing what it learns, and two that are not so.

Invariant: whatever is not in `Settings` stays as the configuration has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

COMPILE = ("off", "blocks", "full")
CHECKPOINTING = ("none", "selective", "block")
PIN = ("off", "auto", "on")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`batch_size` and `precision` are mathematics: they are the configuration's unless the user freed them."""

    batch_size: int
    precision: str
    micro_batch: int
    """Images that are computed at a time; it divides batch_size."""
    threads: int
    """That decode."""
    prefetch_mib: int
    pool_mib: int
    pin: str
    compile: str
    checkpointing: str

    @property
    def accumulation(self) -> int:
        return self.batch_size // self.micro_batch

    @property
    def compute(self) -> tuple[int, str, int, str, str]:
        """What the speed of an update depends on when the data are there: batch_size, precision, micro_batch, compile,
        checkpointing."""
        return (self.batch_size, self.precision, self.micro_batch, self.compile, self.checkpointing)

    @property
    def size(self) -> tuple[int, ...]:
        """The order from small to large: less machinery, then fewer threads, then smaller micro-batches, then less that
        is read ahead and kept."""
        return (
            COMPILE.index(self.compile),
            PIN.index(self.pin),
            self.threads,
            self.micro_batch,
            CHECKPOINTING.index(self.checkpointing),
            self.prefetch_mib,
            self.pool_mib,
            self.batch_size,
        )

    def tree(self, *, free_batch: bool = False, free_precision: bool = False) -> dict[str, Any]:
        """The sections of a configuration that say so. The mathematics stand in it only where they were freed."""
        train: dict[str, Any] = {"accumulation": self.accumulation}
        if free_batch:
            train = {"batch_size": self.batch_size, **train}
        return {
            **({"precision": self.precision} if free_precision else {}),
            "train": train,
            "data": {
                "threads": self.threads,
                "prefetch_mib": self.prefetch_mib,
                "pool_mib": self.pool_mib,
                "pin": self.pin,
            },
            "execution": {"compile": self.compile, "activation_checkpointing": self.checkpointing},
        }

    def overrides(self) -> list[str]:
        """The same for a command line, mathematics too: `a.b=value`."""
        return [f"{name}={value}" for name, value in flattened(self.tree(free_batch=True, free_precision=True))]

    def record(self) -> dict[str, Any]:
        return asdict(self)

    def words(self) -> str:
        """Short, for bars and tables."""
        parts = [f"{self.accumulation} × {self.micro_batch} images"]
        parts.append(f"{self.threads} thread" + ("s" if self.threads > 1 else ""))
        parts.append(f"{self.prefetch_mib} MiB ahead")
        parts += [f"compile {self.compile}"] if self.compile != "off" else []
        parts += [f"checkpointing {self.checkpointing}"] if self.checkpointing != "none" else []
        parts += [f"pin {self.pin}"] if self.pin != "auto" else []
        return ", ".join(parts)


def of_record(record: Mapping[str, Any]) -> Settings:
    """What `record` gave."""
    return Settings(**record)


def flattened(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of nested mappings."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value

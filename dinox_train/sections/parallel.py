"""The section `parallel`: how the processes of a run work together: speed and memory, not the mathematics."""

from __future__ import annotations

from typing import Literal

from dinox_train.sections.section import Positive, Section


class ParallelSection(Section):
    mode: Literal["none", "ddp", "fsdp"] = "none"
    """Of several processes that torchrun starts: ddp, each holds all of the networks; fsdp, each holds a part of every
    weight, gradient and moment, and gathers what it needs when it needs it: for networks that do not fit otherwise.
    One process alone trains the same way whatever stands here. docs/cluster.md."""
    timeout_s: Positive = 1800
    """So long a process waits for the others before it ends with an error. Reading a large checkpoint, which the first
    rank verifies while the others wait, must fit."""

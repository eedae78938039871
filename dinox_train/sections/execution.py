"""The section `execution`: how the networks run. It changes memory and speed, not the mathematics."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dinox_train.sections.section import Section


class ExecutionSection(Section):
    compile: Literal["off", "blocks", "full"] = "off"
    """torch.compile, of student and teachers: blocks, each by itself, or full, a backbone as one graph, which takes
    longer to compile. The first updates are slow, and results differ from eager ones by rounding. Needs a compiler."""
    activation_checkpointing: Literal["none", "block", "selective"] = "none"
    """What a block of the student computes again in the backward: nothing; block, all of it (a third more work);
    selective, what is cheap, everything but matrix products and attention."""
    memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Of the device that the run is meant for, for `--plan` on another machine; null: what there is here."""

"""The section `rehearsal`: how long a run is tried before it begins."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dinox_train.sections.section import Section


class RehearsalSection(Section):
    updates: Annotated[int, Field(ge=12, lt=2**31)] = 40
    """Updates of each of the two runs that are compared."""
    minutes: Annotated[float, Field(gt=0)] = 60.0
    """What takes longer than this, all together, has failed."""
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """On a GPU, by how much losses and weights of a resumed run may differ from an undisturbed one's, as a share of
    them. On CPU, and with `deterministic`: not at all."""

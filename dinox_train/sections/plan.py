"""The section `plan`: for which machine and how much time `--plan` plans. A run does not read it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dinox_train.sections.section import Section


class PlanSection(Section):
    machine: Literal["strix_halo", "rtx_4090", "rx_7900_xtx", "mi300x", "h100", "h200"] | None = None
    """The machine that is meant, by its published figures (docs/plan.md); null: this one, as it was measured."""
    days: Annotated[float, Field(gt=0)] | None = None
    """How many days there are: the plan also says which preset, resolution and updates fit into them."""
    watts: Annotated[float, Field(gt=0)] | None = None
    """What the machine draws, W, for the energy; null: what is published of a named machine's board."""

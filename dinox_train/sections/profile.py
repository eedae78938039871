"""The section `profile`: updates that are looked at closely."""

from __future__ import annotations

from dinox_train.sections.section import Positive, Section


class ProfileSection(Section):
    at: tuple[Positive, ...] = ()
    """Updates of which a trace and a table by stage are written to RUN/profile/. What is learnt stays the same; the
    figures of time of these updates do not."""

"""The sections `watch` and `events`: what is read of the machine while a run goes on, and who is told what happens."""

from __future__ import annotations

import shlex
from typing import Annotated, Literal

from pydantic import Field, field_validator

from dinox_train.sections.section import Section

Occasion = Literal["alarm", "machine", "not saved", "rollback", "stopped", "ended", "daily"]


class WatchSection(Section):
    every_s: Annotated[float, Field(ge=0.1)] | None = 10.0
    """Seconds between two looks at the machine (GPU, memory, heat, disk), which RUN/system.jsonl keeps; null: never."""


class EventsSection(Section):
    command: str | tuple[str, ...] | None = None
    """A program that is given each digest on its standard input (mail, ntfy), as a list of words, or as one line that
    is split like a shell's; no shell runs it. DINOX_EVENT names the occasion. null: none."""
    on: tuple[Occasion, ...] = ("alarm", "machine", "not saved", "rollback", "stopped", "ended", "daily")
    """Occasions of which the command is told: an alarm of the training, one of the machine, a checkpoint that could not
    be written, a rollback, a stop with its reason, the end of a process, and once a day."""
    timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """The command is ended after so many seconds."""

    @field_validator("command")
    @classmethod
    def _some_words(cls, command: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if command is not None and not _split(command):
            raise ValueError("is empty: give a program and its arguments, or null")
        return command

    @property
    def arguments(self) -> tuple[str, ...] | None:
        """The program and its arguments; None where there is none."""
        return None if self.command is None else _split(self.command)


def _split(command: str | tuple[str, ...]) -> tuple[str, ...]:
    return tuple(shlex.split(command)) if isinstance(command, str) else command

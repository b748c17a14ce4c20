"""What the daemon is doing."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Literal

from whisperd.config import Loaded
from whisperd.daemon.admission import Admissions
from whisperd.serving.schema import Reload

Phase = Literal["starting", "ready", "reloading", "stopping"]


@dataclass(slots=True, kw_only=True)
class Totals:
    """Requests since the start, and the audio of those that were transcribed."""

    done: int = 0
    failed: int = 0
    audio_s: float = 0.0


@dataclass(slots=True, kw_only=True)
class State:
    """The state that the parts of the daemon share. Changed on the event loop only, except ``downloads``.

    ``failure`` is what ended the boot. ``decided`` is set when a request need not wait for the boot any more: it is
    over, or it will take long. ``problems`` are models that could not be had.
    """

    loaded: Loaded
    cache_dir: str
    phase: Phase = "starting"
    booted: bool = False
    failure: str | None = None
    decided: asyncio.Event = field(default_factory=asyncio.Event)
    note: str = "starting"
    downloads: str = ""
    started_s: float = field(default_factory=time.time)
    needs_restart: tuple[str, ...] = ()
    last_reload: Reload | None = None
    problems: tuple[str, ...] = ()
    admissions: Admissions = field(default_factory=Admissions)
    totals: Totals = field(default_factory=Totals)

    @property
    def doing(self) -> str:
        """The work of this moment, in words."""
        return self.downloads or self.note

    def enter(self, phase: Phase) -> None:
        """Enters a phase after the start."""
        self.phase = phase
        self.booted = self.booted or phase == "ready"
        self.decided.set()

    def refuse_waiting(self) -> None:
        """The boot will take long: requests get an error with the time to come back."""
        self.decided.set()

    def resume_waiting(self) -> None:
        """The long part is over: requests wait for the rest of the boot."""
        if self.phase == "starting":
            self.decided.clear()

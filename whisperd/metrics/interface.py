"""What is counted while windows run. These classes count nothing; ``whisperd.metrics`` has those that do."""

from __future__ import annotations

from typing import Literal

Stage = Literal["load", "decode"]


class ModelMeter:
    """Told of everything that happens to one model's windows; from any thread."""

    def waited(self, duration_s: float) -> None:
        """A window got its slot after so long."""

    def batch(self, n_windows: int, duration_s: float) -> None:
        """A batch was decoded."""

    def halved(self, stage: Stage) -> None:
        """The memory was not enough, and the next try has half the batch."""

    def fallback(self, reason: str) -> None:
        """A window failed a safeguard and is decoded again."""

    def engine_died(self) -> None:
        """The engine stopped by itself; nothing runs on it any more."""

    def engine_restarted(self) -> None:
        """An engine serves again after one had died."""


class HttpMeter:
    """Told of every HTTP request; on the event loop."""

    def answered(self, route: str, method: str, status: int, duration_s: float) -> None:
        """A request is over."""

    def rejected(self, code: str) -> None:
        """A request got an error of this code."""


class WyomingMeter:
    """Told of every utterance over the Wyoming protocol; on the event loop."""

    def spoken(self, result: str, latency_s: float) -> None:
        """It is over: ``ok`` or the code of an error, so long after the end of its audio."""

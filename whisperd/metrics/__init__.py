"""What is counted while requests are served. These classes count nothing; ``whisperd.metrics.prometheus`` does."""

from __future__ import annotations

from typing import Literal

Stage = Literal["load", "decode"]


class ModelMeter:
    """Events of one model's windows. Called from any thread."""

    def observe_wait(self, duration_s: float) -> None:
        """A window got its slot after ``duration_s``."""

    def observe_batch(self, n_windows: int, duration_s: float) -> None:
        """A batch of ``n_windows`` was decoded in ``duration_s``."""

    def count_halving(self, stage: Stage) -> None:
        """The memory was too small, and the next attempt has half the batch."""

    def count_fallback(self, reason: str) -> None:
        """A window failed a safeguard and is decoded again."""

    def count_engine_failure(self) -> None:
        """The engine stopped because of an error; nothing runs on it any more."""

    def count_engine_restart(self) -> None:
        """A new engine serves in place of one that failed."""


class HttpMeter:
    """Events of HTTP requests. Called on the event loop."""

    def observe_request(self, route: str, method: str, status: int, duration_s: float) -> None:
        """A request was answered ``duration_s`` after its head had arrived."""

    def count_rejection(self, code: str) -> None:
        """A request was answered with the error of this code."""


class WyomingMeter:
    """Events of utterances over the Wyoming protocol. Called on the event loop."""

    def observe_utterance(self, result: str, latency_s: float) -> None:
        """An utterance was answered: ``ok`` or the code of an error, ``latency_s`` after the end of its audio."""

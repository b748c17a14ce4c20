"""Deadlines of a request: the timeout in its form, and the timeout of its client.

OpenAI's SDKs send their timeout in a header, and repeat the request twice when it is over. So a request ends shortly
before, with an answer that the SDKs take for final and do not repeat.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

READ_HEADER = "x-stainless-read-timeout"  # of Python: seconds of silence, and silence begins behind the upload
WHOLE_HEADER = "x-stainless-timeout"  # of Node: seconds from its first byte to ours
MARGIN = 0.05
MARGIN_MAX_S = 1.0
SILENCE_MIN_S = 0.5  # between two keep-alives
HINT = "send stream=true, or give the client a longer timeout"


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadline:
    """When a request is given up, in seconds from now, and the message to its client."""

    left_s: float
    message: str


def deadline(timeout_s: float | None, headers: Mapping[str, str], *, elapsed_s: float, stream: bool) -> Deadline | None:
    """The first of all deadlines, None when there is none.

    Args:
        timeout_s: what the form says, from now.
        headers: of the request.
        elapsed_s: since they were there.
        stream: such a client gets keep-alives, so its own timeout does not run.
    """
    found = [] if stream else list(_hints(headers, elapsed_s))
    if timeout_s is not None:
        message = f"it was not done in the {timeout_s:g} s that the request gave it"
        found.append(Deadline(left_s=timeout_s, message=message))
    return min(found, key=lambda one: one.left_s, default=None)


def silence_s(headers: Mapping[str, str], most_s: float) -> float:
    """The longest time without a frame in a stream: half of the client's read timeout, at most ``most_s``."""
    patience_s = _seconds(headers.get(READ_HEADER, ""))
    return most_s if patience_s is None else min(most_s, max(SILENCE_MIN_S, patience_s / 2))


def _hints(headers: Mapping[str, str], elapsed_s: float) -> Iterator[Deadline]:
    for name, gone_s in ((READ_HEADER, 0.0), (WHOLE_HEADER, elapsed_s)):
        patience_s = _seconds(headers.get(name, ""))
        if patience_s is not None:
            left_s = patience_s - min(MARGIN * patience_s, MARGIN_MAX_S) - gone_s
            message = f"it was not done in the {patience_s:g} s after which this client gives up; {HINT}"
            yield Deadline(left_s=max(0.0, left_s), message=message)


def _seconds(text: str) -> float | None:
    """Seconds in a header; None for anything else, which is no mistake of the user's."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if value > 0 and math.isfinite(value) else None

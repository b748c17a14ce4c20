"""OpenAI's ``chunking_strategy`` in its three spellings: a word, a JSON object, one field for each member."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from whisperd.errors import RequestError

FIELD = "chunking_strategy"
MEMBER = re.compile(rf"{FIELD}\[(\w+)\]")
TYPE = "server_vad"
# OpenAI's name -> ours, the largest value, whether it is a whole number
MEMBERS: Mapping[str, tuple[str, float, bool]] = {
    "threshold": ("threshold", 1.0, False),
    "prefix_padding_ms": ("padding_ms", 15_000, True),
    "silence_duration_ms": ("silence_ms", 60_000, True),
}


def chunking_members(name: str, text: str) -> dict[str, Any]:
    """One field of the form as members of ``Chunking``; raises RequestError."""
    member = MEMBER.fullmatch(name)
    if member:
        return _member(name, member[1], text)
    if text.strip() == "auto":
        return {}
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        whole = None
    if not isinstance(whole, dict):
        raise RequestError(f"{FIELD} must be 'auto' or an object of type {TYPE}, got {text[:80]!r}", param=name)
    found: dict[str, Any] = {}
    for key, value in whole.items():
        found |= _member(f"{FIELD}[{key[:40]}]", key, value)
    return found


def _member(name: str, key: str, value: object) -> dict[str, Any]:
    if key == "type":
        if value != TYPE:
            raise RequestError(f"{name} must be {TYPE!r}, got {str(value)[:80]!r}", param=name)
        return {}
    if key not in MEMBERS:
        raise RequestError(f"unknown field {name!r}; there are: type, {', '.join(MEMBERS)}", param=name)
    ours, most, whole = MEMBERS[key]
    number = _number(value)
    if number is None or not 0 <= number <= most or (whole and number != int(number)):
        kind = "a whole number" if whole else "a number"
        raise RequestError(f"{name} must be {kind} from 0 to {most:g}, got {str(value)[:80]!r}", param=name)
    return {ours: int(number) if whole else number}


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None

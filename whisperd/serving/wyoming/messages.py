"""Events as they come over the wire, under limits: the reader of the package has none.

A JSON line, then as many bytes of further JSON and of payload as it says.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from whisperd.errors import RequestError

if TYPE_CHECKING:
    from wyoming.event import Event

HEADER_BYTES = 64 * 1024
DATA_BYTES = 1024 * 1024
PAYLOAD_BYTES = 1024 * 1024
SHOWN_CHARACTERS = 80  # of a client's own words in a message


class ProtocolError(RequestError):
    """What came is no Wyoming; nothing that follows can be understood."""

    code = "protocol_error"


async def read_event(reader: asyncio.StreamReader, event_s: float) -> Event | None:
    """The next event, None at the end of the connection.

    The first byte may take as long as it likes, the rest of the event no longer than ``event_s``.

    Args:
        reader: made with a limit of HEADER_BYTES.
        event_s: the longest that one event may take.

    Raises:
        ProtocolError: it is none, is over a limit, breaks off, or takes too long.
    """
    first = await reader.read(1)
    if not first:
        return None
    try:
        async with asyncio.timeout(event_s):
            return await _event(first, reader)
    except asyncio.IncompleteReadError as error:
        raise ProtocolError("the connection ended in the middle of an event") from error
    except TimeoutError as error:
        raise ProtocolError(f"an event took longer than {event_s:g} s") from error


async def _event(first: bytes, reader: asyncio.StreamReader) -> Event:
    from wyoming.event import Event

    try:
        line = first if first == b"\n" else first + await reader.readuntil(b"\n")
    except asyncio.LimitOverrunError as error:
        raise ProtocolError(f"the header of an event is longer than {HEADER_BYTES} bytes") from error
    header = _object(line, "the header")
    data = _member_object(header)
    kind = header.get("type")
    if not isinstance(kind, str):
        raise ProtocolError('the header of an event has no type; expected a line such as {"type": "describe"}')
    more = await reader.readexactly(_length(header, "data_length", DATA_BYTES))
    if more:
        data |= _object(more, "the data")
    payload = await reader.readexactly(_length(header, "payload_length", PAYLOAD_BYTES))
    return Event(type=kind[:SHOWN_CHARACTERS], data=data, payload=payload or None)


def _object(text: bytes, what: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"{what} of an event is not JSON") from error
    if not isinstance(found, dict):
        raise ProtocolError(f"{what} of an event is not a JSON object")
    return found


def _member_object(header: dict[str, Any]) -> dict[str, Any]:
    found = header.get("data") or {}
    if not isinstance(found, dict):
        raise ProtocolError("the data of an event is not a JSON object")
    return found


def _length(header: dict[str, Any], name: str, most: int) -> int:
    found = header.get(name) or 0
    if not isinstance(found, int) or not 0 <= found <= most:
        raise ProtocolError(f"{name} must be a whole number from 0 to {most}, got {str(found)[:SHOWN_CHARACTERS]}")
    return found

"""Format of the log: plain lines on a terminal, priorities and fields in the journal."""

from __future__ import annotations

import logging
import os
import socket
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

Hide = Callable[[str], str]
LogFormat = Literal["auto", "plain", "journal"]

# sd-daemon(3): the priority of a line on stderr
PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}
JOURNAL = Path("/run/systemd/journal/socket")
MESSAGE_CHARS = 32_768  # a datagram has its limit
QUIET = ("httpx", "httpx2", "uvicorn", "asyncio", "huggingface_hub")


class JournalFormatter(logging.Formatter):
    """Formats records for the stderr of a service: a priority, and no time, unit or process, which the journal adds."""

    def format(self, record: logging.LogRecord) -> str:
        """Formats a record; each line of a message gets the priority."""
        prefix = f"<{_priority(record)}>"
        return "\n".join(prefix + line for line in super().format(record).splitlines())


class JournalHandler(logging.Handler):
    """Sends records to the journal as entries with fields; a message of several lines is one entry.

    Args:
        fallback: handles the records that the journal does not accept.
        address: the journal's socket.
    """

    def __init__(self, fallback: logging.Handler, address: Path = JOURNAL) -> None:
        super().__init__()
        self._fallback = fallback
        self._address = os.fspath(address)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def emit(self, record: logging.LogRecord) -> None:
        """Sends one datagram."""
        try:
            self._socket.sendto(entry(record, self.format(record)), self._address)
        except OSError:
            self._fallback.handle(record)

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()
        super().close()


class SecretFilter(logging.Filter):
    """Strikes secrets out of records: the message, the traceback and the journal's fields.

    Args:
        hide: returns a text without secrets.
    """

    def __init__(self, hide: Hide) -> None:
        super().__init__()
        self._hide = hide

    def filter(self, record: logging.LogRecord) -> bool:
        """Changes the record; keeps all."""
        record.msg, record.args = self._hide(record.getMessage()), ()
        if record.exc_info:
            record.exc_text = self._hide(logging.Formatter().formatException(record.exc_info))
        fields = getattr(record, "fields", {})
        record.fields = {name: self._hide(str(value)) for name, value in fields.items()}
        return True


def entry(record: logging.LogRecord, message: str) -> bytes:
    """Encodes a record in the journal's native protocol, with the extra fields in ``record.fields``."""
    fields = {
        "MESSAGE": message[:MESSAGE_CHARS],
        "PRIORITY": _priority(record),
        "SYSLOG_IDENTIFIER": "whisperd",
        "WHISPERD_LOGGER": record.name,
        **getattr(record, "fields", {}),
    }
    return b"".join(_field(name, str(value)) for name, value in fields.items())


def _field(name: str, value: str) -> bytes:
    data = value.encode("utf-8", "replace")
    if b"\n" in data:
        return name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
    return name.encode() + b"=" + data + b"\n"


def _priority(record: logging.LogRecord) -> int:
    return PRIORITIES.get(record.levelno, 6)


def configure(level: str, log_format: LogFormat, environ: Mapping[str, str], *, hide: Hide = str) -> None:
    """Sends all logs to the journal with their fields, or to stderr as lines; ``hide`` strikes secrets out."""
    to_journal = log_format != "plain" and leads_to_journal(environ)
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if to_journal or log_format == "journal":
        handler.setFormatter(JournalFormatter("%(name)s: %(message)s"))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers = [JournalHandler(handler) if to_journal else handler]
    root.handlers[0].addFilter(SecretFilter(hide))
    set_level(level)


def set_level(level: str) -> None:
    """Sets the level; libraries log warnings and errors only."""
    logging.getLogger().setLevel(level.upper())
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)


def leads_to_journal(environ: Mapping[str, str]) -> bool:
    """True if stderr is the journal's stream; by the test that systemd.exec(5) describes."""
    try:
        found = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"

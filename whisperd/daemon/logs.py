"""What the log looks like: lines for people on a terminal, priorities for the journal."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from typing import Literal

LogFormat = Literal["auto", "plain", "journal"]

# sd-daemon(3): the priority of a line on stderr
PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}
QUIET = ("httpx", "httpx2", "uvicorn", "asyncio", "huggingface_hub")


class JournalFormatter(logging.Formatter):
    """The journal knows time, unit and process by itself; each line carries its priority."""

    def format(self, record: logging.LogRecord) -> str:
        """Every line of a message with several gets the prefix, or the rest would lose its priority."""
        prefix = f"<{PRIORITIES.get(record.levelno, 6)}>"
        return "\n".join(prefix + line for line in super().format(record).splitlines())


def configure(level: str, log_format: LogFormat, environ: Mapping[str, str]) -> None:
    """Sends all logs to stderr in one format."""
    handler = logging.StreamHandler(sys.stderr)
    if log_format == "journal" or (log_format == "auto" and _leads_to_journal(environ)):
        handler.setFormatter(JournalFormatter("%(name)s: %(message)s"))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers = [handler]
    set_level(level)


def set_level(level: str) -> None:
    """The least serious messages that are shown; libraries only speak up when something is wrong."""
    logging.getLogger().setLevel(level.upper())
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)


def _leads_to_journal(environ: Mapping[str, str]) -> bool:
    """Whether stderr is the journal's stream, as systemd.exec(5) says to find out."""
    try:
        found = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"

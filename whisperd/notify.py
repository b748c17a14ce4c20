"""Messages to systemd. Home of sdnotify.

What sdnotify leaves to its caller is done here: text in UTF-8 (it encodes Latin-1 and loses what does not fit), one
line without control characters (a newline would start another variable), short (systemd drops datagrams above 4096
bytes whole), and never in the datagram that carries READY=1 or RELOADING=1.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdnotify import SystemdNotifier

log = logging.getLogger(__name__)

STATUS_CHARS = 256
USEC_PER_S = 1_000_000
SEND_TIMEOUT_S = 1.0  # a service manager that does not read must not hold the daemon up


class Notifier:
    """Sends messages to the service manager; without its socket every method does nothing.

    Removes NOTIFY_SOCKET from the environment of this process, so that no child process notifies in its place.

    Attributes:
        watchdog_s: interval at which to call ``watchdog``, half of the limit of systemd; None without a limit.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._failure_logged = False
        self._channel = self._connect(environ.get("NOTIFY_SOCKET", ""))
        self.watchdog_s = _watchdog_s(environ) if self.enabled else None

    @property
    def enabled(self) -> bool:
        """True if there is a service manager."""
        return self._channel is not None

    def ready(self, status: str | None = None) -> None:
        """Reports that the daemon serves, at the start and at the end of every reload, successful or not."""
        self._send("READY=1")
        if status is not None:
            self.status(status)

    def reloading(self) -> None:
        """Reports the begin of a reload; ``ready`` must follow in any case, or ``systemctl reload`` hangs."""
        now_usec = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send(f"RELOADING=1\nMONOTONIC_USEC={now_usec}")

    def stopping(self) -> None:
        """Reports that the daemon stops."""
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        """Sets the line that ``systemctl status`` shows."""
        self._send(f"STATUS={_one_line(text)}")

    def errno(self, code: int) -> None:
        """Reports why the daemon exits, as a number of ``errno``."""
        self._send(f"ERRNO={code}")

    def extend_timeout(self, seconds: float) -> None:
        """Extends the time to start, reload or stop to so many seconds from now."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * USEC_PER_S)}")

    def watchdog(self) -> None:
        """Resets the watchdog."""
        self._send("WATCHDOG=1")

    def close(self) -> None:
        """Closes the socket; later calls do nothing."""
        if self._channel is not None:
            self._channel.socket.close()
            self._channel = None

    def _connect(self, address: str) -> SystemdNotifier | None:
        if not address:
            return None
        import sdnotify

        os.environ["NOTIFY_SOCKET"] = address  # sdnotify reads it there and nowhere else
        try:
            # without debug it swallows every error, KeyboardInterrupt too
            channel = sdnotify.SystemdNotifier(debug=True)
            channel.socket.settimeout(SEND_TIMEOUT_S)
        except OSError as error:
            self._log_failure(error)
            return None
        else:
            return channel
        finally:
            del os.environ["NOTIFY_SOCKET"]

    def _send(self, message: str) -> None:
        if self._channel is None:
            return
        try:
            self._channel.notify(message.encode("utf-8").decode("latin-1"))
        except OSError as error:
            self._log_failure(error)

    def _log_failure(self, error: OSError) -> None:
        if not self._failure_logged:
            self._failure_logged = True
            log.warning("systemd cannot be notified: %s", error)


def _one_line(text: str) -> str:
    printable = "".join(char if char.isprintable() else " " for char in text)
    return " ".join(printable.split())[:STATUS_CHARS]


def _watchdog_s(environ: Mapping[str, str]) -> float | None:
    """Half of WATCHDOG_USEC, if it is meant for this process."""
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    limit_usec = environ.get("WATCHDOG_USEC", "")
    return int(limit_usec) / USEC_PER_S / 2 if limit_usec.isdecimal() and int(limit_usec) > 0 else None

"""whisperd in a container, as its administrator and its users use it."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.speech import Clip
from tests.systemd.machine import CONFIG, SOCKET, UNIT, Machine
from whisperd.client import Client
from whisperd.errors import Error

CACHE = "/var/cache/whisperd"
MODEL = 'models = ["path:/srv/tiny"]'
DROP_INS = f"etc/systemd/system/{UNIT}.d"
HUB_MODEL = "/srv/tiny"
ENDPOINT = "srv/hub/endpoint"
CLIENTS = 4
PATIENCE_S = 120.0


@dataclass(slots=True, kw_only=True)
class Load:
    """The outcomes of clients that sent one request after the other."""

    outcomes: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0

    @property
    def failures(self) -> dict[str, int]:
        return {what: count for what, count in self.outcomes.items() if what != "ok"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """The daemon's unit in ``machine``."""

    machine: Machine

    @property
    def client(self) -> Client:
        """A client on the outside: a path leads into the container, and root is root."""
        return Client(Path(f"/proc/{self.machine.pid}/root{SOCKET}"), PATIENCE_S)

    @property
    def status_text(self) -> str:
        return self.machine.show("StatusText")

    @property
    def pid(self) -> int:
        return int(self.machine.show("MainPID"))

    def processes(self) -> list[int]:
        """All processes of the daemon's user, as numbered inside; the daemon itself is ``pid``."""
        code = (
            "import pathlib, pwd\nuid = pwd.getpwnam('whisperd').pw_uid\n"
            "for p in pathlib.Path('/proc').glob('[0-9]*'):\n"
            " try:\n  if p.stat().st_uid == uid: print(p.name)\n except OSError: pass"
        )
        return sorted(map(int, self.machine.run("python3", "-c", code).stdout.split()))

    def reset(self) -> None:
        """The service as shipped and running, whatever an earlier test has done."""
        self.configure()
        for path in (self.machine.root / DROP_INS).glob("*.conf"):
            path.unlink()
        self.machine.run("systemctl", "stop", UNIT)
        self.machine.run("systemctl", "daemon-reload")
        self.machine.run("systemctl", "reset-failed")
        self.machine.run("systemctl", "start", "whisperd.socket", UNIT)

    def configure(self, text: str = MODEL) -> None:
        """Writes the configuration; options of the top level and tables."""
        self.machine.write(CONFIG, f'cache_dir = "{CACHE}"\n{text}\n')

    def drop_in(self, *lines: str) -> None:
        """Settings of an administrator for the unit."""
        self.machine.write(f"{DROP_INS}/test.conf", "\n".join(["[Service]", *lines, ""]))
        self.machine.run("systemctl", "daemon-reload")

    def systemctl(self, *words: str, check: bool = True) -> int:
        return self.machine.run("systemctl", *words, UNIT, check=check).returncode

    def transcribe(self, clip: Clip, **fields: str) -> dict[str, Any]:
        with clip.path.open("rb") as file:
            return self.client.transcribe(
                file, filename=clip.path.name, fields=fields, on_event=lambda _kind, _data: None
            )

    def values(self) -> dict[str, str]:
        """The options in effect."""
        found: dict[str, str] = self.client.status()["config"]["values"]
        return found

    @contextmanager
    def load(self, clip: Clip) -> Iterator[Load]:
        """Clients that send a request, wait for the answer, and send the next, until the end of the block."""
        load, stop = Load(), threading.Event()
        threads = [threading.Thread(target=self._ask, args=(clip, load, stop)) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            self.machine.until(lambda: load.outcomes.total() >= CLIENTS, "the first requests are answered")
            yield load
            before = load.outcomes.total()
            self.machine.until(lambda: load.outcomes.total() >= before + 2 * CLIENTS, "requests are answered again")
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def _ask(self, clip: Clip, load: Load, stop: threading.Event) -> None:
        while not stop.is_set():
            started_s = time.monotonic()
            try:
                text = self.transcribe(clip)["text"]
                outcome = "ok" if "monkeys" in text else f"wrong text: {text}"
            except Error as error:
                outcome = f"{type(error).__name__}: {error}"
            load.outcomes[outcome] += 1
            load.slowest_s = max(load.slowest_s, time.monotonic() - started_s)

    def hub_start(self, **wishes: Any) -> str:
        """Starts a Hub inside, with org/tiny; returns the configuration that uses it."""
        self.hub_stop()
        self.machine.run(
            "systemd-run", "--quiet", "--collect", "--unit=hub", "-p", "WorkingDirectory=/srv/hub",
            "/usr/bin/python3", "-m", "tests.systemd.hub", HUB_MODEL, f"/{ENDPOINT}", json.dumps(wishes),
        )  # fmt: skip
        endpoint = self.machine.root / ENDPOINT
        self.machine.until(lambda: endpoint.exists() and endpoint.read_text(), "the Hub listens")
        return f'models = ["org/tiny"]\n[reconcile]\nendpoint = "{endpoint.read_text()}"'

    def hub_stop(self) -> None:
        """Stops the Hub, if there is one."""
        self.machine.run("systemctl", "stop", "hub.service", check=False)
        (self.machine.root / ENDPOINT).unlink(missing_ok=True)

    def holders(self, secret: str) -> set[int]:
        """Processes inside that have a secret in their environment or command line."""
        find = f"import pathlib\nfor p in pathlib.Path('/proc').glob('[0-9]*'):\n try:\n  if b'{secret}' in " + (
            "(p/'environ').read_bytes() + (p/'cmdline').read_bytes() and int(p.name) != os.getpid(): print(p.name)\n"
            " except OSError: pass"
        )
        found = self.machine.run("python3", "-c", f"import os\n{find}").stdout
        return set(map(int, found.split()))

    def empty_cache(self) -> None:
        """As before the first boot."""
        self.machine.run("sh", "-c", f"rm -rf {CACHE}/* {CACHE}/.[a-z]*")

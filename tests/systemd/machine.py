"""A minimal Debian in a container, with a systemd of its own as PID 1 and no network."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

RELEASES = {"bookworm": 12, "trixie": 13}  # with systemd 252 and 257
# what a minimal Debian has that boots and lets users have services; the rest is what the package declares
BASE = ("systemd", "systemd-sysv", "dbus", "libpam-systemd")
ROOTS = Path.home() / ".cache/whisperd-roots"  # beside those in which packaging/build-deb builds
MEMORY_V1 = Path("/sys/fs/cgroup/memory")
TOOLS = ("mmdebstrap", "systemd-nspawn", "nsenter", "dpkg-deb", "dh", "ar")
PATIENCE_S = 120.0
BOOT_S = 120.0
COMMAND_S = 600.0
POWER_OFF = signal.SIGRTMIN + 4  # systemd(1): the signal for a clean shutdown
UNIT = "whisperd.service"
CONFIG = "/etc/whisperd/whisperd.toml"
SOCKET = "/run/whisperd.sock"

Done = subprocess.CompletedProcess[str]


def missing() -> str | None:
    """The reason why no container can be booted here; None when one can."""
    if os.geteuid() != 0:
        return "needs root to boot a container"
    absent = [name for name in TOOLS if shutil.which(name) is None]
    if absent:
        return f"needs {', '.join(absent)} (see .ci/run)"
    mounts = Path("/proc/mounts").read_text(encoding="utf-8")
    if " cgroup2 " not in mounts and "name=systemd" not in mounts:
        return "needs a cgroup hierarchy that systemd can use"
    return None


def kept_root(suite: str, packages: tuple[str, ...]) -> Path:
    """A minimal Debian with these packages, made when it is missing; nothing is changed in it."""
    roots = Path(os.environ.get("WHISPERD_ROOTS", ROOTS))
    root = roots / "-".join(("test", suite, *packages))
    if not root.exists():
        roots.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=roots) as directory:
            made = Path(directory, "root")
            command = [
                "mmdebstrap",
                "--quiet",
                "--variant=minbase",
                f"--include={','.join(packages)}",
                suite,
                str(made),
            ]
            subprocess.run(command, check=True, timeout=900, env=os.environ | {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
            made.rename(root)
    return root


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A running container. ``root`` is its file system as seen from outside, ``pid`` its PID 1."""

    root: Path
    pid: int

    def run(self, *command: str, check: bool = True, timeout_s: float = COMMAND_S, stdin: bytes | None = None) -> Done:
        """Runs a command as root in it and waits for its end."""
        done = subprocess.run(
            [*self._enter(), *command], input=stdin, capture_output=True, timeout=timeout_s, check=False
        )
        told = subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        )
        assert not check or told.returncode == 0, (
            f"{shlex.join(command)}: {told.returncode}\n{told.stdout}{told.stderr}"
        )
        return told

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Starts a command as root in it; the caller waits for it."""
        return subprocess.Popen([*self._enter(), *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """A file of root's; not below /run or /tmp, which are file systems inside the container."""
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        target.chmod(mode)

    def show(self, name: str, unit: str = UNIT) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "--value", "-p", name, unit).stdout.strip()

    def journal(self, since: str = "") -> list[dict[str, str]]:
        """Entries of the daemon's unit, all or since a cursor."""
        after = [f"--after-cursor={since}"] if since else []
        lines = self.run("journalctl", "--no-pager", "-o", "json", "--all", "-u", UNIT, *after).stdout.splitlines()
        return [json.loads(line) for line in lines]

    def cursor(self) -> str:
        """Where the journal of the unit ends now."""
        told = self.run("journalctl", "-u", UNIT, "-n", "1", "--show-cursor", "-o", "cat").stdout
        return told.rpartition("-- cursor: ")[2].strip()

    def journal_until(self, since: str, text: str, priority: str | None = None) -> None:
        """Waits for a message; the journal stores messages a moment after they were sent."""

        def found() -> bool:
            entries = (entry for entry in self.journal(since) if priority in {None, entry["PRIORITY"]})
            return any(text in entry["MESSAGE"] for entry in entries)

        self.until(found, f"{text!r} in the journal")

    def until(self, condition: Callable[[], object], what: str, patience_s: float = PATIENCE_S) -> None:
        """Polls a condition."""
        deadline_s = time.monotonic() + patience_s
        while not condition():
            if time.monotonic() > deadline_s:
                status = self.run("systemctl", "status", "--no-pager", "-n", "30", UNIT, check=False).stdout
                raise AssertionError(f"not in {patience_s:g} s: {what}\n{status}")
            time.sleep(0.1)

    @contextmanager
    def memory_limit(self, limit_bytes: int) -> Iterator[Path]:
        """Whatever PID 1 starts in the block, and later its children, has so much memory, as with MemoryMax=.

        Where the kernel has the memory controller in its first version, a container cannot use it; so the group is made
        outside. Yields its directory.
        """
        group = MEMORY_V1 / f"whisperd-{self.pid}"
        group.mkdir()
        home = _memory_group(self.pid)
        try:
            (group / "memory.limit_in_bytes").write_text(str(limit_bytes), encoding="ascii")
            (group / "cgroup.procs").write_text(str(self.pid), encoding="ascii")
            yield group
        finally:
            (home / "cgroup.procs").write_text(str(self.pid), encoding="ascii")
            for pid in (group / "cgroup.procs").read_text(encoding="ascii").split():
                (home / "cgroup.procs").write_text(pid, encoding="ascii")
            group.rmdir()

    def _enter(self) -> tuple[str, ...]:
        namespaces = ("-m", "-u", "-i", "-n", "-p", "-C")
        environment = ("env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8")
        return ("nsenter", "-t", str(self.pid), *namespaces, "--", *environment)


@contextmanager
def booted(root: Path, *options: str) -> Iterator[Machine]:
    """Boots ``root`` and powers it off at the end."""
    command = ["systemd-nspawn", "-D", str(root), "-b", "--register=no", "--keep-unit", "--private-network", *options]
    with (root.parent / f"{root.name}.log").open("wb") as log:
        nspawn = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        machine = Machine(root=root, pid=_pid_1(nspawn))
        _await_boot(machine)
        yield machine
        os.kill(machine.pid, POWER_OFF)
        nspawn.wait(PATIENCE_S)
    finally:
        nspawn.kill()
        nspawn.wait()


def _memory_group(pid: int) -> Path:
    lines = Path(f"/proc/{pid}/cgroup").read_text(encoding="ascii").splitlines()
    (path,) = [line.split(":")[2] for line in lines if line.split(":")[1] == "memory"]
    return MEMORY_V1 / path.lstrip("/")


def _pid_1(nspawn: subprocess.Popen[bytes]) -> int:
    children = Path(f"/proc/{nspawn.pid}/task/{nspawn.pid}/children")
    deadline_s = time.monotonic() + BOOT_S
    while time.monotonic() < deadline_s and nspawn.poll() is None:
        for pid in children.read_text(encoding="utf-8").split():
            if Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip() == "systemd":
                return int(pid)
        time.sleep(0.05)
    raise AssertionError(f"systemd-nspawn ended with {nspawn.poll()} and without a systemd")


def _await_boot(machine: Machine) -> None:
    deadline_s = time.monotonic() + BOOT_S
    state = ""
    while time.monotonic() < deadline_s:
        state = machine.run("systemctl", "is-system-running", check=False).stdout.strip()
        if state in {"running", "degraded"}:
            return
        time.sleep(0.1)
    raise AssertionError(f"the container did not boot, it is {state!r}")

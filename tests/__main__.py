"""``python -m tests``: every check of this repository; all of them run, whatever fails.

Three lanes run side by side, since most tests wait for processes: one computes, one starts daemons and makes
environments, one boots containers. The first lane prints as it goes, the others print each check when it is done.
``python -m tests NAME...`` runs the named checks alone, one after the other.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPTS = Path(sysconfig.get_path("scripts"))
PYTEST = [sys.executable, "-m", "pytest"]
APART = ["-p", "no:cacheprovider"]  # the cache of failures belongs to the first lane


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A command that must exit with 0."""

    name: str
    command: list[str | Path]


COMPUTES = (
    Check(name="style", command=[SCRIPTS / "ruff", "check", "."]),
    Check(name="layout", command=[SCRIPTS / "ruff", "format", "--check", "."]),
    Check(name="types", command=[SCRIPTS / "mypy"]),
    Check(name="imports", command=[SCRIPTS / "lint-imports"]),
    Check(
        name="unit",
        command=[
            *PYTEST,
            "--ignore=tests/integration",
            "--ignore=tests/systemd",
            "--cov",
            "--cov-report=",
            "--cov-fail-under=0",
        ],
    ),
    Check(name="coverage", command=[sys.executable, "-m", "tests.floors"]),
)
STARTS_PROCESSES = (
    Check(name="integration", command=[*PYTEST, *APART, "tests/integration"]),
    Check(name="oldest", command=[sys.executable, "-m", "tests.oldest_hub"]),
    Check(name="newest", command=[sys.executable, "-m", "tests.newest"]),
)
BOOTS_CONTAINERS = (Check(name="systemd", command=[*PYTEST, *APART, "tests/systemd"]),)
LANES = (COMPUTES, STARTS_PROCESSES, BOOTS_CONTAINERS)
CHECKS = {check.name: check for lane in LANES for check in lane}


class Board:
    """Where outcomes are written, one at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.failed: list[str] = []

    def put(self, check: Check, code: int, wall_s: float, output: str = "") -> None:
        """Writes the output and the outcome of a check."""
        with self._lock:
            sys.stdout.write(f"{output}--- {check.name}: {'FAILED' if code else 'ok'} in {wall_s:.0f} s\n")
            sys.stdout.flush()
            if code:
                self.failed.append(check.name)


def run(checks: Sequence[Check], board: Board, *, captured: bool) -> None:
    """Runs one check after the other."""
    for check in checks:
        started_s = time.monotonic()
        done = subprocess.run(
            check.command,
            cwd=ROOT,
            stdout=subprocess.PIPE if captured else None,
            stderr=subprocess.STDOUT if captured else None,
            text=True,
            check=False,
        )
        board.put(check, done.returncode, time.monotonic() - started_s, done.stdout or "")


def main(names: Sequence[str]) -> int:
    """0 when all checks passed, 1 when one failed, 2 when one is unknown."""
    unknown = [name for name in names if name not in CHECKS]
    if unknown:
        sys.stderr.write(f"no check {', '.join(unknown)}; there are: {', '.join(CHECKS)}\n")
        return 2
    board = Board()
    lanes = [[CHECKS[name] for name in names]] if names else LANES
    with ThreadPoolExecutor(len(lanes)) as pool:
        beside = [pool.submit(run, lane, board, captured=True) for lane in lanes[1:]]
        run(lanes[0], board, captured=False)
        for lane in beside:
            lane.result()
    if board.failed:
        sys.stdout.write(f"failed: {', '.join(board.failed)}\n")
    return 1 if board.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

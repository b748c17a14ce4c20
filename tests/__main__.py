"""``python -m tests``: every check of this repository; all of them run, whatever fails.

Two lanes go on side by side, since most tests wait for processes: what boots containers and makes environments in one,
everything else in the other. What a check of the second lane prints comes when it is done.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPTS = Path(sysconfig.get_path("scripts"))
PYTEST = [sys.executable, "-m", "pytest"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A command that must exit with 0."""

    name: str
    command: list[str | Path]


FIRST_LANE = (
    Check(name="style", command=[SCRIPTS / "ruff", "check", "."]),
    Check(name="layout", command=[SCRIPTS / "ruff", "format", "--check", "."]),
    Check(name="types", command=[SCRIPTS / "mypy"]),
    Check(name="imports", command=[SCRIPTS / "lint-imports"]),
    Check(name="tests", command=[*PYTEST, "--ignore=tests/systemd"]),
)
SECOND_LANE = (
    Check(name="systemd", command=[*PYTEST, "-p", "no:cacheprovider", "tests/systemd"]),
    Check(name="oldest huggingface_hub", command=[sys.executable, "-m", "tests.oldest_hub"]),
)


class Board:
    """Where outcomes are written, one at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.failed: list[str] = []

    def put(self, check: Check, code: int, wall_s: float, output: str = "") -> None:
        """Writes what a check printed, and how it ended."""
        with self._lock:
            sys.stdout.write(f"{output}--- {check.name}: {'FAILED' if code else 'ok'} in {wall_s:.0f} s\n")
            sys.stdout.flush()
            if code:
                self.failed.append(check.name)


def run(checks: tuple[Check, ...], board: Board, *, captured: bool) -> None:
    """One check after the other."""
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


def main() -> int:
    """0 when all checks passed, else 1."""
    board = Board()
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(run, SECOND_LANE, board, captured=True)
        run(FIRST_LANE, board, captured=False)
        second.result()
    if board.failed:
        sys.stdout.write(f"failed: {', '.join(board.failed)}\n")
    return 1 if board.failed else 0


if __name__ == "__main__":
    sys.exit(main())

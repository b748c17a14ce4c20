"""``python -m tests``: every check of this repository, one after the other; all of them run, whatever fails."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPTS = Path(sysconfig.get_path("scripts"))
CHECKS: tuple[tuple[str, list[str | Path]], ...] = (
    ("style", [SCRIPTS / "ruff", "check", "."]),
    ("layout", [SCRIPTS / "ruff", "format", "--check", "."]),
    ("types", [SCRIPTS / "mypy"]),
    ("imports", [SCRIPTS / "lint-imports"]),
    ("tests", [sys.executable, "-m", "pytest"]),
    ("tests under the oldest huggingface_hub", [sys.executable, "-m", "tests.oldest_hub"]),
)


def main() -> int:
    """0 when all checks passed, else 1."""
    failed = []
    for name, command in CHECKS:
        started_s = time.monotonic()
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        sys.stdout.write(f"--- {name}: {'ok' if code == 0 else 'FAILED'} in {time.monotonic() - started_s:.0f} s\n")
        sys.stdout.flush()
        if code:
            failed.append(name)
    if failed:
        sys.stdout.write(f"failed: {', '.join(failed)}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

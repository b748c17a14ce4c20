"""``python -m tests.floors``: how much of the code the unit tests cover, branches included, held against two floors.

Reads what ``pytest --cov`` has left in ``.coverage``. The floor of the whole is ``fail_under`` in pyproject.toml; the
modules of the pure core, which pyproject.toml lists in its import contracts, must be covered to the last branch.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONTRACT = "the pure core does no I/O and knows no heavy library"


def pure_modules() -> list[str]:
    """The paths of the pure modules, from the import contract that keeps them pure."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    (contract,) = [one for one in tools["importlinter"]["contracts"] if one["name"] == CONTRACT]
    return [f"{name.replace('.', '/')}.py" for name in contract["source_modules"]]


def main() -> int:
    """0 when both floors hold, else 1."""
    report = [sys.executable, "-m", "coverage", "report", "--skip-covered"]
    whole = subprocess.run([*report, "--sort=cover"], cwd=ROOT, check=False)
    pure = subprocess.run(
        [*report, "--show-missing", "--fail-under=100", f"--include={','.join(pure_modules())}"], cwd=ROOT, check=False
    )
    return 1 if whole.returncode or pure.returncode else 0


if __name__ == "__main__":
    sys.exit(main())

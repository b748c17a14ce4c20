"""``python -m tests.newest``: the unit tests on the newest Python here, with the newest versions that are admitted.

A fresh environment takes the newest release of every dependency that pyproject.toml admits, so that a library that
breaks its API is seen here before a user sees it. ``python -m tests.newest --pre`` takes pre-releases as well.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXTRAS = ("embedded", "wyoming", "test")
OPTIONS = ("-q", "-p", "no:cacheprovider", "--hypothesis-profile=quick")  # the properties are tested by the other run
LEFT_OUT = ("tests/integration", "tests/systemd")
LINTERS = ("mypy", "ruff", "import-linter", "coverage", "pytest-cov", "types-")  # no test needs them
NEWEST_MINOR = 20  # of Python 3; a version that does not exist is skipped
PROBE = "import ensurepip, ssl, sys, venv; print('%d %d' % sys.version_info[:2])"


def candidates() -> Iterator[str]:
    """Interpreters of this machine that may be newer than this one, and this one."""
    for minor in range(NEWEST_MINOR, sys.version_info.minor, -1):
        found = shutil.which(f"python3.{minor}")
        if found:
            yield found
    yield from map(str, sorted((Path.home() / ".pyenv/versions").glob("3.*/bin/python")))
    yield sys.executable


def version_of(python: str) -> tuple[int, int]:
    """Its version; (0, 0) when it does not run or cannot make an environment."""
    done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, check=False)
    major, _, minor = done.stdout.strip().partition(" ")
    return (int(major), int(minor)) if done.returncode == 0 else (0, 0)


def requirements() -> list[str]:
    """Every dependency of the project and of its extras that the tests need, as pyproject.toml declares them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"], *(line for extra in EXTRAS for line in extras[extra])]
    return [line for line in declared if not line.startswith(LINTERS)]


def install(python: str, directory: Path, *options: str) -> Path:
    """Makes an environment with the dependencies and this checkout; returns its Python."""
    subprocess.run([python, "-m", "venv", directory], check=True)
    inside = directory / "bin/python"
    pip = [str(inside), "-m", "pip", "install", "--quiet", "--no-compile", "--upgrade"]
    subprocess.run([*pip, *options, *requirements()], check=True)
    (packages,) = directory.glob("lib/python3*/site-packages")
    (packages / "whisperd.pth").write_text(f"{ROOT}\n", encoding="utf-8")
    return inside


def main() -> int:
    """The exit code of pytest."""
    python = max(candidates(), key=version_of)
    major, minor = version_of(python)
    with tempfile.TemporaryDirectory() as name:
        inside = install(python, Path(name, "env"), *sys.argv[1:])
        listed = subprocess.run([inside, "-m", "pip", "freeze"], capture_output=True, text=True, check=True).stdout
        sys.stdout.write(f"--- Python {major}.{minor} with {', '.join(listed.split())}\n")
        sys.stdout.flush()
        command = [str(inside), "-m", "pytest", *OPTIONS, *(f"--ignore={path}" for path in LEFT_OUT), "tests"]
        return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

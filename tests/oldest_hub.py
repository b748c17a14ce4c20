"""``python -m tests.oldest_hub``: the tests of the store under the oldest huggingface_hub that pyproject.toml admits.

A fresh environment holds that library alone and borrows everything else from the one that runs this.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIBRARY = "huggingface_hub"
# the code next to the library: its exceptions, the whole way of a model, and its bodies and processes
TESTS = ("tests/store/test_hub.py", "tests/store/test_reconcile.py", "tests/integration/test_faults_body.py")
LEFT_OUT = "plain or waited_for or lasting"  # tests of the library alone, slow ones, or those that use little of it


def oldest() -> str:
    """The lowest version that the declared dependency allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (bound,) = (found[1] for line in project["dependencies"] if (found := re.match(rf"{LIBRARY}>=([\d.]+)", line)))
    return bound if bound.count(".") == 2 else f"{bound}{'.0' * (2 - bound.count('.'))}"


def environment(directory: Path, version: str) -> Path:
    """Makes it; returns its Python."""
    venv.create(directory, with_pip=False)
    paths = sysconfig.get_paths(vars={"base": str(directory), "platbase": str(directory)})
    borrowed = Path(paths["purelib"], "borrowed.pth")
    borrowed.write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", paths["purelib"]]
    subprocess.run([*command, f"{LIBRARY}=={version}"], check=True)
    return directory / "bin/python"


def main() -> int:
    """The exit code of pytest; 1 when the library that was tested is not the one that should have been."""
    version = oldest()
    with tempfile.TemporaryDirectory() as name:
        python = environment(Path(name, "env"), version)
        probe = f"import {LIBRARY}; print({LIBRARY}.__version__)"
        found = subprocess.run([python, "-c", probe], capture_output=True, text=True, check=True).stdout.strip()
        sys.stdout.write(f"--- the store under {LIBRARY} {found}\n")
        sys.stdout.flush()
        if found != version:
            return 1
        options = ["-q", "-p", "no:cacheprovider", "-k", f"not ({LEFT_OUT})"]
        command = [str(python), "-m", "pytest", *options, *TESTS]
        return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

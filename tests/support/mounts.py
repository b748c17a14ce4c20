"""File systems that a test mounts; without permission the test is skipped."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(directory: Path, *arguments: str) -> Iterator[None]:
    """A file system at ``directory`` until the end of the block."""
    if os.geteuid():
        pytest.skip("mounting needs root")
    directory.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *arguments, str(directory)], capture_output=True, text=True, check=False)  # noqa: S607
    if done.returncode:
        pytest.skip(f"this machine does not let mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)  # noqa: S607


def small(directory: Path, options: str) -> AbstractContextManager[None]:
    """A tmpfs with these options, such as ``size=1m``."""
    return mounted(directory, "-t", "tmpfs", "-o", options, "tmpfs")


def resize(directory: Path, options: str) -> None:
    """Changes the options of a tmpfs."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(directory)], check=True)  # noqa: S607

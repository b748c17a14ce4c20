"""Whatever a machine lacks for a GPU's kernels is found before the first launch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from whisperd.engine.devices import kernel_obstacle, set_kernel_cache


@pytest.fixture
def machine(tmp_path: Path) -> tuple[dict[str, str], Path]:
    """A path with a C compiler, and a directory with Python's headers."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    compiler, headers = tmp_path / "bin" / "gcc", tmp_path / "include"
    compiler.parent.mkdir()
    compiler.touch(0o755)
    headers.mkdir()
    (headers / "Python.h").touch()
    return {"PATH": str(compiler.parent)}, headers


def test_nothing_is_missing(machine: tuple[dict[str, str], Path]) -> None:
    """A compiler and the headers are enough."""
    environ, headers = machine
    assert kernel_obstacle(environ, str(headers)) is None


def test_no_compiler(machine: tuple[dict[str, str], Path]) -> None:
    """The message names what to install, and the compiler that CC names."""
    _, headers = machine
    assert "install gcc" in str(kernel_obstacle({"PATH": "/nowhere"}, str(headers)))
    assert "(mycc)" in str(kernel_obstacle({"PATH": "/nowhere", "CC": "mycc"}, str(headers)))


def test_no_headers(machine: tuple[dict[str, str], Path]) -> None:
    """The message names the file that is missing."""
    environ, _ = machine
    assert "/nowhere/Python.h is missing: install python3-dev" in str(kernel_obstacle(environ, "/nowhere"))


def test_kernels_are_kept_beside_the_conversions(tmp_path: Path) -> None:
    """Compiled kernels are kept beside the conversions, since a service has no home; a configured place is kept."""
    environ: dict[str, str] = {}
    set_kernel_cache(tmp_path, environ)
    assert environ == {"TRITON_CACHE_DIR": str(tmp_path / "triton")}
    set_kernel_cache(Path("/elsewhere"), environ)
    assert environ == {"TRITON_CACHE_DIR": str(tmp_path / "triton")}

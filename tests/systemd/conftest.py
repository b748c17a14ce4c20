"""For each Debian: the package, built once; a minimal system, made once and kept; containers with both.

A test that is marked ``every_debian`` runs under each systemd, the others under the oldest. ``WHISPERD_DEBS`` names a
directory with packages that are built already, for work on the tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.speech import Clip
from tests.systemd.machine import BASE, RELEASES, Machine, booted, kept_root, missing
from tests.systemd.service import Service

REPOSITORY = Path(__file__).parents[2]
BUILD_S = 1200.0


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each Debian on which it runs."""
    if "suite" in metafunc.fixturenames:
        everywhere = metafunc.definition.get_closest_marker("every_debian")
        metafunc.parametrize(
            "suite", list(RELEASES) if everywhere else list(RELEASES)[:1], indirect=True, scope="session"
        )


@pytest.fixture(scope="session")
def suite(request: pytest.FixtureRequest) -> str:
    """The name of a Debian, such as bookworm."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def package(suite: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Debian package for this Debian."""
    if reason := missing():
        pytest.skip(reason)
    pattern = f"whisperd_*+deb{RELEASES[suite]}_*.deb"
    if ready := os.environ.get("WHISPERD_DEBS"):
        (found,) = Path(ready).glob(pattern)
        return found
    directory = tmp_path_factory.mktemp("packages")
    command = [str(REPOSITORY / "packaging/build-deb"), suite, str(directory)]
    subprocess.run(command, check=True, timeout=BUILD_S, stdout=subprocess.DEVNULL)
    (found,) = directory.glob(pattern)
    return found


@pytest.fixture(scope="session")
def fresh_root(
    suite: str, package: Path, snapshot: Path, clips: dict[str, Clip], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A minimal system that has what the package depends on, the package file, a model and recordings."""
    root = tmp_path_factory.mktemp(suite) / "root"
    kept = kept_root(suite, (*BASE, "python3", "ca-certificates"))
    subprocess.run(["cp", "-a", kept, root], check=True)
    shutil.copy(package, root / "root/whisperd.deb")
    shutil.copytree(snapshot, root / "srv/tiny")
    for clip in clips.values():
        shutil.copy(clip.path, root / "srv")
    for name in (
        "__init__.py",
        "support/__init__.py",
        "support/loopback_hub.py",
        "systemd/__init__.py",
        "systemd/hub.py",
    ):
        copy = root / "srv/hub/tests" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / "tests" / name, copy)
    return root


@pytest.fixture(scope="module")
def bare(fresh_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A container without the package, for one module."""
    root = tmp_path_factory.mktemp("machine") / "root"
    subprocess.run(["cp", "-a", fresh_root, root], check=True)
    try:
        with booted(root) as machine:
            yield machine
    finally:
        shutil.rmtree(root)


@pytest.fixture(scope="module")
def installed(bare: Machine) -> Machine:
    """The same with the package."""
    bare.run("apt-get", "install", "-y", "/root/whisperd.deb")
    return bare


@pytest.fixture
def service(installed: Machine) -> Iterator[Service]:
    """whisperd as it is shipped, on the embedded model, running."""
    service = Service(machine=installed)
    service.reset()
    yield service
    service.hub_stop()

"""The package, built once; a minimal Debian, made once; containers with both."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.speech import Clip
from tests.systemd.machine import BASE, Machine, booted, make_root, missing
from tests.systemd.service import Service

REPOSITORY = Path(__file__).parents[2]
BUILD_S = 400.0


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The Debian package, and a root file system with nothing but a bootable Debian and what the package depends on."""
    if reason := missing():
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("systemd")
    with ThreadPoolExecutor(1) as pool:
        making = pool.submit(make_root, directory / "root", (*BASE, "python3", "ca-certificates"))
        command = [REPOSITORY / "packaging/build-deb", directory]
        subprocess.run(command, check=True, timeout=BUILD_S, stdout=subprocess.DEVNULL)
        making.result()
    (package,) = directory.glob("whisperd_*.deb")
    return package, directory / "root"


@pytest.fixture(scope="session")
def fresh_root(built: tuple[Path, Path], snapshot: Path, clips: dict[str, Clip]) -> Path:
    """The root with the package file, a model and recordings laid in."""
    package, root = built
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

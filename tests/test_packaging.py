"""The package's files that follow from others."""

from __future__ import annotations

import re
import runpy
import tomllib
from pathlib import Path

from whisperd.config import load

ROOT = Path(__file__).parent.parent
PACKAGING = ROOT / "packaging"


def test_generated_files_are_up_to_date() -> None:
    """Man pages, completions, files of options and templates of units are the output of packaging/generate.py."""
    made = runpy.run_path(str(PACKAGING / "generate.py"))["generated"]()
    assert len(made) == 9
    for path, text in made.items():
        assert path.read_text(encoding="utf-8") == text, f"run python packaging/generate.py: {path} is out of date"


def test_the_packaged_configuration() -> None:
    """The configuration for /etc is valid, and names the same directory of models for every user."""
    loaded = load(PACKAGING / "etc/whisperd.toml", environ={}, cwd=ROOT)
    assert loaded.config.cache_dir == "/var/cache/whisperd"
    assert loaded.warnings == ()


def test_every_dependency_is_pinned_by_hash() -> None:
    """The lock file has each dependency of the project, each with a hash, and no address of its origin."""
    text = (PACKAGING / "requirements-cpu.lock").read_text(encoding="utf-8")
    pinned = dict(
        re.findall(r"^([a-z0-9-]+)==\S+ \\\n((?: +--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.MULTILINE)
    )
    assert len(pinned) == len(re.findall(r"^[a-z0-9]", text, re.MULTILINE))
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    names = {re.split(r"[><=]", one)[0].lower().replace("_", "-") for one in declared}
    assert names <= set(pinned)
    assert "://" not in text


def test_the_package_has_the_version_of_the_project() -> None:
    """debian/changelog, the project and the page agree."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert (PACKAGING / "debian/changelog").read_text(encoding="utf-8").startswith(f"whisperd ({version}) ")


def test_units_beside_the_package() -> None:
    """The package installs every unit of systemd/, and the container restarts as the service does."""
    installed = (PACKAGING / "debian/whisperd.install").read_text(encoding="utf-8")
    for unit in (ROOT / "systemd").glob("*.*"):
        if unit.suffix in {".service", ".socket", ".timer"}:
            assert f"systemd/{unit.name} lib/systemd/system\n" in installed
        else:
            assert (PACKAGING / "debian" / unit.name).resolve() == unit
    service = (ROOT / "systemd/whisperd.service").read_text(encoding="utf-8").splitlines()
    container = (PACKAGING / "container/whisperd.container").read_text(encoding="utf-8").splitlines()
    same = [line for line in service if line.startswith(("Restart", "Watchdog", "Timeout"))]
    assert len(same) == 6
    assert set(same) <= set(container)

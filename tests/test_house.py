"""The layout of the repository, and that the files beside the code agree."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.__main__ import CHECKS
from whisperd import __version__

ROOT = Path(__file__).parent.parent
NAMES_MAX = 20
LINES_MAX = 600
VAGUE = {"common", "helpers", "misc", "tools", "utils"}
DESCRIBED = ("style", "layout", "types", "imports", "unit", "coverage", "integration", "oldest", "newest", "systemd")


def blocks(text: str) -> list[str]:
    return re.findall(r"```sh\n(.*?)```", text, re.DOTALL)


def test_ci_runs_the_line_of_the_readme() -> None:
    """The test command of the README is the last line of the script that CI runs."""
    commands = [line for block in blocks((ROOT / "README.md").read_text()) for line in block.splitlines()]
    (command,) = [line for line in commands if line.endswith("-m tests")]
    assert (ROOT / ".ci/run").read_text().rstrip().endswith("\n" + command)


def test_version() -> None:
    """The package, its metadata and the changelog agree on the version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__
    assert f"\n## {__version__} " in (ROOT / "CHANGELOG.md").read_text()


def test_the_package_holds_wings() -> None:
    """The package has at most 20 names, and a wing is a directory with a docstring that states its purpose."""
    wings = [path for path in (ROOT / "whisperd").iterdir() if (path / "__init__.py").exists()]
    modules = list((ROOT / "whisperd").glob("[!_]*.py"))
    assert len(wings) + len(modules) <= NAMES_MAX
    for package in (ROOT / "whisperd").rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(package.read_text(encoding="utf-8"))), f"{package} says nothing"


def test_modules_have_one_noun() -> None:
    """No module has a generic name, and none exceeds the limit of lines."""
    for path in (ROOT / "whisperd").rglob("*.py"):
        assert path.stem not in VAGUE, f"{path}: {path.stem} could be anything"
        assert len(path.read_text(encoding="utf-8").splitlines()) <= LINES_MAX, f"{path} is too long"


def test_tests_follow_the_wings() -> None:
    """Each directory of tests is that of a wing, or one of the groups that CONTRIBUTING.md names."""
    wings = {path.name for path in (ROOT / "whisperd").iterdir() if path.is_dir()}
    found = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert found - wings == {"integration", "support", "systemd"}


def test_hooks_are_the_linters_of_the_tests() -> None:
    """The pre-commit hooks are what the checks run."""
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    for check in ("style", "layout", "types", "imports"):
        assert f"- id: {check}\n" in hooks
        program, *arguments = map(str, CHECKS[check].command)
        assert (
            f"entry: .venv/bin/{Path(program).name}{f' {arguments[0]}'.replace(' .', '') if arguments else ''}" in hooks
        )


def test_checks_are_described() -> None:
    """CONTRIBUTING.md has a row for each check."""
    rows = re.findall(r"^\| (`.*?`) \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for row in rows for name in re.findall(r"`(\w+)`", row)] == list(DESCRIBED)


def test_metadata() -> None:
    """Every classifier of a Python version is allowed by the project, and no address is invented."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    versions = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    assert f">={versions[0]}" == project["requires-python"]
    assert "urls" not in project  # the project has no public address; say it here when it has one


def test_locked_versions_are_admitted() -> None:
    """Versions in the Debian package are within the bounds of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lock = (ROOT / "packaging/requirements-cpu.lock").read_text(encoding="utf-8")
    locked = dict(re.findall(r"^([a-z0-9-]+)==([^ ;]+)", lock, re.MULTILINE))
    for requirement in map(Requirement, project["dependencies"]):
        version = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} does not admit {version}"

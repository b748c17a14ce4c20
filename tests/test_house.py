"""What the files beside the code say is true."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from whisperd import __version__

ROOT = Path(__file__).parent.parent


def blocks(text: str) -> list[str]:
    return re.findall(r"```sh\n(.*?)```", text, re.DOTALL)


def test_ci_runs_the_line_of_the_readme() -> None:
    """The test command of the README is the last line of the script that CI runs."""
    commands = [line for block in blocks((ROOT / "README.md").read_text()) for line in block.splitlines()]
    (command,) = [line for line in commands if line.endswith("-m tests")]
    assert (ROOT / ".ci/run").read_text().rstrip().endswith("\n" + command)


def test_readme_names_real_commands() -> None:
    """Every whisperd command that the README shows exists."""
    from whisperd.cli import cli

    text = "".join(blocks((ROOT / "README.md").read_text()))
    shown = set(re.findall(r"whisperd ([a-z]+)\b", text)) - {"http"}
    assert shown == set(cli.commands)


def test_version() -> None:
    """The package, its metadata and the changelog agree on the version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__
    assert f"\n## {__version__} " in (ROOT / "CHANGELOG.md").read_text()


def test_readme_names_the_members_of_the_report() -> None:
    """The contract of ``whisperd reconcile --json`` is written down, whole."""
    from whisperd.store.plan import CachePlan
    from whisperd.store.reconcile import Report, Result

    report = Report(plan=CachePlan(actions=()), results=(Result(name="m", outcome="ok"),)).as_dict()
    documented = set(re.findall(r"`(\w+)`", (ROOT / "README.md").read_text()))
    assert set(report) | set(report["models"][0]) <= documented

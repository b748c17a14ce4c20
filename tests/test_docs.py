"""What README, docs, CONTRIBUTING and SECURITY say is true of the code."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tests.floors import pure_modules
from whisperd import errors
from whisperd.cli import EXIT_CODES, cli
from whisperd.config import load, options
from whisperd.metrics.prometheus import FAMILIES
from whisperd.serving.http.params import FIELDS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), ROOT / "examples/README.md"])
PAGE = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
README_LINES_MAX = 150
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
COUNTERS = {f"whisperd_{family.name}_total" for family in FAMILIES if family.kind == "counter"}
OTHER_METRICS = {f"whisperd_{family.name}" for family in FAMILIES if family.kind != "counter"}


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> Iterator[list[str]]:
    """Every ``whisperd`` command that a page shows, as its arguments; also behind a pipe or in a list of one line."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"[|;]|&&", line.partition(" #")[0]):
                words = shlex.split(part)
                if words and words[0].endswith("whisperd") and "=" not in words[0]:
                    yield words[1:]


def slug(heading: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@PAGE
def test_links_resolve(page: Path) -> None:
    """Every relative link leads to a file of the repository, and every anchor to a heading."""
    for link in LINK.findall(text_of(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link} leads nowhere"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", text_of(target), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page.name}: {link} names no heading"


@PAGE
def test_commands_are_understood(page: Path) -> None:
    """Every command in the pages exists, with its options and arguments."""
    for arguments in commands(page):
        context = click.Context(cli, info_name="whisperd", **cli.context_settings)
        name, command, rest = cli.resolve_command(context, arguments)
        assert command is not None, f"{page.name}: no command {name}"
        try:
            command.make_parser(click.Context(command, info_name=name, parent=context)).parse_args(args=[*rest])
        except click.UsageError as error:
            pytest.fail(f"{page.name}: whisperd {shlex.join(arguments)}: {error.format_message()}")


def test_every_command_is_shown() -> None:
    """Every command has a line in the README or the docs."""
    shown = {arguments[0] for page in PAGES for arguments in commands(page)}
    assert shown == set(cli.commands)


@PAGE
def test_configurations_are_valid(page: Path, tmp_path: Path) -> None:
    """Every block of TOML is a whisperd.toml that is valid without a warning."""
    for block in blocks(page, "toml"):
        file = tmp_path / "whisperd.toml"
        file.write_text(block, encoding="utf-8")
        assert load(file, environ={}, cwd=tmp_path).warnings == ()


@PAGE
def test_names_of_options_exist(page: Path) -> None:
    """Text in backticks that looks like an option is one."""
    known = {option.key for option in options()}
    tables = "|".join({key.partition(".")[0] for key in known if "." in key})
    named = set(re.findall(rf"`((?:{tables})\.\w+)", text_of(page)))
    modules = {"config.load"}
    assert {
        name for name in named - known - modules if not (ROOT / "whisperd" / name.partition(".")[0]).is_dir()
    } == set()


@PAGE
def test_paths_exist(page: Path) -> None:
    """Text in backticks that looks like a path of this repository is one."""
    for path in re.findall(
        r"`((?:whisperd|tests|systemd|packaging|benchmarks|docs|examples)/[\w./*-]*)`", text_of(page)
    ):
        assert list(ROOT.glob(path.rstrip("/"))), f"{page.name}: there is no {path}"


@PAGE
def test_names_of_metrics_exist(page: Path) -> None:
    """Text in backticks that looks like a metric is one."""
    known = COUNTERS | OTHER_METRICS | {"whisperd_version"}
    assert set(re.findall(r"`(whisperd_\w+)", text_of(page))) <= known


def test_readme_is_short() -> None:
    """The README stays within its length, since it covers first use."""
    assert len(text_of(ROOT / "README.md").splitlines()) < README_LINES_MAX


def test_readme_names_every_page() -> None:
    """The README links to each page of docs."""
    linked = {Path(link).name for link in LINK.findall(text_of(ROOT / "README.md")) if link.startswith("docs/")}
    assert linked == {page.name for page in DOCS.glob("*.md")}


def test_fields_are_described() -> None:
    """The two tables list every field of a request, and no other."""
    rows = re.findall(r"^\| (`.*?) \|", text_of(DOCS / "openai.md") + text_of(DOCS / "serving.md"), re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`(\w+)(?:\[\])?`", row)}
    assert set(FIELDS) <= documented


def test_codes_of_errors_exist() -> None:
    """The table of errors has codes and statuses of the tree of exceptions."""
    rows = re.findall(r"^\| (\d{3}) \| (.*?) \|", text_of(DOCS / "serving.md"), re.MULTILINE)
    documented = {(int(status), code) for status, codes in rows for code in re.findall(r"`(\w+)`", codes)}
    known = {(kind.http_status, kind.code) for kind in tree(errors.Error)}
    assert documented <= known
    assert {status for status, _ in documented} >= {400, 401, 403, 404, 413, 429, 500, 503, 504}


def test_exit_codes_are_described() -> None:
    """The pages list the exit codes of the command's help."""
    known = {int(code) for code in re.findall(r"(?:^|  )(\d+) [a-zA-Z]", EXIT_CODES, re.MULTILINE)}
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", text_of(DOCS / "operations.md"), re.MULTILINE)}
    assert listed == known
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", text_of(DOCS / "reconcile.md"), re.MULTILINE)} <= known


def test_messages_are_those_of_the_program() -> None:
    """Each message of the page on troubleshooting is a message of the program."""
    table = text_of(DOCS / "operations.md").partition("| message | cause |")[2].partition("\n\n")[0]
    messages = re.findall(r"^\| `(.*?)` \|", table, re.MULTILINE)
    said = "\n".join(strings(ROOT / "whisperd"))
    assert len(messages) > 10
    assert [message for message in messages if message not in said] == []


def test_the_report_is_described() -> None:
    """The contract of ``whisperd reconcile --json`` is documented completely."""
    from whisperd.store.plan import CachePlan
    from whisperd.store.reconcile import Report, Result

    report = Report(plan=CachePlan(actions=()), results=(Result(name="m", outcome="ok"),)).as_dict()
    documented = set(re.findall(r"`(\w+)`", text_of(DOCS / "reconcile.md")))
    assert set(report) | set(report["models"][0]) <= documented


def test_the_map_has_every_wing() -> None:
    """The page on architecture has one line for each directory and module of the package."""
    table = text_of(DOCS / "architecture.md").partition("## Wings")[2].partition("\n\n")[2].partition("\n\n")[0]
    named = set(re.findall(r"`whisperd/([\w.]+)/?`", table))
    private = {"__init__.py", "__main__.py", "__pycache__", "py.typed", "version.py", "data"}
    assert named == {path.name for path in (ROOT / "whisperd").iterdir()} - private


def test_the_map_has_the_order_of_imports() -> None:
    """The page on architecture shows the layers that the import contract holds."""
    contracts = tomllib.loads(text_of(ROOT / "pyproject.toml"))["tool"]["importlinter"]["contracts"]
    (layers,) = [one["layers"] for one in contracts if one["name"] == "imports point down"]
    assert "\n".join(layers) in text_of(DOCS / "architecture.md")


def test_the_map_has_the_pure_core() -> None:
    """The page on architecture lists the modules that the import contract keeps pure."""
    page = text_of(DOCS / "architecture.md")
    names = [path.removeprefix("whisperd/").removesuffix(".py").replace("/", ".") for path in pure_modules()]
    assert [name for name in names if f"`{name}`" not in page] == []


def test_the_snippet_is_an_example() -> None:
    """The README's Python is what examples/openai_sdk.py does with its socket."""
    (snippet,) = blocks(ROOT / "README.md", "python")
    example = text_of(ROOT / "examples/openai_sdk.py")
    for line in snippet.splitlines():
        if line.startswith(("transport", "http_client", "client")):
            call = line.partition(" = ")[2].replace('uds="/run/whisperd.sock"', "uds=")
            assert call.partition("uds=")[0] in example


def tree(kind: type[errors.Error]) -> Iterator[type[errors.Error]]:
    """A class and all below it."""
    yield kind
    for one in kind.__subclasses__():
        yield from tree(one)


def strings(directory: Path) -> Iterator[str]:
    """The texts of every module, those of f-strings with a gap for each value."""
    for path in directory.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value

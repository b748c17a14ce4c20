"""A model reference, as whisperd.toml, ``-m``, a request to reconcile and ``download_model_if_needed`` write it.

    owner/name                a repository on the Hub, at its branch main
    owner/name@revision       the same at another branch, a tag or a commit
    path:/dir                 a directory
    package:module/subdir     a directory inside an installed Python package

This is the only grammar and the only parser. Two references with different repositories have different folders in a
Hugging Face cache, because no half of a repository's id may contain ``--`` or begin or end with ``-``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from whisperd.errors import SourceError

FORMS = "owner/name[@revision], path:/dir or package:module/subdir"
MAIN = "main"

COMMIT = re.compile(r"[0-9a-f]{40}")
# Half of a repository's id, as huggingface_hub's validate_repo_id wants it: no -- and no .. inside.
PART = re.compile(r"\w(?:(?!--|\.\.)[\w.-])*(?<![.-])", re.ASCII)
PART_CHARS = 96
MODULE = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*")
# What git check-ref-format refuses, and what would leave the refs directory of the cache.
NOT_A_REVISION = re.compile(r"[\s\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|^[-/]|(?:^|/)\.|\.lock(?:/|$)|[/.]$|//|^@?$")
NAME_BYTES = 255  # of one component of a path
CONTROL = re.compile(r"[\x00-\x1f\x7f]")

# A directory of this name says nothing about the model in it.
GENERIC_NAMES = frozenset({"", "model", "models"})


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSource:
    """A repository on the Hub; ``revision`` is a branch, a tag or a commit."""

    repo_id: str
    revision: str = MAIN

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.revision}"

    @property
    def is_pinned(self) -> bool:
        """True if the revision is a whole commit hash, which never changes its meaning."""
        return bool(COMMIT.fullmatch(self.revision))

    @property
    def base(self) -> str:
        """The reference without the revision."""
        return self.repo_id

    @property
    def shortest(self) -> str:
        """The shortest reference that parses to this source."""
        return self.repo_id if self.revision == MAIN else str(self)

    @property
    def default_name(self) -> str:
        """The name that requests use when the configuration gives none."""
        return self.repo_id


@dataclass(frozen=True, slots=True, kw_only=True)
class PathSource:
    """A directory that whisperd reads and never changes."""

    path: Path

    def __str__(self) -> str:
        return f"path:{self.path}"

    @property
    def revision(self) -> None:
        """None: only the Hub has revisions."""
        return

    @property
    def base(self) -> str:
        """The reference."""
        return str(self)

    @property
    def shortest(self) -> str:
        """The reference."""
        return str(self)

    @property
    def default_name(self) -> str:
        """The name that requests use when the configuration gives none."""
        return self.path.name


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageSource:
    """A directory inside an installed Python package; ``subdir`` is relative to the module, ``""`` is the module."""

    module: str
    subdir: str

    def __str__(self) -> str:
        return f"package:{self.module}/{self.subdir}".rstrip("/")

    @property
    def revision(self) -> None:
        """None: only the Hub has revisions."""
        return

    @property
    def base(self) -> str:
        """The reference."""
        return str(self)

    @property
    def shortest(self) -> str:
        """The reference."""
        return str(self)

    @property
    def default_name(self) -> str:
        """The name that requests use when the configuration gives none."""
        last = PurePosixPath(self.subdir).name
        return self.module if last in GENERIC_NAMES else last


Source = HubSource | PathSource | PackageSource


def parse(reference: str, revision: str | None = None) -> Source:
    """Parses a model reference; raises SourceError.

    Args:
        reference: ``owner/name[@revision]``, ``path:/dir`` or ``package:module/subdir``.
        revision: the revision where it was given apart from the reference.
    """
    scheme, _, rest = reference.partition(":")
    if scheme not in ("path", "package"):
        return _parse_hub(reference, revision)
    if revision is not None:
        raise SourceError(f"revision belongs to a Hub repository, {reference!r} has none")
    return _parse_path(rest) if scheme == "path" else _parse_package(rest)


def _parse_hub(text: str, revision: str | None) -> HubSource:
    repo_id, at, appended = text.partition("@")
    owner, _, name = repo_id.partition("/")
    if not (_is_part(owner) and _is_part(name)) or name.endswith(".git"):
        hint = f"; did you mean {'path:' + text!r}?" if text.startswith("/") else ""
        raise SourceError(f"expects {FORMS}, got {text!r}{hint}")
    if at and revision is not None:
        raise SourceError(f"names a revision twice: {appended!r} after the @ and {revision!r}")
    chosen = appended if at else MAIN if revision is None else revision
    if not _is_revision(chosen):
        raise SourceError(f"expects a branch, tag or commit as the revision of {repo_id}, got {chosen!r}")
    # The Hub takes a commit in capitals for the name of a branch.
    return HubSource(repo_id=repo_id, revision=chosen.lower() if COMMIT.fullmatch(chosen.lower()) else chosen)


def _is_part(text: str) -> bool:
    return bool(PART.fullmatch(text)) and len(text) <= PART_CHARS


def _is_revision(text: str) -> bool:
    return not NOT_A_REVISION.search(text) and all(len(part.encode()) <= NAME_BYTES for part in text.split("/"))


def _parse_path(text: str) -> PathSource:
    path = PurePosixPath(text)
    if not path.is_absolute() or not path.name or CONTROL.search(text):
        raise SourceError(f"expects an absolute directory after path:, got {'path:' + text!r}")
    return PathSource(path=Path(path))


def _parse_package(text: str) -> PackageSource:
    module, _, subdir = text.partition("/")
    inside = PurePosixPath(subdir)
    if not MODULE.fullmatch(module) or inside.is_absolute() or ".." in inside.parts or CONTROL.search(subdir):
        raise SourceError(f"expects package:module or package:module/subdir, got {'package:' + text!r}")
    return PackageSource(module=module, subdir="" if inside == PurePosixPath() else str(inside))

"""A declared model: where its files come from and under which names it is served."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, assert_never

from pydantic import BaseModel, ConfigDict, Field, model_validator

Kind = Literal["hub", "path", "package"]
Name = Annotated[str, Field(pattern=r"^\S+$", max_length=200)]

FORMS = "owner/name[@revision], path:/dir or package:module/subdir"

# Half of a repository's id, as huggingface_hub's validate_repo_id wants it: no -- and no .. inside.
PART = re.compile(r"\w+(?:[.-]\w+)*", re.ASCII)
PART_CHARS = 96
MODULE = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*")
# What git check-ref-format refuses, and what would leave the refs directory of the cache.
NOT_A_REVISION = re.compile(r"[\s\x00-\x20\x7f~^:?*\[\\]|\.\.|^[-/.]|/$|//")
COMMIT = re.compile(r"[0-9A-Fa-f]{40}")

# A directory of this name says nothing about the model in it.
GENERIC_NAMES = frozenset({"", "model", "models"})


class Table(BaseModel):
    """A table of whisperd.toml: every key is known, every type is exact, nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelTable(Table):
    """One model. A string in whisperd.toml is the ``repo`` of a table that says nothing else."""

    repo: str = Field(description=f"Where the files come from: {FORMS}.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of the repository (its main branch).")
    name: Name | None = Field(
        default=None, description="Name that requests use (the repository's, or the directory's)."
    )
    aliases: tuple[Name, ...] = Field(default=(), description='Further names, such as ["whisper-1"].')
    preload: bool = Field(default=True, description="Load at boot; false: at the first request.")
    keep_loaded: bool = Field(
        default=False, description="Never unload it, neither when idle nor to make room for another."
    )

    @model_validator(mode="before")
    @classmethod
    def _normalise(cls, given: object) -> object:
        table: dict[str, Any]
        if isinstance(given, str):
            table = {"repo": given}
        elif isinstance(given, dict):
            table = dict(given)
        else:
            return given
        revision = table.get("revision")
        if isinstance(table.get("repo"), str) and isinstance(revision, str | None):
            table["repo"], table["revision"] = split_reference(table["repo"], revision)
        return table

    @property
    def kind(self) -> Kind:
        """Where the files come from."""
        return kind_of(self.repo)

    @property
    def reference(self) -> str:
        """``owner/name``, ``path:/dir`` or ``package:module/subdir``, without the revision."""
        return self.repo

    @property
    def served_name(self) -> str:
        """The name that ``/v1/models`` lists."""
        return self.name or default_name(self.repo)

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that requests may use, the served one first."""
        return (self.served_name, *self.aliases)


def kind_of(reference: str) -> Kind:
    """What sort of reference this is, by its prefix."""
    if reference.startswith("path:"):
        return "path"
    return "package" if reference.startswith("package:") else "hub"


def default_name(reference: str) -> str:
    """The name of a model that was given none."""
    kind = kind_of(reference)
    match kind:
        case "hub":
            return reference
        case "path":
            return PurePosixPath(reference).name
        case "package":
            module, _, subdir = reference.removeprefix("package:").partition("/")
            last = PurePosixPath(subdir).name
            return module if last in GENERIC_NAMES else last
        case _:
            assert_never(kind)


def split_reference(text: str, revision: str | None = None) -> tuple[str, str | None]:
    """``owner/name@revision`` as (reference, revision), checked; ValueError says what is wrong.

    ``revision`` is the one that was given apart from the reference.
    """
    kind = kind_of(text)
    if kind == "hub":
        return _hub(text, revision)
    if revision is not None:
        raise ValueError(f"revision belongs to a Hub repository, {text!r} has none")
    return (_path(text) if kind == "path" else _package(text)), None


def _hub(text: str, revision: str | None) -> tuple[str, str | None]:
    reference, at, appended = text.partition("@")
    owner, _, name = reference.partition("/")
    if not all(PART.fullmatch(part) and len(part) <= PART_CHARS for part in (owner, name)):
        hint = f"; did you mean {'path:' + text!r}?" if text.startswith("/") else ""
        raise ValueError(f"expects {FORMS}, got {text!r}{hint}")
    if at and revision is not None:
        raise ValueError(f"names a revision twice: {appended!r} after the @ and {revision!r}")
    chosen = appended if at else revision
    if chosen is not None and (not chosen or NOT_A_REVISION.search(chosen)):
        raise ValueError(f"expects a branch, tag or commit as the revision of {reference}, got {chosen!r}")
    # The Hub takes a commit in capitals for the name of a branch.
    return reference, chosen.lower() if chosen and COMMIT.fullmatch(chosen) else chosen


def _path(text: str) -> str:
    path = PurePosixPath(text.removeprefix("path:"))
    if not path.is_absolute() or not path.name:
        raise ValueError(f"expects an absolute directory after path:, got {text!r}")
    return f"path:{path}"


def _package(text: str) -> str:
    module, _, subdir = text.removeprefix("package:").partition("/")
    inside = PurePosixPath(subdir)
    if not MODULE.fullmatch(module) or inside.is_absolute() or ".." in inside.parts:
        raise ValueError(f"expects package:module or package:module/subdir, got {text!r}")
    return f"package:{module}/{inside}" if inside.parts else f"package:{module}"

"""The shapes of what the store reads from others and from disk. Nothing of it is used before it has passed here.

Home of pydantic in the store: answers of the Hub, ``whisperd.lock``, stamps, manifests, and the lists of trees that
huggingface_hub keeps.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from whisperd.store.names import problem_of, shown
from whisperd.store.plan import RemoteFile, Resolved

JSON_BYTES = 4 << 20  # of one answer or file: some 20,000 files; Whisper repositories have fewer than 100
FILES = 20_000
SIZE_BYTES = 1 << 50
MESSAGE_CHARS = 200

Model = TypeVar("Model", bound=BaseModel)


def _plain(name: str) -> str:
    if problem := problem_of(name):
        raise ValueError(f"the name {problem}")
    return name


Commit = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")]
GitHash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Hash = Annotated[str, StringConstraints(pattern=r"^(?:[0-9a-f]{40}|[0-9a-f]{64})$")]
Size = Annotated[int, Field(ge=0, le=SIZE_BYTES)]
Name = Annotated[str, AfterValidator(_plain)]
RepoId = Annotated[str, StringConstraints(max_length=200)]


class _Strict(BaseModel):
    """No value is converted: a size that comes as text is wrong."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class File(_Strict):
    """A file as whisperd's own records have it."""

    path: Name
    size_bytes: Size
    hash: Hash

    @property
    def remote(self) -> RemoteFile:
        """The same for the inside."""
        return RemoteFile(path=self.path, size_bytes=self.size_bytes, hash=self.hash)


class CommitFiles(_Strict):
    """A commit with files: an entry of ``whisperd.lock``, and what the process that asks the Hub answers."""

    commit: Commit
    files: Annotated[list[File], Field(max_length=FILES)]
    resolved_at: float | int = 0
    repo: RepoId | None = None

    @model_validator(mode="after")
    def _consistent(self) -> CommitFiles:
        check_consistent([file.remote for file in self.files])
        return self

    @property
    def resolved(self) -> Resolved:
        """The same for the inside."""
        return Resolved(commit=self.commit, files=tuple(file.remote for file in self.files), repo=self.repo)


class Lock(_Strict):
    """``whisperd.lock``: commits by ``owner/name@revision``, and the commits that whisperd has fetched."""

    version: Literal[1]
    models: dict[str, CommitFiles]
    fetched: dict[str, list[Commit]] = Field(default_factory=dict)


class ManifestFile(_Strict):
    """``whisperd-manifest.json``."""

    repo: str
    revision: str
    commit: Commit
    files: Annotated[list[File], Field(max_length=FILES)]


class _Lfs(_Strict):
    sha256: Sha256


class _Sibling(_Strict):
    rfilename: Name
    size: Size
    blobId: GitHash
    lfs: _Lfs | None = None


class RevisionAnswer(_Strict):
    """What the Hub answers for a revision with ``?blobs=true``."""

    sha: Commit
    siblings: Annotated[list[_Sibling], Field(max_length=FILES)]
    id: RepoId | None = None

    @property
    def files(self) -> list[RemoteFile]:
        """Every file of the commit."""
        return [
            RemoteFile(path=one.rfilename, size_bytes=one.size, hash=one.lfs.sha256 if one.lfs else one.blobId)
            for one in self.siblings
        ]


class _TreeFile(_Strict):
    size: Size
    blob_id: GitHash
    lfs_sha256: Sha256 | None = None


class Tree(_Strict):
    """``trees/<commit>.json`` of huggingface_hub: every file of a commit, whatever of it was fetched."""

    format_version: Literal[1]
    files: dict[Name, _TreeFile]

    @property
    def remote_files(self) -> list[RemoteFile]:
        """Every file of the commit."""
        return [
            RemoteFile(path=path, size_bytes=file.size, hash=file.lfs_sha256 or file.blob_id)
            for path, file in self.files.items()
        ]


STAMPS: TypeAdapter[dict[str, tuple[int, int, int]]] = TypeAdapter(dict[str, tuple[int, int, int]])


def check_consistent(files: Sequence[RemoteFile]) -> None:
    """Raises ValueError when a name comes twice, or a content with two sizes."""
    names: set[str] = set()
    size_bytes: dict[str, int] = {}
    for file in files:
        if file.path in names:
            raise ValueError(f"the file {shown(file.path)} is named twice")
        if size_bytes.setdefault(file.hash, file.size_bytes) != file.size_bytes:
            raise ValueError(f"the content {file.hash} has two sizes")
        names.add(file.path)


def parsed(kind: type[Model], text: bytes) -> Model:
    """JSON as one of the shapes above; raises ValueError with what is wrong, in few words."""
    return checked(kind, read_json(text))


def checked(kind: type[Model], value: object) -> Model:
    """A value as one of the shapes above; raises ValueError with what is wrong, in few words."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise ValueError(_words(error)) from None


def read_json(text: bytes) -> object:
    """Any JSON; raises ValueError, also where it is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


def read_stamps_json(text: bytes) -> Mapping[str, tuple[int, int, int]]:
    """The contents of ``stamps.json``; raises ValueError."""
    try:
        return STAMPS.validate_json(text, strict=True)
    except ValidationError as error:
        raise ValueError(_words(error)) from None


def read_bounded(path: Path, limit_bytes: int = JSON_BYTES) -> bytes:
    """The contents of a small regular file; raises OSError, and ValueError for anything else."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("not a regular file")
        if found.st_size > limit_bytes:
            raise ValueError(f"{found.st_size:,} bytes, expected at most {limit_bytes:,}")
        return file.read(limit_bytes)


def _words(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"][:4])
    got = "" if first["type"] == "missing" else f", got {shown(first['input'])}"
    text = f"{place}: {first['msg']}{got}" if place else f"{first['msg']}{got}"
    return " ".join(ascii(text)[1:-1].split())[:MESSAGE_CHARS]

"""Models as plain files, for machines without a network: a directory for each, and in it a manifest with hashes."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from whisperd.errors import StoreError
from whisperd.files import write_atomically
from whisperd.reference import HubSource
from whisperd.store.hub import disk_error
from whisperd.store.names import inside
from whisperd.store.plan import RemoteFile, Resolved
from whisperd.store.schema import ManifestFile, check_consistent, parsed, read_bounded

MANIFEST = "whisperd-manifest.json"
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a directory holds: the files of one commit of a repository."""

    repo: str
    revision: str
    commit: str
    files: tuple[RemoteFile, ...]

    def write(self, directory: Path) -> None:
        """Writes the manifest; last of all, because a directory with a manifest is whole."""
        text = json.dumps({"version": VERSION, **asdict(self)}, indent=2) + "\n"
        write_atomically(directory / MANIFEST, text)


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a directory, if it has one; raises StoreError when it cannot be understood."""
    path = directory / MANIFEST
    try:
        found = parsed(ManifestFile, read_bounded(path))
        files = tuple(file.remote for file in found.files)
        check_consistent(files)
        return Manifest(repo=found.repo, revision=found.revision, commit=found.commit, files=files)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read as a manifest of whisperd: {error}; export the model again") from error


def export_model(source: HubSource, resolved: Resolved, snapshot: Path, directory: Path) -> Path:
    """Copies a complete, verified snapshot to a directory below ``directory``; returns it.

    Raises:
        StoreError: the copy could not be made; what is there has no manifest.
    """
    target = inside(directory, f"{source.repo_id.replace('/', '--')}--{source.revision.replace('/', '--')}")
    try:
        target.mkdir(parents=True, exist_ok=True)
        (target / MANIFEST).unlink(missing_ok=True)
        for file in resolved.files:
            copy = inside(target, *file.path.split("/"))
            copy.unlink(missing_ok=True)  # a link that lies there is not followed
            shutil.copyfile(snapshot / file.path, copy)
        Manifest(repo=source.repo_id, revision=source.revision, commit=resolved.commit, files=resolved.files).write(
            target
        )
    except OSError as error:
        raise disk_error(error, target) from error
    return target

"""Directories and packages get the checks that are possible: completeness, and hashes where somebody has said them."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from whisperd.errors import IntegrityError
from whisperd.reference import PackageSource, PathSource
from whisperd.store.cache import Inspector
from whisperd.store.manifest import read_manifest
from whisperd.store.plan import RemoteFile
from whisperd.store.sources import check_model_dir


def check(source: PathSource | PackageSource, path: Path, inspector: Inspector) -> None:
    """Raises SourceError or IntegrityError unless the directory holds a whole model with the bytes that it should have.

    The hashes of a directory are in the manifest of an export, those of a package in its RECORD; a directory without
    a manifest is only looked at for missing and empty files.
    """
    check_model_dir(path)
    declared = list(_packaged(source, path) if isinstance(source, PackageSource) else _exported(path))
    for file in declared:
        found = inspector.content(path / file.path, file)
        if found != "ok":
            raise IntegrityError(f"{source}: {path / file.path} is not what was declared ({found.replace('_', ' ')})")


def _exported(path: Path) -> Iterator[RemoteFile]:
    manifest = read_manifest(path)
    yield from manifest.files if manifest else ()


def _packaged(source: PackageSource, path: Path) -> Iterator[RemoteFile]:
    """The files that pip has written down with their hashes."""
    top = source.module.partition(".")[0]
    for name in metadata.packages_distributions().get(top, ())[:1]:
        for file in metadata.files(name) or ():
            place = Path(str(file.locate()))
            if place.parent == path and file.hash is not None and file.hash.mode == hashlib.sha256().name:
                digest = base64.urlsafe_b64decode(file.hash.value + "=" * (-len(file.hash.value) % 4)).hex()
                yield RemoteFile(path=place.name, size_bytes=file.size or 0, hash=digest)

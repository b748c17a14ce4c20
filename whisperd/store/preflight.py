"""Whether the cache can be worked on: owner, room, links, and one writer at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pwd
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from whisperd.errors import CacheBusy, CachePermissionError, StoreError
from whisperd.store.cache import OWN_DIR, used_bytes
from whisperd.store.hub import disk_error
from whisperd.store.plan import Room

MARGIN_BYTES = 64 << 20  # left free: the lock file, stamps, and whoever else writes there
MARGIN_INODES = 100
HOLDER_BYTES = 4096
NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ELOOP})  # ELOOP: mounted with nosymfollow


def room(cache_dir: Path, max_cache_bytes: int) -> Room:
    """What the disk of the cache, which may not exist yet, can take."""
    existing = next((path for path in (cache_dir, *cache_dir.parents) if path.is_dir()), None)
    if existing is None:
        return Room()
    found = os.statvfs(existing)
    return Room(
        free_bytes=found.f_bavail * found.f_frsize - MARGIN_BYTES,
        free_inodes=found.f_favail - MARGIN_INODES if found.f_files else None,
        quota_bytes=max_cache_bytes - used_bytes(cache_dir) if max_cache_bytes else None,
    )


def preflight(cache_dir: Path) -> None:
    """Refuses a cache that cannot be worked on, before the first byte; raises StoreError."""
    refuse_foreign(cache_dir)
    own = cache_dir / OWN_DIR
    try:
        own.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=own, prefix="probe-") as probe:
            (Path(probe) / "file").touch()
            (Path(probe) / "link").symlink_to("file")
            (Path(probe) / "link").stat()
    except OSError as error:
        if error.errno in NO_LINKS and own.is_dir() and os.access(own, os.W_OK):
            raise StoreError(
                f"{cache_dir}: this file system has no symbolic links, which the cache needs; choose another cache_dir"
            ) from error
        raise disk_error(error, cache_dir) from error


def refuse_foreign(cache_dir: Path) -> None:
    """Raises CachePermissionError for a cache of another user, who could do nothing with what is written there."""
    with suppress(FileNotFoundError, NotADirectoryError):
        owner = cache_dir.stat().st_uid
        if owner != os.geteuid():
            name = user_name(owner)
            raise CachePermissionError(
                f"{cache_dir} belongs to {name}, and this is {user_name(os.geteuid())}; "
                f"run it as the owner: sudo -u {name} whisperd reconcile"
            )


def become_owner(cache_dir: Path) -> None:
    """Root works on the cache of another user as that user. For the whole process, and for good."""
    if os.geteuid() != 0 or not cache_dir.is_dir() or (owner := cache_dir.stat()).st_uid == 0:
        return
    with suppress(KeyError):
        os.initgroups(pwd.getpwuid(owner.st_uid).pw_name, owner.st_gid)
    os.setgid(owner.st_gid)
    os.setuid(owner.st_uid)


def user_name(uid: int) -> str:
    """For messages and for sudo."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"#{uid}"


@contextmanager
def one_writer(cache_dir: Path) -> Iterator[None]:
    """Holds the lock on the cache; raises CacheBusy with the process that has it.

    The kernel lets go of it when the process ends, however it ends; it counts between containers too.
    """
    path = cache_dir / OWN_DIR / "lock"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise disk_error(error, path) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CacheBusy(
                f"another reconcile ({_holder(handle)}) works on {cache_dir}; try again when it is done"
            ) from error
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        yield
    finally:
        os.close(handle)


def _holder(handle: int) -> str:
    with suppress(ValueError, KeyError, TypeError):
        found = json.loads(os.pread(handle, HOLDER_BYTES, 0))
        return f"pid {found['pid']} on {found['host']}"
    return "a process that does not say its name"

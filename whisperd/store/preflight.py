"""Whether the cache can be worked on: owner, room, links, and one writer at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import pwd
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whisperd.errors import CacheBusy, CachePermissionError, Cancelled, StoreError
from whisperd.store.cache import OWN_DIR, used_bytes
from whisperd.store.hub import disk_error
from whisperd.store.names import inside
from whisperd.store.plan import Room

log = logging.getLogger(__name__)

MARGIN_BYTES = 64 << 20  # left free: the lock file, stamps, and whoever else writes there
MARGIN_INODES = 100
HOLDER_BYTES = 4096
HOST_CHARS = 64
STARTED_FIELD = 19  # of /proc/PID/stat behind the name
LOCK_POLL_S = 0.1
PUBLISH_EVERY_S = 1.0
# What flock says where nobody keeps locks: NFS without lockd, FUSE, old kernels.
NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who works on the cache, by its own words in the lock file; ``progress`` is what it last published."""

    pid: int
    host: str
    progress: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}"


class CacheLock:
    """The lock on a cache, held. The lock file says who holds it, and how far a download is."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._lock = threading.Lock()
        self._published_at_s = -PUBLISH_EVERY_S
        self.clear()

    def publish(self, progress: Mapping[str, Any]) -> None:
        """Lets those who wait for the lock see how far this process is; at most once a second."""
        now_s = time.monotonic()
        if now_s - self._published_at_s >= PUBLISH_EVERY_S:
            self._published_at_s = now_s
            self._write(progress)

    def clear(self) -> None:
        """Takes the progress back."""
        self._write(None)

    def _write(self, progress: Mapping[str, Any] | None) -> None:
        with self._lock:
            text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "progress": progress})
            with suppress(OSError):  # a full disk: the lock is held all the same
                os.ftruncate(self._handle, 0)
                os.pwrite(self._handle, text.encode()[:HOLDER_BYTES], 0)


@contextmanager
def one_writer(
    cache_dir: Path,
    *,
    patience_s: float = 0.0,
    cancel: threading.Event | None = None,
    on_wait: Callable[[Holder | None], None] = lambda _: None,
) -> Iterator[CacheLock]:
    """Holds the lock on the cache, so that one process at a time changes it.

    The kernel releases it when the process ends, however it ends; it counts between containers too. On a file system
    that has no locks, a file that only one process can make takes its place.

    Args:
        cache_dir: the cache.
        patience_s: how long to wait for a holder that makes no progress; 0 means not to wait.
        cancel: ends the waiting.
        on_wait: called about once a second with the holder, None where it cannot be known.

    Raises:
        CacheBusy: another process holds the lock.
        Cancelled: ``cancel`` was set.
    """
    path = inside(cache_dir, OWN_DIR, "lock")
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise disk_error(error, path) from error
    with ExitStack() as stack:
        stack.callback(os.close, handle)
        queue = _Queue(handle, cache_dir, patience_s, cancel or threading.Event(), on_wait)
        try:
            queue.wait(lambda: _try_flock(handle))
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise disk_error(error, path) from error
            log.warning("%s: this file system has no locks; a lock file with the name of its holder is used", cache_dir)
            substitute = inside(cache_dir, OWN_DIR, "lock.held")
            queue.wait(lambda: _try_file(substitute))
            stack.callback(substitute.unlink, missing_ok=True)
        lock = CacheLock(handle)
        try:
            yield lock
        finally:
            lock.clear()


class _Queue:
    """Waits for the holder of a lock, as long as it makes progress."""

    def __init__(
        self,
        handle: int,
        cache_dir: Path,
        patience_s: float,
        cancel: threading.Event,
        on_wait: Callable[[Holder | None], None],
    ) -> None:
        self._handle = handle
        self._cache_dir = cache_dir
        self._patience_s = patience_s
        self._cancel = cancel
        self._on_wait = on_wait

    def wait(self, try_lock: Callable[[], bool]) -> None:
        """Tries until it works; raises CacheBusy or Cancelled."""
        seen, since_s, told_at_s = _holder(self._handle), time.monotonic(), -PUBLISH_EVERY_S
        while not try_lock():
            holder, now_s = _holder(self._handle), time.monotonic()
            if holder != seen:
                seen, since_s = holder, now_s
            if now_s - since_s >= self._patience_s:
                raise CacheBusy(self._refusal(holder))
            if now_s - told_at_s >= PUBLISH_EVERY_S:
                told_at_s = now_s
                self._on_wait(holder)
            if self._cancel.wait(LOCK_POLL_S):
                raise Cancelled("cancelled while waiting for another reconcile")

    def _refusal(self, holder: Holder | None) -> str:
        name = holder or "a process that does not say its name"
        waited = f" and has made no progress for {self._patience_s:g} s" if self._patience_s else ""
        return f"another reconcile ({name}) works on {self._cache_dir}{waited}; try again when it is done"


def _try_flock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _try_file(path: Path) -> bool:
    """Makes a file that says who made it, unless there is one whose process still runs, or runs on another host."""
    owner = json.dumps([os.getpid(), socket.gethostname(), _started(os.getpid())])
    scratch = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    scratch.write_text(owner, encoding="utf-8")
    try:
        os.link(scratch, path)
    except FileExistsError:
        _remove_stale(path)
        return False
    finally:
        scratch.unlink(missing_ok=True)
    return True


def _remove_stale(path: Path) -> None:
    """Removes the file of a process of this host that has ended; another process may do the same at this moment."""
    with suppress(OSError, ValueError, TypeError):
        text = path.read_text(encoding="utf-8")
        pid, host, started = json.loads(text)
        if host != socket.gethostname() or _started(pid) == started:
            return
        aside = path.with_name(f"{path.name}.stale.{os.getpid()}.{threading.get_ident()}")
        path.rename(aside)
        if aside.read_text(encoding="utf-8") != text:  # not the one that was read: somebody holds it
            os.link(aside, path)
        aside.unlink()


def _started(pid: int) -> str:
    """When a process was started, in ticks since the boot; empty if it does not run. A pid may be used again."""
    with suppress(OSError, IndexError):
        return (
            Path(f"/proc/{int(pid)}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
        )
    return ""


def _holder(handle: int) -> Holder | None:
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        found = json.loads(os.pread(handle, HOLDER_BYTES, 0))
        progress = found.get("progress")
        return Holder(pid=int(found["pid"]), host=str(found["host"])[:HOST_CHARS], progress=progress)
    return None

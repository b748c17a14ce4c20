"""Unnamed files that hold uploads, under one budget. Used on the event loop only."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Self

from whisperd.errors import FileTooLarge, SpoolFull

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
RETRY_AFTER_S = 5.0


class Spool:
    """The directory of uploads that are being read or transcribed.

    Args:
        directory: on a disk; a tmpfs would keep the uploads in memory.
        upload_bytes: the largest single file.
        budget_bytes: the most that all open files may hold together.
    """

    def __init__(self, directory: Path, *, upload_bytes: int, budget_bytes: int) -> None:
        self.directory = directory
        self.upload_bytes = upload_bytes
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self.open_files = 0

    def problem(self) -> str | None:
        """What is wrong with the directory now, so that no upload can be taken; None if nothing is."""
        try:
            number = 0 if shutil.disk_usage(self.directory).free else errno.ENOSPC
        except OSError as error:
            return str(_translated(error, self.directory))
        if not os.access(self.directory, os.W_OK | os.X_OK):
            number = errno.EACCES
        return str(_translated(OSError(number, os.strerror(number)), self.directory)) if number else None

    def refuse_length(self, length_bytes: int) -> None:
        """Raises FileTooLarge when a file of this size would be refused anyway."""
        if length_bytes > self.upload_bytes:
            raise FileTooLarge(
                f"the upload has {length_bytes} bytes or more, at most {self.upload_bytes} are accepted "
                "(limits.upload_bytes); send compressed audio or cut it",
                param="file",
            )

    def refuse_announced(self, length_bytes: int) -> None:
        """Raises FileTooLarge or SpoolFull when a file of at least this size cannot be taken now."""
        self.refuse_length(length_bytes)
        self.refuse_more(length_bytes)
        try:
            free_bytes = shutil.disk_usage(self.directory).free
        except OSError as error:
            raise _translated(error, self.directory) from error
        if free_bytes < length_bytes:
            raise SpoolFull(
                f"the upload has {length_bytes} bytes or more, and the spool directory {self.directory} has room for "
                f"{free_bytes}",
                retry_after_s=RETRY_AFTER_S,
            )

    def refuse_more(self, n_bytes: int) -> None:
        """Raises SpoolFull when so much more would be over the budget."""
        if self.used_bytes + n_bytes > self.budget_bytes:
            raise SpoolFull(
                f"uploads in flight fill the spool of {self.budget_bytes} bytes (limits.spool_bytes)",
                retry_after_s=RETRY_AFTER_S,
            )

    def create(self) -> SpoolFile:
        """A new file without a name; raises SpoolFull when the disk has no room for one."""
        try:
            return SpoolFile(self, tempfile.TemporaryFile(dir=self.directory))
        except OSError as error:
            raise _translated(error, self.directory) from error


class SpoolFile:
    """One upload on disk, at once without a name: whatever happens to the process, nothing stays behind."""

    def __init__(self, spool: Spool, file: BinaryIO) -> None:
        self._spool = spool
        self._file = file
        self.size_bytes = 0
        spool.open_files += 1

    def write(self, data: bytes | memoryview) -> None:
        """Appends; raises FileTooLarge or SpoolFull, the latter for the budget as well as for the disk."""
        spool = self._spool
        spool.refuse_length(self.size_bytes + len(data))
        spool.refuse_more(len(data))
        self.size_bytes += len(data)
        spool.used_bytes += len(data)
        try:
            self._file.write(data)
        except OSError as error:
            raise _translated(error, spool.directory) from error

    def rewound(self) -> BinaryIO:
        """The file, to be read from its beginning."""
        try:
            self._file.seek(0)  # writes what is still buffered
        except OSError as error:
            raise _translated(error, self._spool.directory) from error
        return self._file

    def close(self) -> None:
        """Gives the bytes back. May be called again."""
        if self._file.closed:
            return
        self._spool.used_bytes -= self.size_bytes
        self._spool.open_files -= 1
        with suppress(OSError):  # buffered bytes that find no room on a full disk; the file goes away now
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _translated(error: OSError, directory: Path) -> SpoolFull:
    cause = "has no room left" if error.errno in NO_ROOM else f"cannot be written ({error.strerror})"
    return SpoolFull(f"the spool directory {directory} {cause}", retry_after_s=RETRY_AFTER_S)

"""Files that are written whole or not at all, and small files that are read with a bound."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

STATUS = Path("/proc/self/status")
USUAL_UMASK = 0o022
DEV_NULL = os.makedev(1, 3)


def write_atomically(path: Path, text: str, scratch_dir: Path | None = None) -> None:
    """Writes a text file in UTF-8 so that readers see the old file or the new one, also after a power cut.

    Makes missing directories. The mode follows from the umask, as if the file had been opened for writing. Raises
    OSError; then the old file is unchanged and no other file is left behind.

    The new file is first written to ``scratch_dir``, an existing directory on the same disk; None means beside the old
    one, where a process that is killed leaves it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=scratch_dir or path.parent, prefix=f".{path.name}.")
    scratch = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.chmod(0o666 & ~umask())
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def read_small(path: Path, max_bytes: int) -> bytes:
    """Reads a regular file of at most ``max_bytes``; /dev/null is empty.

    Raises OSError for anything else: a FIFO would wait for its writer, and a device may have no end.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with os.fdopen(handle, "rb", buffering=0) as file:
        found = os.fstat(handle)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(found.st_mode) and not (stat.S_ISCHR(found.st_mode) and found.st_rdev == DEV_NULL):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        data = b""
        while len(data) <= max_bytes and (chunk := file.read(max_bytes + 1 - len(data))):
            data += chunk
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"it is larger than {max_bytes} bytes", str(path))
    return data


def umask() -> int:
    """Reads the umask of this process. ``os.umask`` would set it, for all threads, and set it back."""
    with suppress(OSError), STATUS.open(encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return USUAL_UMASK

"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

STATUS = Path("/proc/self/status")
USUAL_UMASK = 0o022


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file in UTF-8 so that readers see the old file or the new one, also after a power cut.

    Makes missing directories. The mode follows from the umask, as if the file had been opened for writing. Raises
    OSError; then the old file is unchanged and no other file is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
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


def umask() -> int:
    """Reads the umask of this process. ``os.umask`` would set it, for all threads, and set it back."""
    with suppress(OSError), STATUS.open(encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return USUAL_UMASK

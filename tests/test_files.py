"""Files are written whole or not at all, with the mode that the umask asks for."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from whisperd import files
from whisperd.files import read_small, umask, write_atomically

# 8 threads write while one reads the umask of the process from outside, as the kernel reports it.
THREADS = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from whisperd.files import STATUS, umask, write_atomically
os.umask(0o077)
def masks():
    return {line for line in STATUS.read_text().splitlines() if line.startswith("Umask")}
with ThreadPoolExecutor(9) as pool:
    seen = pool.submit(lambda: set().union(*(masks() for _ in range(2000))))
    list(pool.map(lambda n: write_atomically(Path(sys.argv[1], f"{n}"), "text"), range(200)))
    print(sorted(seen.result()))
"""


def test_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    """A file is replaced, missing directories are made, and nothing else is left."""
    path = tmp_path / "a/b/file"
    write_atomically(path, "old")
    write_atomically(path, "né")
    assert path.read_text(encoding="utf-8") == "né"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_a_failure_changes_nothing(tmp_path: Path) -> None:
    """Text that cannot be encoded, or a target that is a directory, changes nothing and leaves no scratch file."""
    path = tmp_path / "file"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\udc80")
    (tmp_path / "directory").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path / "directory", "text")
    assert path.read_text(encoding="utf-8") == "old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["directory", "file"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o027, 0])
def test_the_mode_follows_from_the_umask(mask: int, tmp_path: Path) -> None:
    """A new file has the mode that ``open`` would give it."""
    before = os.umask(mask)
    try:
        assert umask() == mask
        write_atomically(tmp_path / "written", "text")
        (tmp_path / "opened").touch()
    finally:
        os.umask(before)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("written", "opened")}
    assert modes == {0o666 & ~mask}


def test_threads_do_not_change_the_umask(tmp_path: Path) -> None:
    """While threads write, the umask of the process never differs, and no file is readable by others under 077."""
    done = subprocess.run(
        [sys.executable, "-c", THREADS, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == r"['Umask:\t0077']"
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


def test_without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the kernel does not report the umask, the usual one is used."""
    monkeypatch.setattr(files, "STATUS", tmp_path / "nothing")
    assert umask() == 0o022


def test_many_writers_of_one_file(tmp_path: Path) -> None:
    """The file is whole, with the content of the last writer."""
    texts = [str(n) * 10_000 for n in range(10)]
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(lambda text: write_atomically(tmp_path / "file", text), texts))
    assert (tmp_path / "file").read_text(encoding="utf-8") in texts


def test_a_small_file_is_read_with_a_bound(tmp_path: Path) -> None:
    """A regular file up to the bound is read, /dev/null as empty; nothing larger, and nothing that could block."""
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    os.mkfifo(tmp_path / "fifo")
    assert (read_small(path, 5), read_small(Path("/dev/null"), 5)) == (b"12345", b"")
    with pytest.raises(OSError, match="it is larger than 4 bytes"):
        read_small(path, 4)
    with pytest.raises(IsADirectoryError):
        read_small(tmp_path, 5)
    for special in (tmp_path / "fifo", Path("/dev/zero"), Path("/dev/tty")):
        with pytest.raises(OSError, match=r"no regular file|No such device"):
            read_small(special, 5)

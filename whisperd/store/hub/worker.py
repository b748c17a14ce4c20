"""The process that talks to the Hub: one job in on stdin, JSON lines out on stdout. Home of huggingface_hub.

It ends when its stdin is closed, so that it never outlives whoever asked.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TextIO, TypeVar

from whisperd.store.hub.failures import RETRIED, Subject, classify, describe, is_nonsense, retry_after_s
from whisperd.version import VERSION

TRIES = {"resolve": 4, "fetch": 3}  # without any progress between them
WAIT_MAX_S = 30.0  # whatever a server asks for
FILES_AT_ONCE = 4
CHUNK_BYTES = 1 << 20  # what a dying link loses: the library's own 10 MiB never get through one that dies earlier

Job = Mapping[str, Any]
Done = TypeVar("Done")


class Reporter:
    """Writes events, from any thread."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._lock = threading.Lock()

    def tell(self, event: str, **values: object) -> None:
        """One line."""
        with self._lock:
            self._out.write(json.dumps({"event": event, **values}) + "\n")
            self._out.flush()


def main() -> None:
    """Does one job. Its outcome, good or bad, is the last event."""
    job: Job = json.loads(sys.stdin.readline())
    reporter = Reporter(sys.stdout)
    sys.stdout = sys.stderr  # whatever a library prints must not look like an event
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.environ.update(job["environment"])
    try:
        done = JOBS[job["do"]](job, reporter)
    except Exception as error:
        subject = Subject(repo=job["repo"], revision=job["revision"], endpoint=job["endpoint"])
        kind = classify(error)
        reporter.tell("error", kind=kind.__name__, message=str(subject.error(kind, describe(error, job["token"]))))
    else:
        reporter.tell("done", **done)


def _persistently(job: Job, do: Callable[[], Done], reporter: Reporter, size_bytes: Callable[[], int]) -> Done:
    """Does it until it works, or fails too often in a row without any byte more, or in a way that stays."""
    failures = 0
    while True:
        before_bytes = size_bytes()
        try:
            return do()
        except Exception as error:
            failures = 1 if size_bytes() > before_bytes else failures + 1
            if failures >= TRIES[job["do"]] or not issubclass(classify(error), RETRIED):
                raise
            wait_s = min(max(retry_after_s(error) or 0.0, job["retry_wait_s"] * 2 ** (failures - 1)), WAIT_MAX_S)
            reporter.tell("retry", wait_s=wait_s)
            time.sleep(wait_s)


def _resolve(job: Job, reporter: Reporter) -> dict[str, object]:
    """One request: the commit, and size and hash of each of its files."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=job["endpoint"], token=job["token"] or False)

    def ask() -> dict[str, object]:
        info = api.model_info(job["repo"], revision=job["revision"], files_metadata=True, timeout=job["timeout_s"])
        files = [
            {
                "path": file.rfilename,
                "size_bytes": file.size,
                "hash": file.lfs.sha256 if file.lfs is not None else file.blob_id,
            }
            for file in info.siblings or ()
        ]
        if info.sha is None or not all(file["hash"] and file["size_bytes"] is not None for file in files):
            raise ConnectionError("the answer names no commit, or files without size and hash: this is no Hub")
        return {"commit": info.sha, "files": files}

    return _persistently(job, ask, reporter, lambda: 0)


def _fetch(job: Job, reporter: Reporter) -> dict[str, object]:
    """Exactly the named files of one commit, each into a file with the name of its hash.

    The first file that cannot be fetched ends the job: what the others have by then is kept for the next time.
    """
    from huggingface_hub import constants

    constants.DOWNLOAD_CHUNK_SIZE = CHUNK_BYTES
    pool = ThreadPoolExecutor(FILES_AT_ONCE)
    for future in as_completed([pool.submit(_fetch_file, job, file, reporter) for file in job["files"]]):
        future.result()
    return {}


def _fetch_file(job: Job, file: Mapping[str, Any], reporter: Reporter) -> None:
    part = Path(job["directory"], file["hash"])
    part.touch()

    def get() -> None:
        try:
            _get(job, file, part)
        except Exception as error:
            if is_nonsense(error):
                os.truncate(part, 0)  # more of the same would not make it whole
            raise

    _persistently(job, get, reporter, lambda: part.stat().st_size)


def _get(job: Job, file: Mapping[str, Any], part: Path) -> None:
    """The rest of a file over plain HTTP, from where it ends.

    Not by the library's own download: that begins anew each time, and xet cannot be resumed and is known to hang.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined] # exported lazily

    have_bytes, size_bytes = part.stat().st_size, file["size_bytes"]
    if have_bytes > size_bytes:
        os.truncate(part, 0)
        have_bytes = 0
    if have_bytes == size_bytes:
        return
    with part.open("ab") as out:
        http_get(
            hf_hub_url(job["repo"], file["path"], revision=job["commit"], endpoint=job["endpoint"]),
            out,
            resume_size=have_bytes,
            headers=build_hf_headers(token=job["token"] or False, library_name="whisperd", library_version=VERSION),
            expected_size=size_bytes,
        )


JOBS: Mapping[str, Callable[[Job, Reporter], dict[str, object]]] = {"resolve": _resolve, "fetch": _fetch}


def _die_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)

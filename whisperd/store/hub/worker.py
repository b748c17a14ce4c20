"""The process that talks to the Hub: one job in on stdin, JSON lines out on stdout. Home of huggingface_hub.

It ends when its stdin is closed, so that it never outlives the process that started it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO, TypeVar

from whisperd.errors import IntegrityError, StoreError
from whisperd.store.hub.failures import (
    RETRIED,
    Subject,
    classify,
    describe,
    is_nonsense,
    is_timeout,
    retry_after_s,
)
from whisperd.store.hub.transfer import Part, Remote
from whisperd.store.names import inside
from whisperd.store.plan import RemoteFile, select_files
from whisperd.store.schema import JSON_BYTES, RevisionAnswer, check_consistent, parsed
from whisperd.store.sources import HEAD_BYTES, Read

TRIES = {"resolve": 4, "fetch": 3}  # without any progress between them
WAIT_MAX_S = 30.0  # whatever a server asks for
FILES_AT_ONCE = 4

Job = Mapping[str, Any]
Done = TypeVar("Done")


class Reporter:
    """Writes events, from any thread."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._lock = threading.Lock()

    def tell(self, event: str, **values: object) -> None:
        """Writes one line."""
        with self._lock:
            self._out.write(json.dumps({"event": event, **values}) + "\n")
            self._out.flush()


def main() -> None:
    """Does one job. Its outcome, good or bad, is the last event."""
    job: Job = json.loads(sys.stdin.readline())
    reporter = Reporter(sys.stdout)
    sys.stdout = sys.stderr  # whatever a library prints must not look like an event
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(job["environment"])
    try:
        done = JOBS[job["do"]](job, reporter)
    except Exception as error:
        subject = Subject(repo=job["repo"], revision=job["revision"], endpoint=job["endpoint"])
        kind = classify(error)
        told = subject.error(kind, describe(error, job["token"]))
        found = subject.own(error) if isinstance(error, StoreError) else told
        reporter.tell("error", kind=kind.__name__, message=str(found))
    else:
        reporter.tell("done", **done)


def _persistently(job: Job, do: Callable[[], Done], reporter: Reporter, size_bytes: Callable[[], int]) -> Done:
    """Does it until it works, fails too often in a row without any byte more, or fails in a way that stays.

    A download that stands still is tried again as long as the parent process waits: it alone knows the rule.
    """
    failures = 0
    while True:
        before_bytes = size_bytes()
        try:
            return do()
        except Exception as error:
            if not (job["do"] == "fetch" and is_timeout(error)):
                failures = 1 if size_bytes() > before_bytes else failures + 1
            if failures >= TRIES[job["do"]] or not issubclass(classify(error), RETRIED):
                raise
            wait_s = min(max(retry_after_s(error) or 0.0, job["retry_wait_s"] * 2 ** (failures - 1)), WAIT_MAX_S)
            reporter.tell("retry", wait_s=wait_s)
            time.sleep(wait_s)


def _resolve(job: Job, reporter: Reporter) -> dict[str, object]:
    """Asks for the commit with size and hash of each file; returns those that an engine needs.

    One request; one more for the index of sharded weights, and for the first bytes of a model.bin that may be of
    another format.
    """
    remote = _remote(job)

    def ask() -> dict[str, object]:
        reporter.tell("ready")  # each try has the whole time
        answer = _revision(remote, job["revision"])
        files = select_files(answer.files, _reader(remote, answer.sha, answer.files))
        return {"commit": answer.sha, "files": [asdict(file) for file in files], "repo": answer.id}

    return _persistently(job, ask, reporter, lambda: 0)


def _revision(remote: Remote, revision: str) -> RevisionAnswer:
    """What the Hub says of a revision; raises ConnectionError if that is no answer of a Hub."""
    try:
        answer = parsed(RevisionAnswer, remote.get(remote.revision_url(revision), JSON_BYTES))
        check_consistent(answer.files)
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise ConnectionError(f"this is no answer of a Hub: {error}") from None
    return answer


def _reader(remote: Remote, commit: str, files: Sequence[RemoteFile]) -> Read:
    """Reads the beginning of a small file; a whole one is compared with its hash."""
    by_path = {file.path: file for file in files}

    def read(name: str, n_bytes: int) -> bytes:
        url, file = remote.file_url(commit, name), by_path[name]
        if n_bytes <= HEAD_BYTES:
            return remote.get_head(url, n_bytes)
        data = remote.get(url, n_bytes)
        kind = hashlib.sha256(data) if len(file.hash) == 64 else hashlib.sha1(b"blob %d\0" % len(data) + data)  # noqa: S324
        if kind.hexdigest() != file.hash:
            raise IntegrityError(f"{name} came with wrong bytes: expected {file.hash}, got {kind.hexdigest()}")
        return data

    return read


def _fetch(job: Job, reporter: Reporter) -> dict[str, object]:
    """Fetches exactly the given contents, each into a file with the name of its hash.

    The first one that cannot be fetched ends the job: what the others have by then is kept for the next time.
    """
    remote = _remote(job)
    reporter.tell("ready")
    pool = ThreadPoolExecutor(FILES_AT_ONCE)
    for future in as_completed([pool.submit(_fetch_file, job, remote, file, reporter) for file in job["files"]]):
        future.result()
    return {}


def _fetch_file(job: Job, remote: Remote, file: Mapping[str, Any], reporter: Reporter) -> None:
    part = Part(inside(Path(job["directory"]), file["hash"]))

    def get() -> None:
        if part.size_bytes > file["size_bytes"]:
            part.truncate()
        if part.size_bytes == file["size_bytes"]:
            return
        try:
            remote.append_rest(remote.file_url(job["commit"], file["path"]), part, file["size_bytes"])
        except Exception as error:
            if is_nonsense(error):
                part.truncate()  # more of the same would not make it whole
            raise

    try:
        _persistently(job, get, reporter, lambda: part.size_bytes)
    finally:
        part.close()


def _remote(job: Job) -> Remote:
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined] # exported lazily

    get_session()  # reads certificates and takes its time; what follows is measured
    return Remote(endpoint=job["endpoint"], repo=job["repo"], token=job["token"], timeout_s=job["timeout_s"])


JOBS: Mapping[str, Callable[[Job, Reporter], dict[str, object]]] = {"resolve": _resolve, "fetch": _fetch}


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)

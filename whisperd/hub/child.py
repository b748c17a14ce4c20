"""The process that talks to the Hub: one job in on stdin, JSON lines out on stdout. Home of huggingface_hub.

It ends when its stdin is closed, so that it never outlives whoever asked.
"""

from __future__ import annotations

import glob
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from whisperd.hub.failures import RETRIED, Subject, classify, describe, retry_after_s

TRIES = {"resolve": 4, "fetch": 2}  # of a fetch only the second: the library tries most things again by itself
WAITS_S = (1.0, 2.0, 4.0)
WAIT_MAX_S = 30.0  # whatever a server asks for
PROGRESS_EVERY_S = 0.2
FILES_AT_ONCE = 4

Job = Mapping[str, Any]


class Reporter:
    """Writes events, from any thread."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._lock = threading.Lock()
        self._fetched_bytes = 0
        self._told_at_s = 0.0

    def tell(self, event: str, **values: object) -> None:
        """One line."""
        with self._lock:
            self._write(event, values)

    def count(self, n_bytes: int) -> None:
        """Adds bytes that have arrived; tells now and then."""
        with self._lock:
            self._fetched_bytes += n_bytes
            now_s = time.monotonic()
            if now_s - self._told_at_s >= PROGRESS_EVERY_S:
                self._told_at_s = now_s
                self._write("progress", {"bytes": self._fetched_bytes})

    def _write(self, event: str, values: Mapping[str, object]) -> None:
        self._out.write(json.dumps({"event": event, **values}) + "\n")
        self._out.flush()


def main() -> None:
    """Does one job. Its outcome, good or bad, is the last event."""
    job: Job = json.loads(sys.stdin.readline())
    reporter = Reporter(sys.stdout)
    sys.stdout = sys.stderr  # whatever a library prints must not look like an event
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.environ.update(job["environment"])
    tries = TRIES[job["do"]]
    for attempt in range(tries):
        try:
            done = JOBS[job["do"]](job, reporter)
        except Exception as error:
            kind = classify(error)
            if not issubclass(kind, RETRIED) or attempt == tries - 1:
                _report(job, error, reporter)
                return
            _without_xet(error)
            time.sleep(_wait_s(error, attempt, reporter))
        else:
            reporter.tell("done", **done)
            return


def _without_xet(error: Exception) -> None:
    """What xet raises is a bare RuntimeError; the next try goes over plain HTTP."""
    if isinstance(error, RuntimeError):
        from huggingface_hub import constants

        constants.HF_HUB_DISABLE_XET = True


def _wait_s(error: Exception, attempt: int, reporter: Reporter) -> float:
    wait_s = min(max(retry_after_s(error) or 0.0, WAITS_S[attempt]), WAIT_MAX_S)
    reporter.tell("retry", wait_s=wait_s)
    return wait_s


def _report(job: Job, error: Exception, reporter: Reporter) -> None:
    subject = Subject(repo=job["repo"], revision=job["revision"], endpoint=job["endpoint"])
    kind = classify(error)
    reporter.tell("error", kind=kind.__name__, message=str(subject.error(kind, describe(error, job["token"]))))


def _resolve(job: Job, _: Reporter) -> dict[str, object]:
    """One request: the commit, and size and hash of each of its files."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=job["endpoint"], token=job["token"] or False)
    info = api.model_info(job["repo"], revision=job["revision"], files_metadata=True, timeout=job["timeout_s"])
    files = [
        {
            "path": file.rfilename,
            "size_bytes": file.size,
            "hash": file.lfs.sha256 if file.lfs is not None else file.blob_id,
        }
        for file in info.siblings or ()
    ]
    return {"commit": info.sha, "files": files}


def _fetch(job: Job, reporter: Reporter) -> dict[str, object]:
    """Exactly the named files of one commit."""
    from huggingface_hub import snapshot_download
    from tqdm.auto import tqdm

    class Counter(tqdm):  # type: ignore[type-arg]
        """A bar that nobody sees: it only counts the bytes that come over the wire."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts = kwargs.get("unit") == "B" and "econstruct" not in str(kwargs.get("desc"))
            super().__init__(*args, **(kwargs | {"file": nowhere, "disable": False}))

        def update(self, n: float | None = 1) -> bool | None:
            if self._counts and n:
                reporter.count(int(n))
            return super().update(n)

    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        snapshot_download(
            job["repo"],
            revision=job["commit"],
            allow_patterns=[glob.escape(path) for path in job["files"]],
            cache_dir=job["cache_dir"],
            endpoint=job["endpoint"],
            token=job["token"] or False,
            etag_timeout=job["timeout_s"],
            max_workers=FILES_AT_ONCE,
            tqdm_class=Counter,
        )
    return {}


JOBS: Mapping[str, Callable[[Job, Reporter], dict[str, object]]] = {"resolve": _resolve, "fetch": _fetch}


def _die_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()

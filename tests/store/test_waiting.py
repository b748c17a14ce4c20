"""The limits of waits: for another reconcile on the same cache, and for a slow download."""

from __future__ import annotations

import threading
from dataclasses import asdict, replace

import pytest

from tests.support.loopback_hub import LoopbackHub, whisper_files
from tests.support.store import NAME, run, wanted
from tests.support.wait import until
from whisperd import errors
from whisperd.store.hub.process import START_S, Pace, Stalled, Watch
from whisperd.store.preflight import Holder, one_writer, preflight
from whisperd.store.progress import Amount, Progress, progress_from
from whisperd.store.reconcile import reconcile
from whisperd.store.report import Report
from whisperd.store.settings import Settings

MIB = 1 << 20
SOME = Progress(
    name="m", model=Amount(done_bytes=1, total_bytes=3), run=Amount(done_bytes=1, total_bytes=3, bytes_per_s=2.5)
)


def test_two_reconciles_of_a_cold_cache(hub: LoopbackHub, settings: Settings) -> None:
    """The second waits, shows the first one's progress, and finds everything done."""
    hub.add(NAME, whisper_files(1, size_bytes=2 * MIB))
    hub.fault("GET /cdn/", rate_bytes_per_s=MIB / 2)
    first: list[Report] = []
    worker = threading.Thread(target=lambda: first.append(run(settings)))
    worker.start()
    until(lambda: any("/cdn/" in request for request in hub.requests))
    told: list[str] = []
    seen: list[Progress] = []
    second = reconcile(
        wanted(NAME), replace(settings, lock_timeout_s=60.0), on_wait=told.append, on_progress=seen.append
    )
    worker.join()
    assert [report.results[0].outcome for report in (*first, second)] == ["downloaded", "ok"]
    assert ("waiting for another reconcile (pid " in told[0], len(told)) == (True, 1)
    assert seen[0].name == NAME
    assert sum("/cdn/" in request for request in hub.requests) == 1


def test_waiting_has_an_end(settings: Settings) -> None:
    """A holder without progress is waited for up to the limit; one with progress, for longer."""
    preflight(settings.cache_dir)
    with one_writer(settings.cache_dir) as lock:
        with (
            pytest.raises(errors.CacheBusy, match=r"has made no progress for 0\.3 s"),
            one_writer(settings.cache_dir, patience_s=0.3),
        ):
            pass
        holders: list[Holder | None] = []

        def on_wait(holder: Holder | None) -> None:
            holders.append(holder)
            if len(holders) <= 2:
                lock.publish(asdict(SOME) | {"n_models": len(holders)})

        with (
            pytest.raises(errors.CacheBusy),
            one_writer(settings.cache_dir, patience_s=1.5, on_wait=on_wait),
        ):
            pass
    assert len(holders) > 2
    assert holders[-1] is not None
    assert progress_from(holders[-1].progress) is not None


def test_waiting_can_be_cancelled(settings: Settings) -> None:
    """Ctrl-C ends the waiting."""
    preflight(settings.cache_dir)
    cancel = threading.Event()
    with (
        one_writer(settings.cache_dir),
        pytest.raises(errors.Cancelled),
        one_writer(settings.cache_dir, patience_s=60.0, cancel=cancel, on_wait=lambda _: cancel.set()),
    ):
        pass


@pytest.mark.parametrize("text", ["", "[", "[" * 5000, "7", '{"pid": []}', '{"pid": 1}', '{"pid": 1, "host": "h"}'])
def test_a_lock_file_of_nonsense(settings: Settings, text: str) -> None:
    """Nonsense in the lock file, which is for readers, does not prevent a lock."""
    preflight(settings.cache_dir)
    path = settings.cache_dir / ".whisperd/lock"
    path.write_text(text)
    with one_writer(settings.cache_dir):
        path.write_text(text)
        with pytest.raises(errors.CacheBusy, match="another reconcile"), one_writer(settings.cache_dir):
            pass


@pytest.mark.parametrize("value", [None, 7, {}, {"name": "m", "n_models": 1, "model": {}, "run": {}}, {"name": 1}])
def test_progress_of_nonsense(value: object) -> None:
    """Progress that another process has published is shown only if it is valid."""
    assert progress_from(value) is None


class Download:
    """A download with a clock of its own."""

    def __init__(self, window_s: float, min_bytes: float) -> None:
        self.now_s, self.size_bytes = 0.0, 0
        pace = Pace(window_s=window_s, min_bytes=min_bytes)
        self.watch = Watch(pace, threading.Event(), lambda: self.size_bytes, lambda: self.now_s)
        self.watch.restart()

    def go_on(self, seconds: int, bytes_per_s: float) -> None:
        for _ in range(seconds):
            self.now_s += 1
            self.size_bytes += round(bytes_per_s)
            self.watch.look()


@pytest.mark.parametrize("bytes_per_s", [1000, 1001, 50_000])
def test_a_slow_download_goes_on(bytes_per_s: int) -> None:
    """At the smallest sufficient rate a download may take any time."""
    Download(60, 60_000).go_on(10_000, bytes_per_s)


@pytest.mark.parametrize("bytes_per_s", [0, 1, 900])
def test_a_download_that_is_too_slow(bytes_per_s: int) -> None:
    """Below that rate a download fails, but not before the time limit, even though bytes arrive."""
    download = Download(60, 60_000)
    download.go_on(60, bytes_per_s)
    with pytest.raises(Stalled):
        download.go_on(2, bytes_per_s)


def test_bursts_count_on_average() -> None:
    """A link with bursts and pauses is fast enough on average."""
    download = Download(60, 60_000)
    for _ in range(10):
        download.go_on(50, 0)
        download.go_on(1, 100_000)


def test_a_part_that_begins_anew() -> None:
    """Discarded bytes do not count, and the same bytes fetched again do."""
    download = Download(10, 1000)
    download.go_on(1, 5000)
    download.size_bytes = 0
    download.go_on(9, 0)
    download.go_on(1, 1000)
    download.go_on(10, 0)
    with pytest.raises(Stalled):
        download.go_on(1, 0)


def test_what_does_not_count_as_slow() -> None:
    """The start of the process and a wait that the Hub has asked for do not count as slow."""
    download = Download(10, 1000)
    download.watch.allow(30)
    download.go_on(40, 0)
    watch = Watch(Pace(window_s=10), threading.Event(), lambda: 0, lambda: clock[0])
    clock[0] = START_S + 10
    watch.look()


clock = [0.0]

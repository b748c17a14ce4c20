"""The bytes of a file come wrong, late, in pieces or not at all, and wrong ones are never accepted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.loopback_hub import Fault, HubRepo, LoopbackHub, serving, whisper_files
from tests.support.store import (
    FOLDER,
    NAME,
    assert_told,
    assert_well,
    copy_cache,
    error,
    offline,
    plain,
    run,
    store_settings,
    tree,
    wanted,
)
from whisperd import errors
from whisperd.store.reconcile import Result, reconcile
from whisperd.store.report import plan_lines
from whisperd.store.settings import Settings

MIB = 1 << 20
ODD_BYTES = 3 * MIB + 5
PAGE = b"<html>Our proxy has scanned this file.</html>"
LFS, GIT = "GET /cdn/", "GET .*/resolve/.*/config.json"


def new_files() -> dict[str, bytes]:
    return whisper_files(2, size_bytes=ODD_BYTES)


PASSING = {
    "cut once late": [Fault(match=LFS, times=1, cut_at=5 * MIB // 2)],
    "cut once early": [Fault(match=LFS, times=1, cut_at=MIB // 2)],
    "cut again and again, after 1.5 MiB each": [Fault(match=LFS, cut_at=3 * MIB // 2)],
    "reset in the middle once": [Fault(match=LFS, times=1, cut_at=3 * MIB // 2, reset=True)],
    "cut once, then Range is ignored": [Fault(match=LFS, times=1, cut_at=2 * MIB), Fault(match=LFS, ignore_range=True)],
    "stalled once": [Fault(match=LFS, times=1, stall_at=3 * MIB // 2)],
    "wrong bytes of the right length once": [Fault(match=LFS, times=1, corrupt=True)],
    "wrong bytes in a small file once": [Fault(match=GIT, times=1, corrupt=True)],
    "Content-Length too large": [Fault(match=LFS, more_bytes=1000)],
    "shorter body with consistent length once": [Fault(match=LFS, times=1, replace=b"short")],
    "longer body with consistent length once": [Fault(match=LFS, times=1, replace=b"x" * (ODD_BYTES + 1))],
    "HTML page once": [Fault(match=GIT, times=1, replace=PAGE)],
    "CDN 403 once, the signature has run out": [Fault(match=LFS, times=1, status=403)],
    "CDN 404 once": [Fault(match=LFS, times=1, status=404)],
}


@pytest.mark.parametrize("faults", PASSING.values(), ids=PASSING)
@pytest.mark.usefixtures("filled")
def test_a_bad_moment(hub: LoopbackHub, repo: HubRepo, settings: Settings, faults: list[Fault]) -> None:
    """A temporary fault is corrected in the same run, and the bytes are right in the end."""
    repo.commit(new_files())
    hub.faults = [replace(fault) for fault in faults]
    assert_well(run(replace(settings, update=True, stall_timeout_s=6.0)), settings, new_files())
    assert not any(fault.times for fault in hub.faults)


LASTING = {
    "wrong bytes of the right length": (Fault(match=LFS, corrupt=True), errors.IntegrityError, "model.bin came with"),
    "wrong bytes in a small file": (Fault(match=GIT, corrupt=True), errors.IntegrityError, "config.json came with"),
    "shorter body with consistent length": (
        Fault(match=LFS, replace=b"short"), errors.HubUnreachable, "should be of size 3145733 but has size 5",
    ),
    "HTML page instead of a file": (Fault(match=GIT, replace=PAGE), errors.HubUnreachable, "should be of size"),
    "500": (Fault(match=LFS, status=500), errors.HubServerError, "500"),
    "CDN 403": (Fault(match=LFS, status=403), errors.HubServerError, "403"),
    "CDN 404": (Fault(match=LFS, status=404), errors.HubServerError, "404"),
    "reset": (Fault(match=LFS, reset=True), errors.HubUnreachable, "ReadError"),
    "stalled": (Fault(match=LFS, stall_at=0), errors.HubUnreachable, "fewer than 1.0 kB/s came for 4 s"),
}  # fmt: skip


@pytest.mark.parametrize(("fault", "kind", "cause"), LASTING.values(), ids=LASTING)
def test_a_lasting_fault(
    hub: LoopbackHub, repo: HubRepo, settings: Settings, filled: Path,
    fault: Fault, kind: type[errors.StoreError], cause: str,
) -> None:  # fmt: skip
    """The run fails with the reason; branch, snapshot and every blob are unchanged; the next run repairs it."""
    before = tree(settings.cache_dir / FOLDER)
    repo.commit(new_files())
    hub.faults = [replace(fault)]
    report = run(replace(settings, update=True, stall_timeout_s=4.0))
    assert (report.exit_code, type(error(report)), report.results[0].path) == (1, kind, filled), error(report)
    assert_told(str(error(report)), kind, cause, settings)
    assert tree(settings.cache_dir / FOLDER) == before
    assert offline(settings) == {NAME: filled}
    hub.faults.clear()
    assert_well(run(replace(settings, update=True)), settings, new_files())


SLOW: Mapping[str, tuple[dict[str, Any], type[errors.StoreError], str]] = {
    "cut always at 0": ({"cut_at": 0}, errors.HubUnreachable, "RemoteProtocolError"),
    "429 for ever": ({"status": 429, "headers": {"Retry-After": "0"}}, errors.HubRateLimited, "429"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Slow:
    failed: Mapping[str, Result]
    healed: Mapping[str, Result]


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Slow:
    """The faults that the library itself retries for long: a model for each, all at once; and without them."""
    names = {f"org/m{number}": row for number, row in enumerate(SLOW)}
    with serving() as hub:
        settings = store_settings(
            cache_dir=tmp_path_factory.mktemp("slow") / "cache", endpoint=hub.endpoint, retry_wait_s=0.02, parallel=3
        )
        for seed, (name, row) in enumerate(names.items()):
            repo = hub.add(name, whisper_files(seed, size_bytes=ODD_BYTES))
            hub.fault(f"{LFS}{repo.commits[repo.refs['main']]['model.bin'].sha256}", **SLOW[row][0])
        failed = reconcile(wanted(*names), settings)
        hub.faults.clear()
        healed = reconcile(wanted(*names), settings)
    rows = [{names[result.name]: result for result in report.results} for report in (failed, healed)]
    return Slow(failed=rows[0], healed=rows[1])


@pytest.mark.parametrize("row", SLOW)
def test_a_fault_that_is_waited_for(slow: Slow, row: str) -> None:
    """The library's retries end, the message is the same as for other faults, and the next run repairs it."""
    _, kind, cause = SLOW[row]
    failed, healed = slow.failed[row], slow.healed[row]
    assert (type(failed.error), failed.path) == (kind, None), failed
    assert cause in str(failed.error)
    assert (healed.outcome, healed.error) == ("downloaded", None)


@pytest.mark.parametrize(("match", "path"), [(LFS, "model.bin"), (GIT, "config.json")], ids=["LFS file", "git file"])
def test_plain_snapshot_download_keeps_wrong_bytes(
    hub: LoopbackHub, repo: HubRepo, plain_cache: Path, settings: Settings, match: str, path: str
) -> None:
    """The library accepts wrong bytes of the right length for good; whisperd finds and repairs them."""
    repo.commit(whisper_files(2))
    hub.fault(match, times=1, corrupt=True)
    first = plain(plain_cache, hub.endpoint)
    again = plain(plain_cache, hub.endpoint)
    assert first.path == again.path
    assert first.path is not None
    assert (first.path / path).read_bytes() != whisper_files(2)[path]
    copy_cache(plain_cache, settings.cache_dir)
    assert offline(settings) == {}
    report = run(settings)
    assert f"{path} wrong hash" in plan_lines(report.plan)[0]
    assert report.snapshots[NAME].name == first.path.name
    assert (report.snapshots[NAME] / path).read_bytes() == whisper_files(2)[path]


def test_plain_snapshot_download_never_completes_over_a_failing_link(
    hub: LoopbackHub, repo: HubRepo, tmp_path: Path
) -> None:
    """The library keeps whole pieces of 10 MiB only; whisperd completes over the same link in the table above."""
    repo.commit(new_files())
    hub.fault(LFS, cut_at=3 * MIB // 2)
    assert plain(tmp_path / "cache", hub.endpoint).error == "RemoteProtocolError"

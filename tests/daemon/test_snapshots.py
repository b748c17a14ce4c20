"""What a request has fetched is served, and the daemon runs one reconcile of the cache at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.fakes import written
from tests.support.models import House, ScriptedOpener, ready_state
from whisperd.daemon.models import ModelInstance
from whisperd.daemon.snapshots import Snapshots
from whisperd.daemon.state import State
from whisperd.daemon.systemd import Supervision
from whisperd.errors import CacheBusy, Draining, OutOfMemory, RequestError
from whisperd.metrics.prometheus import Metrics
from whisperd.notify import Notifier
from whisperd.serving.interface import ReconcileOrder
from whisperd.speech.tokenizer import Vocabulary
from whisperd.speech.vad import SpeechDetector
from whisperd.store.cache import is_held


class WatchingOpener(ScriptedOpener):
    """Records for each snapshot that it opens whether it was held at that moment."""

    def __init__(self, vocabulary: Vocabulary, detector: SpeechDetector) -> None:
        super().__init__(vocabulary, detector, [lambda window: written(vocabulary, window, " x")] * 9)
        self.held: dict[str, bool] = {}
        self.fits = True

    def open(self, name: str, snapshot: Path, *, again: bool = False, beside: bool = False) -> ModelInstance:
        self.held[name] = is_held(snapshot)
        if not self.fits:
            raise OutOfMemory(f"{name} does not fit")
        return super().open(name, snapshot, again=again, beside=beside)


@pytest.fixture
def opener(vocabulary: Vocabulary, detector: SpeechDetector) -> WatchingOpener:
    return WatchingOpener(vocabulary, detector)


@pytest.fixture
def house(tmp_path: Path, snapshot: Path, opener: WatchingOpener) -> Iterator[House]:
    found = House(tmp_path, snapshot, opener)
    yield found
    found.close()


@pytest.fixture
def state(house: House, tmp_path: Path) -> State:
    tables = ", ".join(f'{{ repo = "path:{house.snapshots[name]}", name = "{name}" }}' for name in ("a", "b"))
    return ready_state(f"models = [{tables}]", f'cache_dir="{tmp_path}/cache"', "reconcile.offline=true")


def ignore(_event: str, _data: Mapping[str, Any]) -> None:
    """A client that does not listen to events."""


def snapshots(house: House, state: State) -> Snapshots:
    supervision = Supervision(Notifier({}), state, house.status(state), house.leases, engine_stall_s=300)
    return Snapshots({}, state, house.leases, house.loader, supervision, Metrics())


def test_what_a_request_has_made_complete_is_served(house: House, state: State, tmp_path: Path) -> None:
    """A declared model that was missing at boot is served after a reconcile that found it."""
    found = snapshots(house, state)
    house.snapshots["b"].rename(tmp_path / "elsewhere")
    house.run(found.apply(state.loaded.config, all_or_nothing=False))
    assert house.loaded == {"a"}
    assert [problem.partition(":")[0] for problem in state.problems] == ["b"]
    (tmp_path / "elsewhere").rename(house.snapshots["b"])
    report = house.run(found.reconcile_on_request(ReconcileOrder(models=("b",)), ignore))
    assert report["exit_code"] == 0
    assert house.loaded == {"a", "b"}
    assert state.problems == ()


def test_what_is_served_is_held(house: House, state: State, opener: WatchingOpener) -> None:
    """A snapshot is held before it is loaded, so no prune removes it; one that was not loaded is released."""
    found, paths = snapshots(house, state), [house.snapshots[name] for name in ("a", "b")]
    opener.fits = False
    with pytest.raises(OutOfMemory):
        house.run(found.apply(state.loaded.config, all_or_nothing=True))
    assert not any(map(is_held, paths))
    opener.fits = True
    house.run(found.apply(state.loaded.config, all_or_nothing=True))
    assert opener.held == {"a": True, "b": True}
    assert all(map(is_held, paths))


def test_a_check_changes_nothing(house: House, state: State) -> None:
    """A request that only checks changes nothing that is served, even if another snapshot would be."""
    found = snapshots(house, state)
    house.run(found.apply(state.loaded.config, all_or_nothing=True))
    before = house.leases.served
    house.run(found.reconcile_on_request(ReconcileOrder(check=True), ignore))
    assert house.leases.served is before


def test_one_at_a_time(house: House, state: State) -> None:
    """A request that comes during a reconcile or during the stop is refused."""
    found = snapshots(house, state)

    async def both() -> None:
        applying = asyncio.create_task(found.apply(state.loaded.config, all_or_nothing=True))
        await asyncio.sleep(0)
        with pytest.raises(CacheBusy, match="checking the cache"):
            await found.reconcile_on_request(ReconcileOrder(), ignore)
        await applying
        with pytest.raises(RequestError, match="not a declared model"):
            await found.reconcile_on_request(ReconcileOrder(models=("no/such/thing",)), ignore)
        found.cancel()
        with pytest.raises(Draining):
            await found.reconcile_on_request(ReconcileOrder(), ignore)

    house.run(both())

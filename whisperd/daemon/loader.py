"""Loads what the configuration declares, and only what is not loaded yet.

Under a memory budget the least recently used model that no request holds makes room for the next one. One change is
made at a time, in a thread; the others wait on the event loop, without one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from whisperd.config import Config
from whisperd.daemon.leases import Leases
from whisperd.daemon.memory import trim, weights_bytes
from whisperd.daemon.models import LoadFailure, ModelInstance, ServedModel, ServedModels
from whisperd.daemon.open_model import ModelOpener
from whisperd.errors import Error, ModelLoading, OutOfMemory

log = logging.getLogger(__name__)

T = TypeVar("T")

COOLDOWN_S = 10.0  # a model that could not be loaded is not tried again at each request
ROOM_RETRY_AFTER_S = 5.0
DRAIN_S = 60.0
PATIENCE_S = 120.0  # how long a request waits while models are switched, as it would at a boot
TURN_RETRY_AFTER_S = 10.0


class Loader:
    """Changes which models are in memory. Its public methods are called on the event loop.

    Args:
        leases: the models that serve.
        opener: opens them.
        drain_s: how long a switch waits for requests that hold a model which has to make room.
        patience_s: how long a request waits for other changes.
    """

    def __init__(
        self, leases: Leases, opener: ModelOpener, *, drain_s: float = DRAIN_S, patience_s: float = PATIENCE_S
    ) -> None:
        self._leases = leases
        self._opener = opener
        self._drain_s = drain_s
        self._patience_s = patience_s
        self._budget_bytes = 0
        self._turn = asyncio.Lock()

    async def switch(self, config: Config, snapshots: Mapping[str, Path]) -> None:
        """Serves what ``config`` declares from now on: all or nothing.

        The first model is loaded in any case, the others unless they wait for their first request. Models whose
        snapshot is the same stay as they are. Requests keep what they hold. New models are loaded beside those that
        leave; where the memory does not hold both, these go first, and new requests wait meanwhile.

        Raises:
            Error: a model could not be loaded; what was served before is served still.
        """
        await self._turn.acquire()
        await self._work(lambda: self._switch(config, snapshots))

    async def load_one(self, name: str) -> None:
        """Loads a declared model that is served but not loaded, or whose engine failed.

        Raises:
            ModelLoading: it is not in the cache, there is no room for it now, it failed a moment ago, or other models
                are switched for too long.
            Error: it cannot be loaded.
        """
        try:
            async with asyncio.timeout(self._patience_s):
                await self._turn.acquire()
        except TimeoutError as error:
            raise ModelLoading(
                f"model {name!r} waits for other models to load", retry_after_s=TURN_RETRY_AFTER_S
            ) from error
        await self._work(lambda: self._load_one(name))

    async def unload_idle(self, idle_s: float) -> tuple[str, ...]:
        """Unloads models that were not used for so long, and gives their memory back; returns their names."""
        await self._turn.acquire()
        return await self._work(lambda: self._unload_idle(idle_s))

    async def _work(self, change: Callable[[], T]) -> T:
        """Makes a change in a thread. The turn ends with the thread, which a cancelled caller does not wait for."""
        running = asyncio.get_running_loop().run_in_executor(None, change)
        running.add_done_callback(lambda _: self._turn.release())
        return await asyncio.shield(running)

    def _switch(self, config: Config, snapshots: Mapping[str, Path]) -> None:
        before = self._leases.served
        kept = {
            one.name: one.instance
            for one in before
            if one.instance is not None and not one.instance.failed and one.instance.snapshot == snapshots.get(one.name)
        }
        declared = ServedModels(
            tuple(ServedModel(table=table, snapshot=snapshots.get(table.served_name)) for table in config.models)
        ).with_instances(kept)
        leaving = [one.instance for one in before if one.instance is not None and one.instance not in kept.values()]
        opened = self._open_instead(leaving, _to_load(declared, config.limits.model_bytes))
        self._budget_bytes = config.limits.model_bytes
        self._leases.swap(declared.with_instances(kept | opened))

    def _load_one(self, name: str) -> None:
        entry = self._leases.served.find(name)
        if entry is None:
            return  # a reload was faster; the caller resolves the name again
        if entry.instance is not None and not entry.instance.failed:
            return
        if entry.snapshot is None:
            raise ModelLoading(f"model {name!r} is declared but not in the cache; see: whisperd status")
        _refuse_repetition(entry)
        if entry.instance is None:
            self._make_room(name, entry.snapshot)
        try:
            instance = self._opener.open(name, entry.snapshot, again=entry.instance is not None)
        except Error as error:
            failure = LoadFailure(at_s=time.monotonic(), error=error)
            self._leases.swap(self._leases.served.changed(name, failure=failure))
            raise
        self._leases.swap(self._leases.served.changed(name, instance=instance, failure=None))

    def _unload_idle(self, idle_s: float) -> tuple[str, ...]:
        names = [name for name, since_s in self._evictable() if since_s >= idle_s]
        return tuple(name for name in names if self._unload(name, f"idle for {idle_s:g} s"))

    def _evictable(self) -> list[tuple[str, float]]:
        """Models that may be unloaded, with their idle seconds, the longest first."""
        kept = {one.name for one in self._leases.served if one.table.keep_loaded}
        return [(name, since_s) for name, since_s in self._leases.idle() if name not in kept]

    def _make_room(self, name: str, snapshot: Path) -> None:
        need_bytes = weights_bytes(snapshot)
        while self._budget_bytes and self._leases.served.memory_bytes + need_bytes > self._budget_bytes:
            if not any(self._unload(other, f"to make room for {name}") for other, _ in self._evictable()[:1]):
                break
        used_bytes = self._leases.served.memory_bytes
        if self._budget_bytes and used_bytes and used_bytes + need_bytes > self._budget_bytes:
            raise ModelLoading(
                f"model {name!r} needs {need_bytes / 1e6:.0f} MB, and models that are in use hold "
                f"{used_bytes / 1e6:.0f} of {self._budget_bytes / 1e6:.0f} MB (limits.model_bytes)",
                retry_after_s=ROOM_RETRY_AFTER_S,
            )

    def _unload(self, name: str, reason: str) -> bool:
        if not self._leases.unload(name):
            return False
        trim()
        log.info("model %s unloaded, %s", name, reason)
        return True

    def _open_instead(
        self, leaving: Sequence[ModelInstance], snapshots: Mapping[str, Path]
    ) -> dict[str, ModelInstance]:
        """Opens models beside those that leave where that works; else these are closed first, and loaded again when
        it fails.
        """
        if not leaving or not snapshots:
            return self._opener.open_all(snapshots)
        try:
            if not any(map(self._opener.takes_all, leaving)):
                return self._opener.open_all(snapshots, beside=True)
            log.info("the models that leave have all of the GPU's memory: they go first")
        except OutOfMemory as error:
            log.warning("no room beside the models that leave, they go first: %s", error)
        before = self._leases.served
        try:
            self._dismiss(leaving)
            return self._opener.open_all(snapshots)
        except Error:
            self._put_back(before)
            raise

    def _dismiss(self, leaving: Sequence[ModelInstance]) -> None:
        """Takes models out of service and waits until the last request has released them."""
        served = self._leases.served
        for instance in leaving:
            served = served.changed(instance.model.name, instance=None)
        self._leases.swap(served)
        if not self._leases.wait_closed(leaving, self._drain_s):
            raise OutOfMemory(
                "there is no room for the new models beside the old ones, and requests still hold these after "
                f"{self._drain_s:g} s; reload again when they are done"
            )
        trim()

    def _put_back(self, before: ServedModels) -> None:
        """Serves again what served before; what is closed by now is loaded anew."""
        now = self._leases.served.loaded
        for one in before:
            if one.instance is None or one.name in now or self._leases.readmit(one.instance):
                continue
            try:
                before = before.changed(one.name, instance=self._opener.open(one.name, one.instance.snapshot))
            except Error as error:
                before = before.changed(one.name, instance=None)
                log.error("model %s served before and cannot be loaded again: %s", one.name, error)
        self._leases.swap(before)


def _refuse_repetition(entry: ServedModel) -> None:
    """Raises ModelLoading within COOLDOWN_S after a load that failed."""
    if entry.failure is None:
        return
    left_s = entry.failure.at_s + COOLDOWN_S - time.monotonic()
    if left_s > 0:
        raise ModelLoading(
            f"model {entry.name!r} could not be loaded a moment ago: {entry.failure.error}", retry_after_s=left_s
        )


def _to_load(declared: ServedModels, budget_bytes: int) -> dict[str, Path]:
    """The snapshots to load now, by name: of the default model, and of those to preload that fit into the budget.

    The default model is loaded in any case: a daemon that serves nothing is of no use. The others wait for their first
    request.
    """
    used_bytes = declared.memory_bytes
    chosen: dict[str, Path] = {}
    for position, one in enumerate(declared):
        is_default = position == 0
        if one.snapshot is None or one.instance is not None or not (is_default or one.table.preload):
            continue
        need_bytes = weights_bytes(one.snapshot)
        if budget_bytes and used_bytes + need_bytes > budget_bytes and not is_default:
            log.info("model %s waits for its first request: no room in limits.model_bytes now", one.name)
            continue
        used_bytes += need_bytes
        chosen[one.name] = one.snapshot
    return chosen

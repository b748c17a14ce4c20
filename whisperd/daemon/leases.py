"""Which models serve now, and which requests hold them.

A reload replaces all models by one assignment. An instance that does not serve any more is closed when the last
request that holds it is done.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from whisperd.daemon.models import ModelInstance, ServedModels
from whisperd.errors import ModelLoading
from whisperd.transcription.model import LoadedModel


class Leases:
    """Lends models to requests. Safe to use from any thread.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Condition()
        self._served = ServedModels()
        self._closers: list[threading.Thread] = []

    @property
    def served(self) -> ServedModels:
        """The models that new requests get."""
        return self._served

    @contextmanager
    def lease(self, name: str) -> Iterator[LoadedModel]:
        """A model in memory, which stays open until the block ends; raises ModelLoading when it is not there."""
        with self._lock:
            entry = self._served.find(name)
            instance = entry.instance if entry is not None else None
            if instance is None:
                raise ModelLoading(f"model {name!r} is not loaded yet", retry_after_s=2.0)
            instance.n_holders += 1
            instance.used_at_s = self._clock()
        try:
            yield instance.model
        finally:
            self._release(instance)

    def swap(self, served: ServedModels) -> None:
        """Serves these models from now on; instances that are not among them close as soon as no request holds them."""
        with self._lock:
            before, after = _instances(self._served), _instances(served)
            for instance in after:
                if instance not in before:
                    instance.used_at_s = self._clock()
                    instance.state = "serving"
            gone = [instance for instance in before if instance not in after]
            for instance in gone:
                instance.state = "leaving" if instance.n_holders else "closing"
            self._served = served
        for instance in gone:
            if instance.state == "closing":
                self._close(instance)

    def wait_closed(self, instances: Collection[ModelInstance], timeout_s: float) -> bool:
        """Waits until instances that were swapped out are closed; False when it takes too long. Blocks."""
        with self._lock:
            return self._lock.wait_for(
                lambda: all(instance.state not in {"leaving", "closing"} for instance in instances), timeout_s
            )

    def readmit(self, instance: ModelInstance) -> bool:
        """Keeps an instance open that was swapped out and is to be swapped in again; False when it closes already."""
        with self._lock:
            if instance.state != "leaving":
                return False
            instance.state = "serving"
            return True

    def idle(self) -> list[tuple[str, float]]:
        """Models in memory that no request holds, with the seconds since one did, the longest first."""
        with self._lock:
            now_s = self._clock()
            free = [
                (one.name, now_s - one.instance.used_at_s)
                for one in self._served
                if one.instance is not None and not one.instance.n_holders
            ]
        return sorted(free, key=lambda pair: pair[1], reverse=True)

    def unload(self, name: str) -> bool:
        """Takes a model out of memory unless a request holds it; it stays declared. Blocks until it is closed."""
        with self._lock:
            entry = self._served.find(name)
            instance = entry.instance if entry is not None else None
            if instance is None or instance.n_holders:
                return False
            instance.state = "closing"
            self._served = self._served.changed(name, instance=None)
        self._end(instance)
        return True

    def close(self) -> None:
        """Takes all models out of memory and waits until they are closed. Blocks."""
        self.swap(ServedModels())
        for thread in self._closers:
            thread.join()

    def _release(self, instance: ModelInstance) -> None:
        with self._lock:
            instance.n_holders -= 1
            instance.used_at_s = self._clock()
            last = instance.state == "leaving" and not instance.n_holders
            if last:
                instance.state = "closing"
        if last:
            self._close(instance)

    def _close(self, instance: ModelInstance) -> None:
        """Closes in a thread of its own: an engine first ends the batch that runs, and the caller may be the loop."""
        thread = threading.Thread(target=self._end, args=(instance,), name=f"close-{instance.model.name}")
        self._closers = [*(other for other in self._closers if other.is_alive()), thread]
        thread.start()

    def _end(self, instance: ModelInstance) -> None:
        try:
            instance.model.batcher.close()
        finally:
            with self._lock:
                instance.state = "closed"
                self._lock.notify_all()


def _instances(served: ServedModels) -> list[ModelInstance]:
    return [one.instance for one in served if one.instance is not None]

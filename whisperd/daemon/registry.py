"""Which models serve now, and which ones are on their way out.

A reload replaces the whole set by one assignment. A model that is no longer in the set is closed when the last
request that holds it is done.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from whisperd.errors import ModelLoading, ModelNotFound
from whisperd.transcription.model import LoadedModel

# names that OpenAI's clients send by default or by habit; they mean the default model unless somebody declares them
OPENAI_NAMES = frozenset(
    {"whisper-1", "gpt-transcribe", "gpt-4o-transcribe", "gpt-4o-mini-transcribe", "gpt-4o-mini-transcribe-2025-12-15"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """The declared models by name, the default one first.

    ``aliases`` maps further names to them; ``models`` has those that are loaded.
    """

    names: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    models: Mapping[str, LoadedModel] = field(default_factory=lambda: MappingProxyType({}))

    def resolve(self, name: str | None) -> str:
        """The declared name that a request means; raises ModelLoading or ModelNotFound."""
        if not self.names:
            raise ModelLoading("no model is loaded yet", retry_after_s=2.0)
        wanted = self.aliases.get(name, name) if name else self.names[0]
        if wanted in self.names:
            return wanted
        if wanted in OPENAI_NAMES:
            return self.names[0]
        known = ", ".join([*self.names, *self.aliases])
        raise ModelNotFound(f"no model {name!r} is served here; this daemon has: {known}", param="model")

    def with_model(self, model: LoadedModel) -> Served:
        """The same set with one more model loaded."""
        return replace(self, models=MappingProxyType({**self.models, model.name: model}))

    def without_model(self, name: str) -> Served:
        """The same set with one model less in memory."""
        return replace(self, models=MappingProxyType({key: model for key, model in self.models.items() if key != name}))


class Registry:
    """Hands out models and closes those that are no longer wanted. Safe to use from any thread.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._used_at_s: dict[str, float] = {}
        self._lock = threading.Condition()
        self._served = Served()
        self._holders: Counter[int] = Counter()
        self._leaving: dict[int, LoadedModel] = {}
        self._closers: list[threading.Thread] = []
        self._closing: set[int] = set()

    @property
    def served(self) -> Served:
        """The set that new requests see."""
        return self._served

    @contextmanager
    def lease(self, name: str) -> Iterator[LoadedModel]:
        """A loaded model that stays open until the block ends, whatever a reload does meanwhile."""
        with self._lock:
            model = self._served.models.get(name)
            if model is None:
                raise ModelLoading(f"model {name!r} is not loaded yet", retry_after_s=2.0)
            self._holders[id(model)] += 1
            self._used_at_s[name] = self._clock()
        try:
            yield model
        finally:
            self._release(model)

    def swap(self, served: Served) -> None:
        """From now on new requests see this set; models that left close as soon as nobody holds them."""
        with self._lock:
            kept = {id(model) for model in served.models.values()}
            present = {id(model) for model in self._served.models.values()}
            old = [model for model in self._served.models.values() if id(model) not in kept]
            self._used_at_s |= {
                model.name: self._clock() for model in served.models.values() if id(model) not in present
            }
            self._served = served
            self._leaving = {key: model for key, model in self._leaving.items() if key not in kept}
            idle = [model for model in old if not self._holders[id(model)]]
            self._closing |= {id(model) for model in idle}
            self._leaving.update({id(model): model for model in old if self._holders[id(model)]})
        for model in idle:
            self._close(model)

    def left(self, models: Collection[LoadedModel], timeout_s: float) -> bool:
        """Waits until these models, which were swapped out, are closed; False when it takes too long. Blocks."""
        keys = {id(model) for model in models}
        with self._lock:
            return self._lock.wait_for(lambda: not keys & (self._leaving.keys() | self._closing), timeout_s)

    def is_open(self, model: LoadedModel) -> bool:
        """Whether a model that was swapped out is still held by requests, and may be swapped in again."""
        with self._lock:
            return id(model) in self._leaving

    def idle(self) -> list[tuple[str, float]]:
        """Loaded models that nobody holds and for how many seconds nobody did, the longest first."""
        with self._lock:
            now_s = self._clock()
            free = [name for name, model in self._served.models.items() if not self._holders[id(model)]]
            return sorted(
                ((name, now_s - self._used_at_s.setdefault(name, now_s)) for name in free),
                key=lambda pair: pair[1],
                reverse=True,
            )

    def unload(self, name: str) -> bool:
        """Takes a model out of memory unless somebody holds it; it stays declared. Blocks until it is closed."""
        with self._lock:
            model = self._served.models.get(name)
            if model is None or self._holders[id(model)]:
                return False
            self._served = self._served.without_model(name)
        model.batcher.close()
        return True

    def close(self) -> None:
        """Forgets all models and waits until they are closed. Blocks."""
        self.swap(Served())
        for thread in self._closers:
            thread.join()

    def _release(self, model: LoadedModel) -> None:
        with self._lock:
            self._holders[id(model)] -= 1
            self._used_at_s[model.name] = self._clock()
            last = not self._holders[id(model)]
            leaving = self._leaving.pop(id(model), None) if last else None
            if leaving is not None:
                self._closing.add(id(leaving))
        if leaving is not None:
            self._close(leaving)

    def _close(self, model: LoadedModel) -> None:
        """Beside the caller, which may be the event loop: an engine first ends the batch that runs."""
        thread = threading.Thread(target=self._end, args=(model,), name=f"close-{model.name}")
        self._closers = [*(other for other in self._closers if other.is_alive()), thread]
        thread.start()

    def _end(self, model: LoadedModel) -> None:
        try:
            model.batcher.close()
        finally:
            with self._lock:
                self._closing.discard(id(model))
                self._lock.notify_all()

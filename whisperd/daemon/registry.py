"""Which models serve now, and which ones are on their way out.

A reload replaces the whole set by one assignment. A model that is no longer in the set is closed when the last
request that holds it is done.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType

from whisperd.errors import ModelLoading, ModelNotFound
from whisperd.pipeline import LoadedModel

# names that OpenAI's clients send by default or by habit; they mean the default model unless somebody declares them
OPENAI_NAMES = frozenset(
    {"whisper-1", "gpt-transcribe", "gpt-4o-transcribe", "gpt-4o-mini-transcribe", "gpt-4o-mini-transcribe-2025-12-15"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A set of loaded models by name. ``aliases`` maps further names; the first model is the default."""

    models: Mapping[str, LoadedModel] = field(default_factory=lambda: MappingProxyType({}))
    aliases: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def find(self, name: str | None) -> LoadedModel:
        """The model that a request names, or the default; raises ModelLoading or ModelNotFound."""
        if not self.models:
            raise ModelLoading("no model is loaded yet", retry_after_s=2.0)
        default = next(iter(self.models))
        wanted = self.aliases.get(name, name) if name else default
        if wanted in self.models:
            return self.models[wanted]
        if wanted in OPENAI_NAMES:
            return self.models[default]
        known = ", ".join([*self.models, *self.aliases])
        raise ModelNotFound(f"no model {name!r} is served here; this daemon has: {known}", param="model")


class Registry:
    """Hands out models and closes those that are no longer wanted. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._served = Served()
        self._holders: Counter[int] = Counter()
        self._leaving: dict[int, LoadedModel] = {}

    @property
    def served(self) -> Served:
        """The set that new requests see."""
        return self._served

    @contextmanager
    def lease(self, name: str | None) -> Iterator[LoadedModel]:
        """A model that stays open until the block ends, whatever a reload does meanwhile."""
        with self._lock:
            model = self._served.find(name)
            self._holders[id(model)] += 1
        try:
            yield model
        finally:
            self._release(model)

    def swap(self, served: Served) -> None:
        """From now on new requests see this set; models that left close as soon as nobody holds them."""
        with self._lock:
            kept = {id(model) for model in served.models.values()}
            old = [model for model in self._served.models.values() if id(model) not in kept]
            self._served = served
            idle = [model for model in old if not self._holders[id(model)]]
            self._leaving.update({id(model): model for model in old if self._holders[id(model)]})
        for model in idle:
            model.batcher.close()

    def _release(self, model: LoadedModel) -> None:
        with self._lock:
            self._holders[id(model)] -= 1
            last = not self._holders[id(model)]
            leaving = self._leaving.pop(id(model), None) if last else None
        if leaving is not None:
            leaving.batcher.close()

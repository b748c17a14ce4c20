"""Loads what the configuration declares, and only what is not loaded yet. Blocks: call it in a thread.

Under a memory budget the least recently used model that nobody holds makes room for the next one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from whisperd.config import Config
from whisperd.daemon.loading import load
from whisperd.daemon.memory import trim, weights_bytes
from whisperd.daemon.registry import Registry, Served
from whisperd.daemon.settings import aliases
from whisperd.engine import EngineSettings
from whisperd.errors import Error, ModelLoading
from whisperd.metrics import Metrics
from whisperd.pipeline import LoadedModel
from whisperd.vad import SpeechDetector

log = logging.getLogger(__name__)

COOLDOWN_S = 10.0  # a model that could not be loaded is not tried again at each request
ROOM_RETRY_AFTER_S = 5.0


class Loader:
    """Knows from which snapshot each served model was loaded.

    Args:
        registry: where the loaded models are.
        settings: how engines are opened; the same as long as the daemon lives.
        work_dir: where conversions are kept.
        metrics: counts loads, and what the models do.
    """

    def __init__(self, registry: Registry, settings: EngineSettings, work_dir: Path, metrics: Metrics) -> None:
        self._registry = registry
        self._settings = settings
        self._work_dir = work_dir
        self._metrics = metrics
        self._detector: SpeechDetector | None = None
        self._loaded_from: Mapping[str, Path] = MappingProxyType({})
        self._snapshots: Mapping[str, Path] = MappingProxyType({})
        self._budget_bytes = 0
        self._kept: frozenset[str] = frozenset()
        self._failed: dict[str, tuple[float, Error]] = {}
        self._one_at_a_time = threading.Lock()

    def switch(self, config: Config, snapshots: Mapping[str, Path]) -> None:
        """Serves what ``config`` declares from now on: all or nothing.

        The first model is loaded in any case, the others unless they wait for their first request. Models whose
        snapshot is the same stay as they are. Requests keep what they hold.

        Raises:
            Error: a model could not be loaded; what was served before is served still.
        """
        with self._one_at_a_time:
            wanted = {model.served_name for model in config.models[:1]}
            wanted |= {model.served_name for model in config.models if model.preload}
            current = self._registry.served.models
            kept = {
                name: model
                for name, model in current.items()
                if snapshots.get(name) == self._loaded_from.get(name) and model.batcher.failure is None
            }
            budget_bytes = config.limits.model_bytes
            missing = [name for name in snapshots if name in wanted and name not in kept]
            fitting = _fitting(missing, snapshots, sum(model.memory_bytes for model in kept.values()), budget_bytes)
            models = kept | self._load_all(fitting, snapshots)
            self._budget_bytes = budget_bytes
            self._kept = frozenset(model.served_name for model in config.models if model.keep_loaded)
            self._failed.clear()
            names = tuple(model.served_name for model in config.models)
            self._snapshots = MappingProxyType(dict(snapshots))
            self._loaded_from = MappingProxyType({name: snapshots[name] for name in models})
            self._registry.swap(
                Served(
                    names=names,
                    aliases=aliases(config),
                    models=MappingProxyType({name: models[name] for name in names if name in models}),
                )
            )

    def load_one(self, name: str) -> None:
        """Loads a declared model that is served but not loaded, or whose engine died.

        Raises:
            ModelLoading: it is not in the cache, there is no room for it now, or it failed a moment ago.
            Error: it cannot be loaded.
        """
        with self._one_at_a_time:
            found = self._registry.served.models.get(name)
            if found is not None and found.batcher.failure is None:
                return
            if name not in self._snapshots:
                raise ModelLoading(f"model {name!r} is declared but not in the cache; see: whisperd status")
            self._refuse_repetition(name)
            if found is None:
                self._make_room(name)
            model = self._remembered(name, again=found is not None)
            self._loaded_from = MappingProxyType({**self._loaded_from, name: self._snapshots[name]})
            self._registry.swap(self._registry.served.with_model(model))

    def unload_idle(self, idle_s: float) -> tuple[str, ...]:
        """Unloads models that nobody used for so long, and gives their memory back; returns their names."""
        with self._one_at_a_time:
            names = [name for name, since_s in self._registry.idle() if since_s >= idle_s and name not in self._kept]
            return tuple(name for name in names if self._unload(name, f"idle for {idle_s:g} s"))

    def _refuse_repetition(self, name: str) -> None:
        failed_at_s, error = self._failed.get(name, (-COOLDOWN_S, None))
        left_s = failed_at_s + COOLDOWN_S - time.monotonic()
        if error is not None and left_s > 0:
            raise ModelLoading(f"model {name!r} could not be loaded a moment ago: {error}", retry_after_s=left_s)

    def _remembered(self, name: str, *, again: bool) -> LoadedModel:
        try:
            return self._load(name, self._snapshots[name], again=again)
        except Error as error:
            self._failed[name] = (time.monotonic(), error)
            raise

    def _make_room(self, name: str) -> None:
        need_bytes = weights_bytes(self._snapshots[name])
        while self._budget_bytes and self._used_bytes() + need_bytes > self._budget_bytes:
            candidates = [other for other, _ in self._registry.idle() if other not in self._kept]
            if not any(self._unload(other, f"to make room for {name}") for other in candidates[:1]):
                break
        used_bytes = self._used_bytes()
        if self._budget_bytes and used_bytes and used_bytes + need_bytes > self._budget_bytes:
            raise ModelLoading(
                f"model {name!r} needs {need_bytes / 1e6:.0f} MB, and models that are in use hold "
                f"{used_bytes / 1e6:.0f} of {self._budget_bytes / 1e6:.0f} MB (limits.model_bytes)",
                retry_after_s=ROOM_RETRY_AFTER_S,
            )

    def _used_bytes(self) -> int:
        return sum(model.memory_bytes for model in self._registry.served.models.values())

    def _unload(self, name: str, reason: str) -> bool:
        if not self._registry.unload(name):
            return False
        self._loaded_from = MappingProxyType({key: path for key, path in self._loaded_from.items() if key != name})
        trim()
        log.info("model %s unloaded, %s", name, reason)
        return True

    def _load_all(self, names: list[str], snapshots: Mapping[str, Path]) -> dict[str, LoadedModel]:
        models: dict[str, LoadedModel] = {}
        try:
            for name in names:
                models[name] = self._load(name, snapshots[name])
        except Error:
            for model in models.values():
                model.batcher.close()
            raise
        return models

    def _load(self, name: str, snapshot: Path, *, again: bool = False) -> LoadedModel:
        if self._detector is None:
            self._detector = SpeechDetector()
        started_s = time.monotonic()
        meter = self._metrics.model(name)
        model = load(name, snapshot, self._settings, self._work_dir, self._detector, meter)
        model = replace(model, memory_bytes=weights_bytes(snapshot))
        self._metrics.loaded(name, time.monotonic() - started_s, again=again)
        return model


def _fitting(names: Sequence[str], snapshots: Mapping[str, Path], used_bytes: int, budget_bytes: int) -> list[str]:
    """Those that fit into the budget one after the other; the others wait for their first request.

    The first model is loaded in any case where nothing is: a daemon that serves nothing helps nobody.
    """
    fitting: list[str] = []
    for name in names:
        used_bytes += weights_bytes(snapshots[name])
        if budget_bytes and used_bytes > budget_bytes and name != next(iter(snapshots)):
            log.info("model %s waits for its first request: no room in limits.model_bytes now", name)
            used_bytes -= weights_bytes(snapshots[name])
        else:
            fitting.append(name)
    return fitting

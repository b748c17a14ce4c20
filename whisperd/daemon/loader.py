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
from whisperd.daemon.memory import trim, weights_bytes
from whisperd.daemon.open_model import Opener, load
from whisperd.daemon.registry import Registry, Served
from whisperd.daemon.settings import aliases
from whisperd.engine.factory import EngineSettings, open_engine
from whisperd.errors import Error, ModelLoading, OutOfMemory
from whisperd.metrics.prometheus import Metrics
from whisperd.speech.vad import SpeechDetector
from whisperd.transcription.model import LoadedModel

log = logging.getLogger(__name__)

COOLDOWN_S = 10.0  # a model that could not be loaded is not tried again at each request
ROOM_RETRY_AFTER_S = 5.0
DRAIN_S = 60.0


class Loader:
    """Knows from which snapshot each served model was loaded.

    Args:
        registry: where the loaded models are.
        settings: how engines are opened; the same as long as the daemon lives.
        work_dir: where conversions are kept.
        metrics: counts loads, and what the models do.
        opener: makes engines.
        drain_s: how long a reload waits for requests that hold a model which has to make room.
    """

    def __init__(
        self,
        registry: Registry,
        settings: EngineSettings,
        work_dir: Path,
        metrics: Metrics,
        *,
        opener: Opener = open_engine,
        drain_s: float = DRAIN_S,
    ) -> None:
        self._registry = registry
        self._settings = settings
        self._work_dir = work_dir
        self._metrics = metrics
        self._opener = opener
        self._drain_s = drain_s
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
        snapshot is the same stay as they are. Requests keep what they hold. New models are loaded beside those that
        leave; where the memory does not hold both, these go first, and new requests wait meanwhile.

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
            leaving = [model for name, model in current.items() if name not in kept]
            models = kept | self._load_instead(leaving, fitting, snapshots)
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
            if name not in self._registry.served.names:
                return  # a reload was faster; the caller asks for the name again
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

    def _load_instead(
        self, leaving: Sequence[LoadedModel], names: Sequence[str], snapshots: Mapping[str, Path]
    ) -> dict[str, LoadedModel]:
        """Beside those that leave where that works; else these are closed first, and come back when it fails."""
        if not leaving or not names:
            return self._load_all(names, snapshots)
        try:
            if not any(map(self._takes_all, leaving)):
                return self._load_all(names, snapshots, beside=True)
            log.info("the models that leave have all of the GPU's memory: they go first")
        except OutOfMemory as error:
            log.warning("no room beside the models that leave, they go first: %s", error)
        before, loaded_from = self._registry.served, self._loaded_from
        try:
            self._dismiss(leaving)
            return self._load_all(names, snapshots)
        except Error:
            self._put_back(before, loaded_from)
            raise

    def _takes_all(self, model: LoadedModel) -> bool:
        return model.batcher.info.device != "cpu" and not self._settings.gpu_bytes

    def _dismiss(self, leaving: Sequence[LoadedModel]) -> None:
        """Takes models out of service and waits until the last request has left them."""
        served = self._registry.served
        for model in leaving:
            served = served.without_model(model.name)
        self._registry.swap(served)
        if not self._registry.left(leaving, self._drain_s):
            raise OutOfMemory(
                "there is no room for the new models beside the old ones, and requests still hold these after "
                f"{self._drain_s:g} s; reload again when they are done"
            )
        trim()

    def _put_back(self, before: Served, loaded_from: Mapping[str, Path]) -> None:
        """What served before serves again; what is closed by now is loaded anew."""
        served = self._registry.served
        for name, model in before.models.items():
            if name in served.models:
                continue
            if self._registry.is_open(model):
                served = served.with_model(model)
                continue
            try:
                served = served.with_model(self._load(name, loaded_from[name]))
            except Error as error:
                log.error("model %s served before and cannot be loaded again: %s", name, error)
        self._registry.swap(served)

    def _load_all(
        self, names: Sequence[str], snapshots: Mapping[str, Path], *, beside: bool = False
    ) -> dict[str, LoadedModel]:
        models: dict[str, LoadedModel] = {}
        try:
            for name in names:
                models[name] = self._load(name, snapshots[name], beside=beside)
        except Error:
            for model in models.values():
                model.batcher.close()
            raise
        return models

    def _load(self, name: str, snapshot: Path, *, again: bool = False, beside: bool = False) -> LoadedModel:
        if self._detector is None:
            self._detector = SpeechDetector()
        started_s = time.monotonic()
        meter = self._metrics.model(name)
        model = load(name, snapshot, self._settings, self._work_dir, self._detector, meter, self._opener, beside=beside)
        model = replace(model, memory_bytes=weights_bytes(snapshot))
        if model.batcher.info.device != "cpu":
            self._settings = replace(self._settings, device="cuda")  # from now on its absence is a loss, and no choice
        self._metrics.observe_load(name, time.monotonic() - started_s, again=again)
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

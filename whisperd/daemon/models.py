"""Loads what the configuration declares, and only what is not loaded yet. Blocks: call it in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from whisperd.config import Config
from whisperd.daemon.loading import load
from whisperd.daemon.registry import Registry, Served
from whisperd.daemon.settings import aliases
from whisperd.engine import EngineSettings
from whisperd.errors import Error, ModelLoading
from whisperd.metrics import Metrics
from whisperd.pipeline import LoadedModel
from whisperd.vad import SpeechDetector


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
            kept = {name: current[name] for name in current if snapshots.get(name) == self._loaded_from.get(name)}
            missing = [name for name in snapshots if name in wanted and name not in kept]
            models = kept | self._load_all(missing, snapshots)
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
        """Loads a declared model that is served but not loaded, or whose engine died; raises Error."""
        with self._one_at_a_time:
            found = self._registry.served.models.get(name)
            if found is not None and found.batcher.failure is None:
                return
            if name not in self._snapshots:
                raise ModelLoading(f"model {name!r} is declared but not in the cache; see: whisperd status")
            model = self._load(name, self._snapshots[name], again=found is not None)
            self._loaded_from = MappingProxyType({**self._loaded_from, name: self._snapshots[name]})
            self._registry.swap(self._registry.served.with_model(model))

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
        self._metrics.loaded(name, time.monotonic() - started_s, again=again)
        return model

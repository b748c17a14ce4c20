"""Served models without a daemon around them: a loader, its leases and an event loop of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tests.support.fakes import FakeEngine, Script
from tests.support.speech import Clip, wav
from tests.support.wait import PATIENCE_S
from whisperd.config import Config, ModelTable, load
from whisperd.config.options import LimitsTable
from whisperd.daemon.leases import Leases
from whisperd.daemon.loader import DRAIN_S, Loader
from whisperd.daemon.models import ModelInstance
from whisperd.daemon.open_model import ModelOpener
from whisperd.daemon.service import DaemonService
from whisperd.daemon.state import State
from whisperd.daemon.status import Status
from whisperd.daemon.transcriber import Transcriber
from whisperd.engine.factory import EngineSettings
from whisperd.metrics.prometheus import Metrics
from whisperd.serving.interface import Chunking, Emit, Job, ReconcileOrder
from whisperd.serving.schema import Reload, Report
from whisperd.serving.spool import Spool
from whisperd.speech.audio import InProcessDecoder
from whisperd.speech.fallback import Options
from whisperd.speech.tokenizer import Vocabulary
from whisperd.speech.transcript import Transcript
from whisperd.speech.vad import SpeechDetector
from whisperd.transcription.batcher import Batcher
from whisperd.transcription.model import LoadedModel

NAMES = ("a", "b", "c")

T = TypeVar("T")


class ScriptedOpener(ModelOpener):
    """Opens models on engines that answer by script; every one takes the next script."""

    def __init__(self, vocabulary: Vocabulary, detector: SpeechDetector, scripts: Sequence[Script]) -> None:
        super().__init__(EngineSettings(), Path("/nowhere"), Metrics())
        self.n_opened = 0
        self._vocabulary = vocabulary
        self._voice = detector
        self._scripts = iter(scripts)

    def open(self, name: str, snapshot: Path, *, again: bool = False, beside: bool = False) -> ModelInstance:
        del again, beside
        self.n_opened += 1
        batcher = Batcher(FakeEngine(self._vocabulary, next(self._scripts)), name=name)
        model = LoadedModel(name=name, vocabulary=self._vocabulary, batcher=batcher, detector=self._voice)
        return ModelInstance(model=model, snapshot=snapshot)


class House:
    """The embedded model under three names, and a clock that only the test moves."""

    def __init__(self, directory: Path, snapshot: Path, opener: ModelOpener, *, drain_s: float = DRAIN_S) -> None:
        self.now_s = 0.0
        self.leases = Leases(lambda: self.now_s)
        self.loader = Loader(self.leases, opener, drain_s=drain_s)
        self.snapshots = {name: _linked(snapshot, directory / name) for name in NAMES}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    @property
    def loaded(self) -> set[str]:
        return set(self.leases.served.loaded)

    def model(self, name: str) -> LoadedModel:
        return self.leases.served.loaded[name]

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the event loop; may be called from any thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    def switch(self, *names: str, memory_bytes: int = 0, keep: str = "", preload: bool = True) -> None:
        models = tuple(
            ModelTable(repo=f"path:{self.snapshots[name]}", name=name, preload=preload, keep_loaded=name == keep)
            for name in names
        )
        config = Config(models=models, limits=LimitsTable(model_bytes=memory_bytes))
        self.run(self.loader.switch(config, {name: self.snapshots[name] for name in names}))

    def load_one(self, name: str) -> None:
        self.run(self.loader.load_one(name))

    def unload_idle(self, idle_s: float) -> tuple[str, ...]:
        return self.run(self.loader.unload_idle(idle_s))

    def use(self, name: str) -> None:
        self.now_s += 1
        self.load_one(name)
        with self.leases.lease(name):
            pass

    def status(self, state: State) -> Status:
        return Status(state, self.leases, Spool(Path("/"), upload_bytes=1, budget_bytes=1))

    @contextmanager
    def service(self, state: State, metrics: Metrics | None = None) -> Iterator[DaemonService]:
        """The daemon's service on these models; its coroutines belong into ``run``."""
        counted = metrics or Metrics()
        transcriber = Transcriber(state, self.leases, counted, InProcessDecoder(), self.loader.load_one)
        try:
            yield DaemonService(
                state,
                self.status(state),
                self.leases,
                transcriber,
                counted,
                reload=_no_reload,
                reconcile=_no_order,
            )
        finally:
            transcriber.close()

    def close(self) -> None:
        self.leases.close()
        self.run(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def transcribed(service: DaemonService, clip: Clip) -> Transcript:
    """A request as the HTTP interface makes it; runs on the event loop of the models."""
    with await service.admit() as admission:
        job = Job(
            admission=admission,
            audio=wav(clip.samples()),
            filename="x.wav",
            model=None,
            options=Options(),
            chunking=Chunking(),
            request_id="id",
        )
        return await service.transcribe(job)


def __job(clip: Clip, **changes: Any) -> Job:
    return Job(
        audio=wav(clip.samples()), filename="x.wav", model=None, options=Options(), chunking=Chunking(),
        request_id="id", **changes
    )  # fmt: skip


def ready_state(*overrides: str) -> State:
    """The state of a daemon that has booted with these options."""
    state = State(loaded=load(Path("/dev/null"), overrides, environ={}, cwd=Path("/")), cache_dir="/nowhere")
    state.enter("ready")
    return state


def _linked(snapshot: Path, target: Path) -> Path:
    """A directory of links to the files of a model."""
    target.mkdir()
    for path in snapshot.iterdir():
        (target / path.name).symlink_to(path)
    return target


async def _no_reload() -> Reload:
    return {"ok": True, "at": 0.0, "error": None}


async def _no_order(_order: ReconcileOrder, _emit: Emit) -> Report:
    return {"exit_code": 0, "wall_s": 0.0, "plan": [], "removed": [], "models": [], "lines": []}

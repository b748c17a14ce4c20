"""The daemon as the HTTP interface sees it: one object, used on the event loop only."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from whisperd.config import Loaded, ModelTable, effective
from whisperd.daemon.admission import Backlog
from whisperd.daemon.hearer import Hearer
from whisperd.daemon.leases import Leases
from whisperd.daemon.settings import cut_options, decode_options
from whisperd.errors import Draining, EngineError, ModelLoading, ModelNotFound
from whisperd.metrics.prometheus import Figures, Metrics, ModelFigures
from whisperd.serving.interface import Admission, Emit, Job, ModelCard, Readiness, ReconcileOrder
from whisperd.serving.spool import Spool
from whisperd.speech.fallback import Options
from whisperd.speech.transcript import Transcript
from whisperd.transcription.model import LoadedModel
from whisperd.transcription.request import Transcription
from whisperd.version import VERSION

log = logging.getLogger(__name__)

Phase = Literal["starting", "ready", "reloading", "stopping"]

RETRY_AFTER_S = 2.0
BOOT_RETRY_AFTER_S = 10.0
THREADS_MAX = 10_000  # threads are made when needed; ``limits.requests`` is what counts


@dataclass(slots=True, kw_only=True)
class State:
    """What the daemon is doing, for everybody who asks. Changed on the event loop only, ``downloads`` apart.

    ``failure`` is what ended the boot. ``decided`` is set when a request need not wait for the boot any more: it is
    over, or it will take long.
    """

    loaded: Loaded
    cache_dir: str
    phase: Phase = "starting"
    booted: bool = False
    failure: str | None = None
    decided: asyncio.Event = field(default_factory=asyncio.Event)
    note: str = "starting"
    downloads: str = ""
    started_s: float = field(default_factory=time.time)
    needs_restart: tuple[str, ...] = ()
    last_reload: Mapping[str, object] | None = None
    problems: tuple[str, ...] = ()
    backlog: Backlog = field(default_factory=Backlog)
    requests_done: int = 0
    requests_failed: int = 0
    audio_s: float = 0.0

    @property
    def doing(self) -> str:
        """What goes on at this moment, in words."""
        return self.downloads or self.note

    def become(self, phase: Phase) -> None:
        """Enters a phase after the start."""
        self.phase = phase
        self.booted = self.booted or phase == "ready"
        self.decided.set()

    def wait_no_more(self) -> None:
        """The boot will take long: requests are told to come back."""
        self.decided.set()

    def wait_again(self) -> None:
        """The long part is over: requests wait for the rest of the boot."""
        if self.phase == "starting":
            self.decided.clear()


class DaemonService:
    """Answers for the daemon.

    Args:
        state: shared with the lifecycle, which changes it.
        leases: the loaded models.
        metrics: counts what is done.
        spool: holds the uploads; its use is in the figures.
        load_one: loads a declared model that was not loaded at boot.
        reload: reads the configuration again.
        reconcile: works on the cache.
    """

    def __init__(
        self,
        state: State,
        leases: Leases,
        metrics: Metrics,
        spool: Spool,
        *,
        load_one: Callable[[str], Awaitable[None]],
        reload: Callable[[], Awaitable[Mapping[str, object]]],
        reconcile: Callable[[ReconcileOrder, Emit], Awaitable[dict[str, Any]]],
    ) -> None:
        self._state = state
        self._leases = leases
        self._metrics = metrics
        self._spool = spool
        self._load_one = load_one
        self._reload = reload
        self._reconcile = reconcile
        self._threads = ThreadPoolExecutor(THREADS_MAX, thread_name_prefix="request")

    def readiness(self) -> Readiness:
        """Whether requests are served now."""
        state = self._state
        if state.phase == "stopping":
            return Readiness(ready=False, reason="the daemon is stopping", retry_after_s=RETRY_AFTER_S, draining=True)
        if state.phase == "starting":
            return Readiness(ready=False, reason=state.doing, retry_after_s=RETRY_AFTER_S)
        if (problem := self._spool.problem()) is not None:
            return Readiness(ready=False, reason=problem, retry_after_s=RETRY_AFTER_S)
        return Readiness(ready=True)

    async def admit(self) -> Admission:
        """Returns when a request may go on; raises QueueFull at once when too many are there.

        A request that comes while the models load waits for them, as it would have waited in the socket. One that
        comes during a drain is served: its connection was accepted before, and nobody else will answer it.
        """
        seat = self._state.backlog.enter(self._state.loaded.config.limits.requests)
        try:
            await self._booted()
        except BaseException:
            seat.leave()
            raise
        return seat

    async def _booted(self) -> None:
        state = self._state
        await state.decided.wait()
        if state.booted:
            return
        if state.phase == "stopping":
            reason = f"the daemon could not start: {state.failure}" if state.failure else "the daemon is stopping"
            raise Draining(reason, retry_after_s=BOOT_RETRY_AFTER_S)
        raise ModelLoading(state.doing, retry_after_s=BOOT_RETRY_AFTER_S)

    def resolve(self, name: str) -> str:
        """The declared model that a name means; raises ModelNotFound, or ModelLoading before the first load."""
        return self._leases.served.resolve(name)

    def models(self) -> Sequence[ModelCard]:
        """The declared models, the default one first."""
        return [self._card(table) for table in self._state.loaded.config.models]

    def _card(self, table: ModelTable) -> ModelCard:
        entry = self._leases.served.find(table.served_name)
        instance = entry.instance if entry is not None else None
        return ModelCard(
            id=table.served_name,
            aliases=table.aliases,
            source=table.source.base,
            revision=(entry.revision if entry is not None else None) or table.source.revision,
            loaded=instance is not None and not failure_of(instance.model),
            languages=instance.model.batcher.info.languages if instance is not None else (),
        )

    def metrics(self, accept: str) -> tuple[bytes, str]:
        """Figures for Prometheus and their content type, chosen by an Accept header."""
        state, readiness = self._state, self.readiness()
        figures = Figures(
            ready=readiness.ready,
            draining=readiness.draining,
            requests=state.backlog.n_requests,
            queue_audio_s=state.backlog.audio_s,
            spool_bytes=self._spool.used_bytes,
            spool_files=self._spool.open_files,
            models=[self._model_figures(card) for card in self.models()],
        )
        return self._metrics.render(accept, figures)

    def _model_figures(self, card: ModelCard) -> ModelFigures:
        model = self._leases.served.loaded.get(card.id)
        if model is None:
            return ModelFigures(name=card.id, revision=card.revision or "")
        info, load = model.batcher.info, model.batcher.load
        return ModelFigures(
            name=card.id,
            revision=card.revision or "",
            device=info.device,
            compute_type=info.compute_type,
            loaded=not failure_of(model),
            fallback=bool(model.batcher.health.fallback),
            waiting=load.waiting,
            running=load.running,
            memory_bytes=model.memory_bytes,
        )

    def device(self, model: str | None) -> str | None:
        """Where a model computes, for a response's header; None when it is not loaded."""
        served = self._leases.served
        try:
            found = served.loaded.get(served.resolve(model))
        except (ModelLoading, ModelNotFound):
            return None
        if found is None or failure_of(found):
            return None
        info = found.batcher.info
        return f"{info.device} (fallback)" if found.batcher.health.fallback else info.device

    def default_options(self) -> Options:
        """How a request without parameters is decoded."""
        return decode_options(self._state.loaded.config)

    async def reload(self) -> Mapping[str, object]:
        """Reads the configuration again; raises Error when anything stays as it was."""
        return await self._reload()

    async def reconcile(self, order: ReconcileOrder, tell: Emit) -> dict[str, Any]:
        """Works on the cache; raises Error when it could not even begin."""
        return await self._reconcile(order, tell)

    async def transcribe(self, job: Job) -> Transcript:
        """Does the job; cancelling the task cancels the work, and ends when the audio is no longer read."""
        job.admission.begin()
        try:
            transcript = await self._transcribe(job)
        except BaseException:
            self._state.requests_failed += 1
            raise
        self._state.requests_done += 1
        self._state.audio_s += transcript.duration_s
        return transcript

    def close(self) -> None:
        """Ends the threads; no request runs any more."""
        self._threads.shutdown(wait=False)

    def status(self) -> Mapping[str, object]:
        """Figures for people, JSON-able."""
        state = self._state
        return {
            "version": VERSION,
            "pid": os.getpid(),
            "phase": state.phase,
            "note": state.doing,
            "uptime_s": round(time.time() - state.started_s, 1),
            "config": {
                "file": str(state.loaded.path) if state.loaded.path else None,
                "values": {option.key: option.value for option in effective(state.loaded)},
                "needs_restart": list(state.needs_restart),
                "warnings": list(state.loaded.warnings),
                "last_reload": state.last_reload,
            },
            "cache_dir": state.cache_dir,
            "problems": [*state.problems, *filter(None, [self._spool.problem()])],
            "models": [self._model_status(card) for card in self.models()],
            "requests": {
                "active": state.backlog.n_requests,
                "waiting_audio_s": round(state.backlog.audio_s, 1),
                "done": state.requests_done,
                "failed": state.requests_failed,
                "audio_s": round(state.audio_s, 1),
            },
        }

    def _model_status(self, card: ModelCard) -> Mapping[str, object]:
        common: dict[str, object] = {"name": card.id, "source": card.source, "revision": card.revision}
        model = self._leases.served.loaded.get(card.id)
        if model is None:
            return common | {"loaded": False, "failure": None}
        info, health, load = model.batcher.info, model.batcher.health, model.batcher.load
        failure = failure_of(model)
        return common | {
            "loaded": not failure,
            "failure": failure or None,
            "fallback": health.fallback or None,
            "engine_pid": health.pid,
            "engine_restarts": health.restarts,
            "memory_bytes": model.memory_bytes,
            "engine": info.engine,
            "device": info.device,
            "compute_type": info.compute_type,
            "slots": info.slots,
            "windows_waiting": load.waiting,
            "windows_running": load.running,
        }

    async def _transcribe(self, job: Job) -> Transcript:
        """Where the engine dies before the client has heard anything, the request survives it once."""
        name = await self._loaded(job.model)
        hearer = Hearer(job, self._state.loaded.config.limits.queue_audio_s, self._metrics, name)
        try:
            transcript = await self._attempt(job, hearer)
        except EngineError as error:
            if not (hearer.silent and self._is_dead(name)):
                raise
            log.warning("%s: %s; it is begun again", job.request_id, error)
            job.audio.seek(0)
            transcript = await self._attempt(job, hearer)
        self._metrics.observe_transcript(name, transcript, hearer.wall_s)
        return transcript

    async def _loaded(self, model: str | None) -> str:
        """The name of a model that is in memory now; a reload may give the name to another one meanwhile."""
        name = self._leases.served.resolve(model)
        while name not in self._leases.served.loaded or self._is_dead(name):
            await self._load_one(name)
            name = self._leases.served.resolve(model)
        return name

    async def _held(self, model: str | None, held: ExitStack) -> LoadedModel:
        """The model, which stays open as long as ``held``; a reload may take it away between two looks at it."""
        while True:
            name = await self._loaded(model)
            with suppress(ModelLoading):
                return held.enter_context(self._leases.lease(name))

    async def _attempt(self, job: Job, hearer: Hearer) -> Transcript:
        config = self._state.loaded.config
        with ExitStack() as held:
            transcription = Transcription(
                await self._held(job.model, held),
                job.options,
                cut_options(config, job.chunking),
                listener=hearer.listener(),
                max_audio_s=config.limits.audio_s,
                bulk=job.bulk,
            )
            return await self._in_thread(transcription, job)

    def _is_dead(self, name: str) -> bool:
        model = self._leases.served.loaded.get(name)
        return model is not None and model.batcher.failure is not None

    async def _in_thread(self, transcription: Transcription, job: Job) -> Transcript:
        """Runs it beside the event loop; a cancelled task waits until the thread has let go of the file."""
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(self._threads, lambda: transcription.run(job.audio, name=job.filename))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            transcription.cancel()
            await asyncio.wait([running])
            if not running.cancelled():
                running.exception()  # looked at, so that asyncio does not report it: the client is gone
            raise


def failure_of(model: LoadedModel) -> str:
    """Why a model in memory does not serve at the moment; empty when it does."""
    return str(model.batcher.failure or model.batcher.health.outage)

"""What the daemon shows of itself: readiness, cards of its models, status, figures and the line for systemctl."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence

from whisperd.config import ModelTable, effective
from whisperd.daemon.leases import Leases
from whisperd.daemon.models import ServedModel, ServedModels
from whisperd.daemon.state import State
from whisperd.engine.base import EngineHealth, EngineInfo
from whisperd.errors import ModelLoading, ModelNotFound
from whisperd.metrics.prometheus import Figures, ModelFigures
from whisperd.serving import schema
from whisperd.serving.interface import ModelCard, Readiness
from whisperd.serving.spool import Spool
from whisperd.transcription.model import LoadedModel
from whisperd.version import VERSION

RETRY_AFTER_S = 2.0
SPOOL_RETRY_AFTER_S = 30.0  # an administrator has to make room
ERROR_CHARS = 140  # systemd's line has 256, and the models should be on it too


class Status:
    """Reads the state of the daemon and of its models. Used on the event loop.

    Args:
        state: what the daemon is doing.
        leases: the models.
        spool: the uploads.
    """

    def __init__(self, state: State, leases: Leases, spool: Spool) -> None:
        self._state = state
        self._leases = leases
        self._spool = spool

    def readiness(self) -> Readiness:
        """Whether a request sent now would be served."""
        state = self._state
        if state.phase == "stopping":
            return Readiness(ready=False, reason="the daemon is stopping", retry_after_s=RETRY_AFTER_S, draining=True)
        if state.phase == "starting":
            return Readiness(ready=False, reason=state.doing, retry_after_s=RETRY_AFTER_S)
        if (problem := self._spool.problem()) is not None:
            return Readiness(ready=False, reason=problem, retry_after_s=SPOOL_RETRY_AFTER_S)
        return Readiness(ready=True)

    def cards(self) -> Sequence[ModelCard]:
        """The declared models, the default one first."""
        return [self._card(table) for table in self._state.loaded.config.models]

    def device(self, model: str | None) -> str | None:
        """The device of a model, for a response's header; None when it is not in memory."""
        served = self._leases.served
        try:
            found = served.loaded.get(served.resolve(model))
        except (ModelLoading, ModelNotFound):
            return None
        if found is None or failure_of(found):
            return None
        device = found.batcher.info.device
        return f"{device} (fallback)" if found.batcher.health.fallback else device

    def as_dict(self) -> schema.Status:
        """Figures for people."""
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
            "models": [self._model(card) for card in self.cards()],
            "requests": {
                "active": state.admissions.n_requests,
                "waiting_audio_s": round(state.admissions.audio_s, 1),
                "done": state.totals.done,
                "failed": state.totals.failed,
                "audio_s": round(state.totals.audio_s, 1),
            },
        }

    def figures(self) -> Figures:
        """Figures for Prometheus."""
        readiness, admissions = self.readiness(), self._state.admissions
        return Figures(
            ready=readiness.ready,
            draining=readiness.draining,
            requests=admissions.n_requests,
            queue_audio_s=admissions.audio_s,
            spool_bytes=self._spool.used_bytes,
            spool_files=self._spool.open_files,
            models=[self._model_figures(card) for card in self.cards()],
        )

    def line(self) -> str:
        """What ``systemctl status`` shows: the work of the moment, the models with their devices, the queue."""
        state, served = self._state, self._leases.served
        if state.phase in {"starting", "stopping"}:
            return state.doing
        return "; ".join([*self._news(), serving_text(served), queue_text(state, served)])

    def serving(self) -> str:
        """The loaded models and their devices."""
        return serving_text(self._leases.served)

    def _card(self, table: ModelTable) -> ModelCard:
        entry = self._leases.served.find(table.served_name) or ServedModel(table=table)
        model = entry.instance.model if entry.instance is not None else None
        return ModelCard(
            id=table.served_name,
            aliases=table.aliases,
            source=table.source.base,
            revision=entry.revision or table.source.revision,
            loaded=model is not None and not failure_of(model),
            languages=model.batcher.info.languages if model is not None else (),
        )

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

    def _model(self, card: ModelCard) -> schema.ModelStatus:
        model = self._leases.served.loaded.get(card.id)
        failure = failure_of(model) if model is not None else ""
        common: schema.ModelStatus = {
            "name": card.id,
            "source": card.source,
            "revision": card.revision,
            "loaded": model is not None and not failure,
            "failure": failure or None,
        }
        if model is None:
            return common
        info, health, load = model.batcher.info, model.batcher.health, model.batcher.load
        return {
            **common,
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

    def _news(self) -> Iterator[str]:
        state = self._state
        if (problem := self._spool.problem()) is not None:
            yield problem[:ERROR_CHARS]
        if state.phase == "reloading":
            yield f"reloading: {state.doing}"
        elif state.downloads:
            yield state.downloads
        elif state.last_reload is not None and not state.last_reload["ok"]:
            yield f"last reload failed: {str(state.last_reload['error'])[:ERROR_CHARS]}"


def failure_of(model: LoadedModel) -> str:
    """Why a model in memory does not serve now; empty when it does."""
    return str(model.batcher.failure or model.batcher.health.outage)


def serving_text(served: ServedModels) -> str:
    """The loaded models and their devices."""
    batchers = {name: model.batcher for name, model in served.loaded.items()}
    return "serving " + ", ".join(_model_text(name, one.info, one.health) for name, one in batchers.items())


def queue_text(state: State, served: ServedModels) -> str:
    """Requests that run and windows that wait."""
    done = f"{state.totals.done} done"
    if not state.admissions.n_requests:
        return f"idle, {done}"
    waiting = sum(model.batcher.load.waiting for model in served.loaded.values())
    return f"{state.admissions.n_requests} running, {waiting} windows wait, {done}"


def _model_text(name: str, info: EngineInfo, health: EngineHealth) -> str:
    if health.outage:
        return f"{name} DOWN ({health.outage[:ERROR_CHARS]})"
    place = f"{info.device}, {info.compute_type}"
    return f"{name} ({place}, fallback: {health.fallback[:ERROR_CHARS]})" if health.fallback else f"{name} ({place})"

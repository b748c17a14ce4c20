"""The daemon as its front ends see it: one object, used on the event loop only."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from whisperd.daemon.leases import Leases
from whisperd.daemon.settings import decode_options
from whisperd.daemon.state import State
from whisperd.daemon.status import Status
from whisperd.daemon.transcriber import Transcriber
from whisperd.errors import Draining, ModelLoading
from whisperd.metrics.prometheus import Metrics
from whisperd.serving import schema
from whisperd.serving.interface import Admission, Emit, Job, ModelCard, Readiness, ReconcileOrder
from whisperd.speech.fallback import Options
from whisperd.speech.transcript import Transcript

BOOT_RETRY_AFTER_S = 10.0


class DaemonService:
    """Admits requests, and passes each question to the part of the daemon that answers it.

    Args:
        state: what the daemon is doing.
        status: what it shows of itself.
        leases: the models.
        transcriber: does the jobs.
        metrics: the figures.
        reload: reads the configuration again.
        reconcile: works on the cache.
    """

    def __init__(
        self,
        state: State,
        status: Status,
        leases: Leases,
        transcriber: Transcriber,
        metrics: Metrics,
        *,
        reload: Callable[[], Awaitable[schema.Reload]],
        reconcile: Callable[[ReconcileOrder, Emit], Awaitable[schema.Report]],
    ) -> None:
        self._state = state
        self._status = status
        self._leases = leases
        self._transcriber = transcriber
        self._metrics = metrics
        self._reload = reload
        self._reconcile = reconcile

    async def admit(self) -> Admission:
        """Returns when a request may go on; raises QueueFull at once when too many are there.

        A request that comes while the models load waits for them, as it would have waited in the socket. One that
        comes during a drain is served: its connection was accepted before, and no other process will answer it.
        """
        admission = self._state.admissions.enter(self._state.loaded.config.limits.requests)
        try:
            await self._wait_for_boot()
        except BaseException:
            admission.leave()
            raise
        return admission

    async def _wait_for_boot(self) -> None:
        state = self._state
        await state.decided.wait()
        if state.booted:
            return
        if state.phase == "stopping":
            reason = f"the daemon could not start: {state.failure}" if state.failure else "the daemon is stopping"
            raise Draining(reason, retry_after_s=BOOT_RETRY_AFTER_S)
        raise ModelLoading(state.doing, retry_after_s=BOOT_RETRY_AFTER_S)

    async def transcribe(self, job: Job) -> Transcript:
        """Does the job; cancelling the task cancels the work, and ends when the audio is no longer read."""
        return await self._transcriber.transcribe(job)

    def default_options(self) -> Options:
        """How a request without parameters is decoded."""
        return decode_options(self._state.loaded.config)

    def resolve(self, name: str) -> str:
        """The declared model that a name means; raises ModelNotFound, or ModelLoading before the first load."""
        return self._leases.served.resolve(name)

    def readiness(self) -> Readiness:
        """Whether a request sent now would be served."""
        return self._status.readiness()

    def models(self) -> Sequence[ModelCard]:
        """The declared models, the default one first."""
        return self._status.cards()

    def device(self, model: str | None) -> str | None:
        """The device of a model, for a response's header; None when it is not in memory."""
        return self._status.device(model)

    def status(self) -> schema.Status:
        """Figures for people."""
        return self._status.as_dict()

    def metrics(self, accept: str) -> tuple[bytes, str]:
        """Figures for Prometheus and their content type, chosen by an Accept header."""
        return self._metrics.render(accept, self._status.figures())

    async def reload(self) -> schema.Reload:
        """Reads the configuration again; raises Error when anything stays as it was."""
        return await self._reload()

    async def reconcile(self, order: ReconcileOrder, emit: Emit) -> schema.Report:
        """Works on the cache; raises Error when it could not even begin."""
        return await self._reconcile(order, emit)

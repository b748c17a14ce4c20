"""Transcribes jobs: finds the model, runs the job beside the event loop, and begins it again when an engine failed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

from whisperd.daemon.leases import Leases
from whisperd.daemon.settings import cut_options
from whisperd.daemon.state import State
from whisperd.errors import EngineError, ModelLoading
from whisperd.metrics.prometheus import Metrics
from whisperd.serving.interface import Job
from whisperd.speech.audio import Decoder
from whisperd.speech.transcript import Segment, Transcript
from whisperd.transcription.model import LoadedModel
from whisperd.transcription.request import Listener, Transcription

log = logging.getLogger(__name__)

THREADS_MAX = 10_000  # threads are made when needed; ``limits.requests`` is what counts


class Transcriber:
    """Transcribes jobs. Used on the event loop.

    Args:
        state: the configuration of the moment, and the totals.
        leases: the models.
        metrics: counts transcripts.
        decoder: opens the audio of jobs.
        load_one: loads a declared model that is not in memory.
    """

    def __init__(
        self,
        state: State,
        leases: Leases,
        metrics: Metrics,
        decoder: Decoder,
        load_one: Callable[[str], Awaitable[None]],
    ) -> None:
        self._state = state
        self._leases = leases
        self._metrics = metrics
        self._decoder = decoder
        self._load_one = load_one
        self._threads = ThreadPoolExecutor(THREADS_MAX, thread_name_prefix="request")

    async def transcribe(self, job: Job) -> Transcript:
        """Does the job; cancelling the task cancels the work, and ends when the audio is no longer read."""
        await job.admission.take_place()
        job.admission.begin()
        totals = self._state.totals
        try:
            transcript = await self._transcribe(job)
        except BaseException:
            totals.failed += 1
            raise
        totals.done += 1
        totals.audio_s += transcript.duration_s
        return transcript

    def close(self) -> None:
        """Ends the threads; no request runs any more."""
        self._threads.shutdown(wait=False)

    async def _transcribe(self, job: Job) -> Transcript:
        """Makes a second attempt where the engine failed before the client got a segment."""
        name = await self._load(job.model)
        relay = ProgressRelay(job, self._state.loaded.config.limits.queue_audio_s, self._metrics, name)
        try:
            transcript = await self._attempt(job, relay)
        except EngineError as error:
            if relay.has_segments or not self._has_failed(name):
                raise
            log.warning("%s: %s; it is begun again", job.request_id, error)
            job.audio.seek(0)
            transcript = await self._attempt(job, relay)
        self._metrics.observe_transcript(name, transcript, relay.wall_s)
        return transcript

    async def _attempt(self, job: Job, relay: ProgressRelay) -> Transcript:
        config = self._state.loaded.config
        with ExitStack() as stack:
            transcription = Transcription(
                await self._lease(job.model, stack),
                job.options,
                cut_options(config, job.chunking),
                listener=relay.listener(),
                max_audio_s=config.limits.audio_s,
                bulk=job.bulk,
                track=job.track,
                decoder=self._decoder,
            )
            return await self._run(transcription, job)

    async def _lease(self, model: str | None, stack: ExitStack) -> LoadedModel:
        """A model that stays open as long as ``stack``; a reload may replace it between the two steps."""
        while True:
            name = await self._load(model)
            with suppress(ModelLoading):
                return stack.enter_context(self._leases.lease(name))

    async def _load(self, model: str | None) -> str:
        """Loads the model that a request means, if need be, and returns its name; a reload may change it meanwhile."""
        name = self._leases.served.resolve(model)
        while name not in self._leases.served.loaded or self._has_failed(name):
            await self._load_one(name)
            name = self._leases.served.resolve(model)
        return name

    def _has_failed(self, name: str) -> bool:
        model = self._leases.served.loaded.get(name)
        return model is not None and model.batcher.failure is not None

    async def _run(self, transcription: Transcription, job: Job) -> Transcript:
        """Runs it beside the event loop; a cancelled task waits until the thread has released the file."""
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


class ProgressRelay:
    """Passes the progress of a job to its client, its admission and the metrics; on the job's thread.

    ``has_segments`` is set with the first segment that the client got.
    """

    def __init__(self, job: Job, queue_audio_s: float, metrics: Metrics, model: str) -> None:
        self._job = job
        self._queue_audio_s = queue_audio_s
        self._metrics = metrics
        self._model = model
        self._started_s = time.monotonic()
        self.has_segments = False

    @property
    def wall_s(self) -> float:
        """Time since the upload was complete."""
        return time.monotonic() - self._started_s

    def listener(self) -> Listener:
        """The callbacks for the transcription."""
        return Listener(on_length=self._on_length, on_segment=self._on_segment, on_progress=self._on_progress)

    def _on_length(self, total_s: float) -> None:
        self._job.admission.announce(total_s, self._queue_audio_s)

    def _on_segment(self, segment: Segment) -> None:
        if not self.has_segments:
            self.has_segments = True
            self._metrics.observe_first_segment(self._model, self.wall_s)
        self._job.on_segment(segment)

    def _on_progress(self, done_s: float, total_s: float | None) -> None:
        self._job.admission.progress(done_s)
        self._job.on_progress(done_s, total_s)

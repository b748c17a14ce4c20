"""A daemon without models, and the real server around it in a thread."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.types import ASGIApp

from whisperd.daemon.admission import Admissions
from whisperd.errors import Error, ModelNotFound
from whisperd.metrics import HttpMeter
from whisperd.serving import schema
from whisperd.serving.http import create_app
from whisperd.serving.http.app import refuse_unready
from whisperd.serving.http.server import Server
from whisperd.serving.interface import (
    Admission,
    ApiSettings,
    Emit,
    Job,
    ModelCard,
    Readiness,
    ReconcileOrder,
    ServerSettings,
)
from whisperd.serving.sockets import bind_unix
from whisperd.serving.spool import Spool
from whisperd.speech.fallback import Options
from whisperd.speech.transcript import Segment, TokenScore, Transcript, WindowStatistics, Word

PATIENCE_S = 20.0
MODEL = "openai/whisper-tiny.en"


def segment(start_s: float, end_s: float, text: str) -> Segment:
    words = text.split()
    step_s = (end_s - start_s) / len(words)
    return Segment(
        start_s=start_s,
        end_s=end_s,
        text=text,
        tokens=(50363, 1, 2, 50413),
        temperature=0.0,
        avg_logprob=-0.25,
        compression_ratio=1.5,
        no_speech_prob=0.01,
        words=tuple(
            Word(text=f" {word}", start_s=start_s + n * step_s, end_s=start_s + (n + 1) * step_s, probability=0.9)
            for n, word in enumerate(words)
        ),
    )


TRANSCRIPT = Transcript(
    task="transcribe",
    language="en",
    language_probability=0.98,
    duration_s=4.5,
    segments=(segment(0.0, 2.0, " Hello there."), segment(2.5, 4.5, " General <Kenobi> & Zoë.")),
    windows=WindowStatistics(decoded=1),
)
TEXT = "Hello there. General <Kenobi> & Zoë."


STATUS: schema.Status = {
    "version": "0.1.0",
    "pid": 1,
    "phase": "ready",
    "note": "ready",
    "uptime_s": 1.5,
    "config": {"file": None, "values": {}, "needs_restart": [], "warnings": [], "last_reload": None},
    "cache_dir": "/nowhere",
    "problems": [],
    "models": [{"name": MODEL, "source": MODEL, "revision": None, "loaded": False, "failure": None}],
    "requests": {"active": 0, "waiting_audio_s": 0.0, "done": 0, "failed": 0, "audio_s": 0.0},
}


class FakeService:
    """Reads the audio, emits the segments of ``transcript`` and returns it; can wait or fail."""

    def __init__(self) -> None:
        self.now = Readiness(ready=True)
        self.error: Exception | None = None  # raised before the first segment
        self.late_error: Exception | None = None  # raised after the last one
        self.reload_error: Error | None = None
        self.transcript = TRANSCRIPT
        self.requests_max = 64
        self.backlog = Admissions()
        self.waits_first = False  # before the first segment
        self.waits_last = False  # after the last segment
        self.jobs: list[Job] = []
        self.audio: list[bytes] = []
        self.orders: list[ReconcileOrder] = []
        self.started = threading.Event()
        self.cancelled = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._gate = asyncio.Event()

    def readiness(self) -> Readiness:
        return self.now

    async def admit(self) -> Admission:
        refuse_unready(self)
        return self.backlog.enter(self.requests_max)

    def resolve(self, name: str) -> str:
        if name in {"nope", "gone", ""}:
            raise ModelNotFound(f"no model {name!r} is served here", param="model")
        return MODEL

    def models(self) -> Sequence[ModelCard]:
        return [
            ModelCard(
                id=MODEL, aliases=("whisper-1",), source=MODEL, revision="a" * 40, loaded=True, languages=("en",)
            ),
            ModelCard(id="local"),
        ]

    def device(self, model: str | None) -> str | None:
        return None if model == "nope" else "cpu (fallback)"

    def status(self) -> schema.Status:
        return STATUS

    def metrics(self, accept: str) -> tuple[bytes, str]:
        assert isinstance(accept, str)
        return b"# EOF\n", "text/plain; version=0.0.4"

    def default_options(self) -> Options:
        return Options()

    async def transcribe(self, job: Job) -> Transcript:
        self._loop = asyncio.get_running_loop()
        await job.admission.take_place()
        self.jobs.append(job)
        self.audio.append(job.audio.read())
        self.started.set()
        try:
            return await self._work(job)
        except asyncio.CancelledError:
            assert not job.audio.closed
            self.cancelled.set()
            raise

    async def reload(self) -> schema.Reload:
        if self.reload_error is not None:
            raise self.reload_error
        return {"ok": True, "at": 1.8e9, "error": None, "changed": [], "needs_restart": [], "warnings": []}

    async def reconcile(self, order: ReconcileOrder, emit: Emit) -> schema.Report:
        self.orders.append(order)
        if self.reload_error is not None:
            raise self.reload_error
        emit("whisperd.plan", {"lines": ["  = a", "No changes."], "pending": False})
        return {"exit_code": 0, "wall_s": 0.1, "plan": ["  = a"], "removed": [], "models": [], "lines": []}

    def release(self) -> None:
        """Ends the waiting; from any thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._gate.set)

    async def _work(self, job: Job) -> Transcript:
        if job.model is not None:
            self.resolve(job.model)
        if self.waits_first:
            await self._gate.wait()
        if self.error is not None:
            raise self.error
        await asyncio.to_thread(self._tell, job)
        if self.waits_last:
            await self._gate.wait()
        if self.late_error is not None:
            raise self.late_error
        return replace(self.transcript, task=job.options.task, segments=tuple(self._segments(job)))

    def _tell(self, job: Job) -> None:
        for one in self._segments(job):
            job.on_segment(one)
            job.on_progress(one.end_s, self.transcript.duration_s)

    def _segments(self, job: Job) -> list[Segment]:
        """Segments of the transcript, with words and a score for each word where the job asks for them."""
        return [
            replace(
                one,
                words=one.words if job.options.word_timestamps else None,
                scores=tuple(TokenScore(data=word.text.encode(), logprob=-0.5) for word in one.words or ())
                if job.options.token_scores
                else None,
            )
            for one in self.transcript.segments
        ]


class LogLines(logging.Handler):
    """The daemon's log as a queue; the line of a request is its last event."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: queue.Queue[str] = queue.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.put(record.getMessage())

    def next(self) -> str:
        return self._lines.get(timeout=PATIENCE_S)


@contextmanager
def requests_log() -> Iterator[LogLines]:
    lines = LogLines()
    logger = logging.getLogger("whisperd.serving.http.middleware")
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(lines)
    try:
        yield lines
    finally:
        logger.removeHandler(lines)
        logger.setLevel(before)


@contextmanager
def serving(
    app: ASGIApp, path: Path, settings: ServerSettings | None = None, meter: HttpMeter | None = None
) -> Iterator[Callable[[], None]]:
    """The real server in a thread at ``path``; yields what stops it."""
    server = Server(settings or ServerSettings(drain_s=10), meter)
    listener = bind_unix(path, mode=0o600, group=None)
    loop: queue.Queue[asyncio.AbstractEventLoop] = queue.Queue()

    async def main() -> None:
        loop.put(asyncio.get_running_loop())
        await server.serve(app, [listener])

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    running = loop.get(timeout=PATIENCE_S)

    def stop() -> None:
        if not running.is_closed():
            running.call_soon_threadsafe(server.stop)

    try:
        yield stop
    finally:
        stop()
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "the server did not stop"


@dataclass(slots=True, kw_only=True)
class Daemon:
    """A fake daemon with everything that a test inspects."""

    service: FakeService
    app: Starlette
    spool: Spool
    path: Path
    log: LogLines
    stop: Callable[[], None]

    def finished(self) -> str:
        """Waits for the end of a request; its upload must be gone. Returns its line in the log."""
        line = self.log.next()
        assert (self.spool.open_files, self.spool.used_bytes, self.service.backlog.n_requests) == (0, 0, 0)
        return line


@contextmanager
def daemon(
    directory: Path, *, server: ServerSettings | None = None, spool: Spool | None = None, **changes: Any
) -> Iterator[Daemon]:
    """A fake daemon with its spool and socket in ``directory``; ``changes`` go into ApiSettings."""
    service = FakeService()
    spool = spool or Spool(directory, upload_bytes=1_000_000, budget_bytes=1_500_000)
    app = create_app(service, ApiSettings(**changes), spool)
    path = directory / "whisperd.sock"
    with requests_log() as log, serving(app, path, server) as stop:
        yield Daemon(service=service, app=app, spool=spool, path=path, log=log, stop=stop)

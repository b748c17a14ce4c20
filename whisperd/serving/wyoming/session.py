"""One connection: utterances come in, transcripts go out, by the same service as over HTTP."""

from __future__ import annotations

import asyncio
import io
import logging
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import quote

from whisperd.errors import Cancelled, Draining, Error
from whisperd.metrics import WyomingMeter
from whisperd.serving.interface import Admission, Chunking, Job, Service
from whisperd.serving.spool import Spool
from whisperd.serving.tasks import (
    CANCELLED_RETRY_AFTER_S,
    Pace,
    SlowWatch,
    UploadStalled,
    cancel_and_wait,
    run_unless_gone,
)
from whisperd.serving.wyoming.info import info_event
from whisperd.serving.wyoming.messages import read_event
from whisperd.serving.wyoming.recording import Recording
from whisperd.serving.wyoming.request import Request, parse_request
from whisperd.speech.transcript import Segment, Transcript

if TYPE_CHECKING:
    from wyoming.event import Event

log = logging.getLogger(__name__)

EVENTS_AHEAD = 2  # that were read and not looked at: behind them the client waits
LINGER_S = 10.0  # for a client to end its message, and to read why its connection is closed
LINGER_BYTES = 65_536
OK = "ok"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Limits in time: for one event, between two utterances, for the client's reading, for its audio.

    ``audio_s`` returns the longest utterance that is allowed now.
    """

    event_s: float = 10.0
    idle_s: float = 75.0
    send_idle_s: float = 60.0
    pace: Pace = field(default_factory=lambda: Pace(idle_s=60.0, bytes_per_s=512.0))
    audio_s: Callable[[], float]


@dataclass(slots=True, kw_only=True)
class _Turn:
    """One utterance, for the log and the figures."""

    request_id: str = field(default_factory=lambda: f"req_{uuid.uuid4().hex}")
    started_s: float = field(default_factory=time.monotonic)
    complete_s: float | None = None  # when the audio was complete
    recording: Recording | None = None
    model: str = "-"
    result: str = OK
    is_started: bool = False  # transcript-start was sent
    warnings: tuple[str, ...] = ()

    def report(self) -> None:
        """Logs the utterance in one line; never a transcript."""
        wall_ms = round((time.monotonic() - self.started_s) * 1000)
        n_bytes, audio_s = (self.recording.n_bytes, self.recording.duration_s) if self.recording else (0, 0.0)
        fields = {
            "WHISPERD_REQUEST_ID": self.request_id,
            "WHISPERD_PATH": "wyoming",
            "WHISPERD_STATUS": self.result,
            "WHISPERD_WALL_MS": wall_ms,
            "WHISPERD_AUDIO_S": f"{audio_s:.1f}",
            "WHISPERD_MODEL": quote(self.model),
        }
        log.info(
            "wyoming %s in %d ms: %d bytes, %.1f s of audio, model %s, %s%s",
            self.result, wall_ms, n_bytes, audio_s, quote(self.model), self.request_id,
            "".join(f"; warning: {one}" for one in self.warnings),
            extra={"fields": fields},
        )  # fmt: skip


def _empty(language: str | None) -> Transcript:
    """The transcript of no audio."""
    return Transcript(task="transcribe", language=language or "", language_probability=0.0, duration_s=0.0, segments=())


class Session:
    """The connection of one client; ``run`` returns when it is gone, after its first mistake, or after ``stop``.

    Args:
        reader: made with a limit of messages.HEADER_BYTES.
        writer: closed at the end.
        service: the daemon.
        spool: where the audio waits.
        settings: limits in time.
        meter: counts each utterance.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        service: Service,
        spool: Spool,
        settings: Settings,
        meter: WyomingMeter,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._service = service
        self._spool = spool
        self._settings = settings
        self._meter = meter
        self._events: asyncio.Queue[Event | Error | None] = asyncio.Queue(EVENTS_AHEAD)
        self._gone = asyncio.Event()
        self._one_at_a_time = asyncio.Lock()
        self._stopping = False
        self._idle: asyncio.Task[Event | None] | None = None

    async def run(self) -> None:
        """Answers until the end; raises nothing that a client could cause."""
        reading = asyncio.create_task(self._read())
        try:
            await self._converse()
        except Error as error:
            await cancel_and_wait(reading)
            await self._end_with(error)
        except Exception:
            log.exception("a Wyoming connection is closed: unexpected error")
        finally:
            await cancel_and_wait(reading)
            self._writer.close()
            with suppress(OSError):
                await self._writer.wait_closed()

    def stop(self) -> None:
        """Takes no more utterances; one that has begun gets its transcript."""
        self._stopping = True
        if self._idle is not None:
            self._idle.cancel()

    async def _read(self) -> None:
        """Reads ahead, so that a client that leaves is noticed whatever goes on; answers what needs no state."""
        try:
            while (event := await read_event(self._reader, self._settings.event_s)) is not None:
                if not await self._answer_at_once(event):
                    await self._events.put(event)
        except OSError:
            pass  # as good as its end
        except Error as error:
            await self._events.put(error)
            return
        except Exception:
            log.exception("a Wyoming connection is closed: unexpected error")
            await self._events.put(Error("internal error; the log of the daemon has more"))
            return
        self._gone.set()
        await self._events.put(None)

    async def _answer_at_once(self, event: Event) -> bool:
        if event.type == "ping":
            from wyoming.ping import Ping, Pong

            await self._send(Pong(text=Ping.from_event(event).text).event())
        elif event.type == "describe":
            await self._send(info_event(self._service.models()))
        else:
            return False
        return True

    async def _converse(self) -> None:
        while not self._stopping and (event := await self._between()) is not None:
            if event.type in {"transcribe", "audio-start", "audio-chunk", "audio-stop"}:
                await self._turn(event)

    async def _between(self) -> Event | None:
        """The next event between two utterances; None when the client is gone, or sends none in time."""
        self._idle = asyncio.create_task(self._next(self._settings.idle_s))
        try:
            await asyncio.wait({self._idle})
            return None if self._idle.cancelled() else self._idle.result()
        except TimeoutError:
            return None
        except Error as error:
            self._meter.observe_utterance(error.code, 0.0)
            raise
        finally:
            await cancel_and_wait(self._idle)
            self._idle = None

    async def _next(self, patience_s: float) -> Event | None:
        async with asyncio.timeout(patience_s):
            found = await self._events.get()
        if isinstance(found, Error):
            raise found
        return found

    def _parsed(self, event: Event) -> Request:
        request = parse_request(event.data, self._service.default_options())
        if request.model is not None:
            self._service.resolve(request.model)
        return request

    async def _turn(self, first: Event) -> None:
        """One utterance, with its line in the log."""
        turn = _Turn()
        try:
            await self._send_last(turn, await run_unless_gone(self._served(turn, first), self._gone.wait()))
        except Error as error:
            turn.result = error.code
            raise
        except asyncio.CancelledError:  # the listener does this to what outlives the drain
            turn.result = Draining.code
            raise Draining("the daemon stopped first", retry_after_s=CANCELLED_RETRY_AFTER_S) from None
        except Exception as error:
            turn.result = Error.code
            log.exception("%s: unexpected error", turn.request_id)
            raise Error(f"internal error; the log of the daemon has more under {turn.request_id}") from error
        finally:
            turn.report()
            complete_s = time.monotonic() if turn.complete_s is None else turn.complete_s
            self._meter.observe_utterance(turn.result, time.monotonic() - complete_s)

    async def _served(self, turn: _Turn, first: Event) -> Transcript:
        with await self._service.admit() as admission, self._spool.create() as file:
            turn.recording = Recording(file, self._settings.audio_s())
            with SlowWatch(self._settings.pace, admission.yield_place) as watch:
                request = await self._recorded(turn.recording, first, watch)
            turn.complete_s = time.monotonic()
            audio = turn.recording.finished()
            if audio is None:  # a button that was only touched
                return _empty(request.options.language)
            transcript = await self._transcribed(turn, admission, audio, request)
            turn.warnings = transcript.warnings
            return transcript

    async def _recorded(self, recording: Recording, first: Event, watch: SlowWatch) -> Request:
        """Records until ``audio-stop``; returns the request."""
        request = Request(options=self._service.default_options())
        started_s, event = time.monotonic(), first
        pace = self._settings.pace
        while event.type != "audio-stop":
            if event.type == "audio-chunk":
                recording.add(event)
                watch.n_bytes = recording.n_bytes
            elif event.type == "transcribe":
                request = self._parsed(event)
            if not pace.allows(recording.n_bytes, time.monotonic() - started_s):
                raise UploadStalled(f"the audio is slower than {pace.bytes_per_s:g} bytes a second")
            event = await self._next_in_utterance(pace.idle_s)
        return request

    async def _next_in_utterance(self, patience_s: float) -> Event:
        try:
            event = await self._next(patience_s)
        except TimeoutError as error:
            raise UploadStalled(f"no audio came for {patience_s:g} s, and no audio-stop") from error
        if event is None:
            raise Cancelled("the client went away")
        return event

    async def _transcribed(self, turn: _Turn, admission: Admission, audio: BinaryIO, request: Request) -> Transcript:
        """Sends each segment as soon as it is known; clients that want the whole wait for ``transcript``."""
        turn.model = request.model or next((card.id for card in self._service.models()), "-")
        loop = asyncio.get_running_loop()
        segments: asyncio.Queue[Segment | None] = asyncio.Queue()

        def put(segment: Segment) -> None:
            loop.call_soon_threadsafe(segments.put_nowait, segment)

        job = Job(
            admission=admission,
            audio=audio,
            filename="the utterance",
            model=request.model,
            options=replace(request.options, task="transcribe"),
            chunking=Chunking(),
            request_id=turn.request_id,
            on_segment=put,
        )
        work = asyncio.create_task(self._service.transcribe(job))
        work.add_done_callback(lambda _: segments.put_nowait(None))
        try:
            await self._send_chunks(turn, segments, request.options.language)
            return work.result()
        finally:
            await cancel_and_wait(work)

    async def _send_chunks(self, turn: _Turn, segments: asyncio.Queue[Segment | None], language: str | None) -> None:
        from wyoming.asr import TranscriptChunk

        while (segment := await segments.get()) is not None:
            text = segment.text if turn.is_started else segment.text.lstrip()
            await self._send_start(turn, language)
            await self._send(TranscriptChunk(text=text).event())

    async def _send_start(self, turn: _Turn, language: str | None) -> None:
        """Sends ``transcript-start`` once."""
        from wyoming.asr import TranscriptStart

        if not turn.is_started:
            turn.is_started = True
            await self._send(TranscriptStart(language=language).event())

    async def _send_last(self, turn: _Turn, transcript: Transcript) -> None:
        """Ends the stream of events, which silence has as well."""
        from wyoming import asr

        language = transcript.language or None
        await self._send_start(turn, language)
        await self._send(asr.Transcript(text=transcript.text, language=language).event())
        with suppress(Cancelled):  # Home Assistant closes the connection as soon as it has the transcript
            await self._send(asr.TranscriptStop().event())

    async def _send(self, event: Event) -> None:
        """Raises Cancelled when the client is gone or does not read."""
        from wyoming.event import write_event

        # not async_write_event: writelines has no flow control in CPython before 3.12.9 and 3.13.2 (CVE-2024-12254)
        written = io.BytesIO()
        write_event(event, written)
        try:
            async with self._one_at_a_time, asyncio.timeout(self._settings.send_idle_s):
                self._writer.write(written.getvalue())
                await self._writer.drain()
        except (TimeoutError, OSError) as error:
            self._writer.transport.abort()
            raise Cancelled("the client went away, or does not read") from error

    async def _end_with(self, error: Error) -> None:
        """Sends the error and closes: some clients wait for ever for an event after an error."""
        from wyoming.error import Error as ErrorMessage

        if self._gone.is_set() or self._writer.transport.is_closing():
            return
        with suppress(Cancelled, OSError, TimeoutError):
            await self._send(ErrorMessage(text=str(error), code=error.code).event())
            self._writer.write_eof()
            async with asyncio.timeout(LINGER_S):
                while await self._reader.read(LINGER_BYTES):
                    pass  # what is closed with something unread in it loses the answer

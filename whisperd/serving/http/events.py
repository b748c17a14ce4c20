"""A transcription told while it runs: server-sent events in OpenAI's shape, and work that ends with its listener."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

from starlette.types import Receive

from whisperd.serving.http.middleware import RequestContext
from whisperd.serving.http.responses import scores, usage, verbose
from whisperd.serving.interface import Job, Service
from whisperd.serving.tasks import cancel_and_wait, run_unless_gone
from whisperd.speech import formats
from whisperd.speech.transcript import Segment, Transcript

T = TypeVar("T")

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold the events back
]


class EventQueue:
    """Frames from the thread of a job to the event loop, in order."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue()

    def put(self, frame: bytes) -> None:
        """Adds a frame; from any thread."""
        self._loop.call_soon_threadsafe(self._queue.put_nowait, frame)

    def end(self, _: object) -> None:
        """Nothing comes any more; also the callback of a task that is done."""
        self._queue.put_nowait(None)

    async def next(self, patience_s: float) -> bytes | None:
        """The next frame, a keep-alive when there is none in time, None at the end."""
        try:
            async with asyncio.timeout(patience_s):
                return await self._queue.get()
        except TimeoutError:
            return KEEP_ALIVE


class EventWriter:
    """Turns what a job tells into frames.

    Args:
        feed: where the frames go.
        extended: whether the client asked for events that OpenAI does not have; its own client breaks on them.
    """

    def __init__(self, feed: EventQueue, *, extended: bool) -> None:
        self._feed = feed
        self._extended = extended
        self._n_segments = 0

    def hooked(self, job: Job) -> Job:
        """The job with its callbacks leading here."""
        hooked = replace(job, on_segment=self._segment)
        return replace(hooked, on_progress=self._progress) if self._extended else hooked

    def _segment(self, segment: Segment) -> None:
        text = segment.text if self._n_segments else segment.text.lstrip()
        frame = event("transcript.text.delta", delta=text, **scores([segment]))
        if self._extended:
            frame += event("whisperd.segment", **formats.segment_dict(self._n_segments, segment))
        self._n_segments += 1
        self._feed.put(frame)

    def _progress(self, done_s: float, total_s: float | None) -> None:
        self._feed.put(event("whisperd.progress", done_s=done_s, total_s=total_s))

    def last(self, transcript: Transcript, wall_s: float) -> bytes:
        """The frames behind the last segment."""
        whole = event("whisperd.transcript", **verbose(transcript, wall_s)) if self._extended else b""
        told = scores(transcript.segments)
        return whole + event("transcript.text.done", text=transcript.text, usage=usage(transcript), **told) + DONE


async def stream(
    service: Service, job: Job, context: RequestContext, *, extended: bool, keep_alive_s: float
) -> Transcript:
    """Does the job and sends what it tells.

    Nothing is sent before the first news or ``keep_alive_s``, so that a job that fails at once still has a status.
    """
    feed = EventQueue()
    teller = EventWriter(feed, extended=extended)
    return await send_events(
        feed,
        service.transcribe(teller.hooked(job)),
        context,
        keep_alive_s=keep_alive_s,
        last=lambda transcript: teller.last(transcript, context.wall_s),
    )


async def send_events(
    feed: EventQueue,
    doing: Coroutine[Any, Any, T],
    context: RequestContext,
    *,
    keep_alive_s: float,
    last: Callable[[T], bytes],
) -> T:
    """Does the work, sends what it puts into ``feed``, and at the end ``last`` of its result."""
    work = asyncio.create_task(doing)
    work.add_done_callback(feed.end)
    try:
        frame = await feed.next(keep_alive_s)
        if frame is None:
            work.result()
        context.streaming = True
        await context.send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        while frame is not None:
            await context.send({"type": "http.response.body", "body": frame, "more_body": True})
            frame = await feed.next(keep_alive_s)
        result = work.result()
        await context.send({"type": "http.response.body", "body": last(result)})
        return result
    finally:
        await cancel_and_wait(work)


async def while_connected(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """Does the work, or raises Cancelled when the client goes away first; then the work has ended."""
    return await run_unless_gone(work, _gone(receive))


def event(kind: str, **members: Any) -> bytes:
    """One server-sent event; its type is in the data too, as OpenAI does it."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind} | members)}\n\n".encode()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

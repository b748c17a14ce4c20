"""Server-sent events in OpenAI's shape, sent while a job runs; the work ends when its client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

from starlette.types import Receive

from whisperd.serving.http.middleware import RequestContext
from whisperd.serving.http.responses import done_members, scores, verbose
from whisperd.serving.interface import Job
from whisperd.serving.tasks import cancel_and_wait, run_unless_gone
from whisperd.speech import formats
from whisperd.speech.transcript import Segment, Transcript

T = TypeVar("T")
Transcribe = Callable[[Job], Coroutine[Any, Any, Transcript]]

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
        """Marks the end; also the callback of a task that is done."""
        self._queue.put_nowait(None)

    async def next(self, patience_s: float) -> bytes | None:
        """Returns the next frame, a keep-alive after ``patience_s`` without one, None at the end."""
        try:
            async with asyncio.timeout(patience_s):
                return await self._queue.get()
        except TimeoutError:
            return KEEP_ALIVE


class EventWriter:
    """Writes the segments and the progress of a job as frames.

    Args:
        queue: where the frames go.
        extended: whether the client asked for events that OpenAI does not have; OpenAI's own client breaks on them.
    """

    def __init__(self, queue: EventQueue, *, extended: bool) -> None:
        self._queue = queue
        self._extended = extended
        self._n_segments = 0

    def attached(self, job: Job) -> Job:
        """The job with its callbacks leading here."""
        attached = replace(job, on_segment=self._segment)
        return replace(attached, on_progress=self._progress) if self._extended else attached

    def last(self, transcript: Transcript, job: Job, wall_s: float) -> bytes:
        """The frames after the last segment."""
        done = event("transcript.text.done", **done_members(transcript, logprobs=job.options.token_scores)) + DONE
        if not self._extended:
            return done
        return event("whisperd.transcript", **verbose(transcript, wall_s, words=job.options.word_timestamps)) + done

    def _segment(self, segment: Segment) -> None:
        text = segment.text if self._n_segments else segment.text.lstrip()
        frame = event("transcript.text.delta", delta=text, **scores([segment], asked=segment.scores is not None))
        if self._extended:
            frame += event("whisperd.segment", **formats.segment_dict(self._n_segments, segment))
        self._n_segments += 1
        self._queue.put(frame)

    def _progress(self, done_s: float, total_s: float | None) -> None:
        self._queue.put(event("whisperd.progress", done_s=done_s, total_s=total_s))


async def stream(
    transcribe: Transcribe, job: Job, context: RequestContext, *, extended: bool, keep_alive_s: float
) -> Transcript:
    """Runs the job and sends its events.

    Nothing is sent before the first event or ``keep_alive_s``, so that a job that fails at once still has a status.
    """
    queue = EventQueue()
    writer = EventWriter(queue, extended=extended)
    return await send_events(
        queue,
        transcribe(writer.attached(job)),
        context,
        keep_alive_s=keep_alive_s,
        last=lambda transcript: writer.last(transcript, job, context.wall_s),
    )


async def send_events(
    queue: EventQueue,
    work: Coroutine[Any, Any, T],
    context: RequestContext,
    *,
    keep_alive_s: float,
    last: Callable[[T], bytes],
) -> T:
    """Runs ``work``, sends what it puts into ``queue``, and at the end ``last`` of its result."""
    task = asyncio.create_task(work)
    task.add_done_callback(queue.end)
    try:
        frame = await queue.next(keep_alive_s)
        if frame is None:
            task.result()
        context.streaming = True
        await context.send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        while frame is not None:
            await context.send({"type": "http.response.body", "body": frame, "more_body": True})
            frame = await queue.next(keep_alive_s)
        result = task.result()
        await context.send({"type": "http.response.body", "body": last(result)})
        return result
    finally:
        await cancel_and_wait(task)


async def while_connected(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """Runs ``work``; raises Cancelled when the client goes away first, after the work has ended."""
    return await run_unless_gone(work, _gone(receive))


def event(kind: str, **members: Any) -> bytes:
    """One server-sent event; its type is in the data too, as with OpenAI."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind} | members, allow_nan=False)}\n\n".encode()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

"""Bodies of answers: transcripts in the format that was asked for, errors in OpenAI's envelope."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, assert_never

from starlette.responses import JSONResponse, PlainTextResponse, Response

from whisperd.errors import DeadlineExceeded, Error, Unavailable
from whisperd.serving.http.params import ResponseFormat
from whisperd.speech import formats
from whisperd.speech.subtitles import Layout
from whisperd.speech.transcript import Segment, Transcript


def transcript_response(
    transcript: Transcript, response_format: ResponseFormat, wall_s: float, layout: Layout | None = None
) -> Response:
    """The whole transcript as one answer; ``layout`` is for subtitles."""
    match response_format:
        case "json":
            return _json(transcript)
        case "verbose_json":
            return JSONResponse(verbose(transcript, wall_s))
        case "text":
            return PlainTextResponse(transcript.text + "\n")
        case "srt":
            return PlainTextResponse(formats.srt(transcript, layout))
        case "vtt":
            return PlainTextResponse(formats.vtt(transcript, layout), media_type="text/vtt")
        case _:
            assert_never(response_format)


def verbose(transcript: Transcript, wall_s: float) -> dict[str, Any]:
    """OpenAI's ``verbose_json`` with its usage and what whisperd adds."""
    return formats.verbose_json(transcript) | {
        "usage": usage(transcript),
        "x_whisperd": formats.extension(transcript, wall_s),
    }


def usage(transcript: Transcript) -> dict[str, Any]:
    """What OpenAI would bill."""
    return {"type": "duration", "seconds": round(transcript.duration_s, 3)}


def error_response(error: Error, *, headers: Mapping[str, str] | None = None) -> Response:
    """An error with its status; one that passes says when to come back."""
    return JSONResponse(
        error_body(error), status_code=error.http_status, headers=retry_headers(error) | dict(headers or {})
    )


def error_bytes(error: Error, *, status: HTTPStatus | None = None, retry_after_s: int | None = None) -> bytes:
    """A whole answer of HTTP/1.1 for a client that never reaches the application."""
    body = json.dumps(error_body(error)).encode()
    status = status or HTTPStatus(error.http_status)
    head = [
        f"HTTP/1.1 {status} {status.phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "connection: close",
    ]
    if retry_after_s is not None:
        head.append(f"retry-after: {retry_after_s}")
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def error_body(error: Error) -> dict[str, Any]:
    """OpenAI's envelope."""
    return envelope(str(error), type=error.type, code=error.code, param=getattr(error, "param", None))


def envelope(message: str, *, type: str, code: str, param: str | None = None) -> dict[str, Any]:
    """OpenAI's envelope from its four members."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def retry_headers(error: Error) -> dict[str, str]:
    """Both spellings of the time to wait: whole seconds for everybody, milliseconds for OpenAI's clients.

    Those clients also repeat what took too long, unless they are told not to.
    """
    if isinstance(error, DeadlineExceeded):
        return {"x-should-retry": "false"}
    if not isinstance(error, Unavailable):
        return {}
    return {
        "retry-after": str(math.ceil(error.retry_after_s)),
        "retry-after-ms": str(math.ceil(error.retry_after_s * 1000)),
    }


def scores(segments: Sequence[Segment]) -> dict[str, Any]:
    """The member ``logprobs`` when it was asked for."""
    asked = any(segment.scores is not None for segment in segments)
    return {"logprobs": formats.logprobs(segments)} if asked else {}


def _json(transcript: Transcript) -> Response:
    return JSONResponse({"text": transcript.text, "usage": usage(transcript)} | scores(transcript.segments))

"""Bodies of answers: transcripts in the format that was asked for, errors in OpenAI's envelope."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, assert_never

from starlette.responses import JSONResponse, PlainTextResponse, Response

from whisperd.errors import DeadlineExceeded, Error, InvalidApiKey, Unavailable
from whisperd.serving.http.params import Parameters
from whisperd.speech import formats
from whisperd.speech.transcript import Segment, Transcript

AUDIO_TOKENS_PER_S = 10  # of OpenAI's models, which count 100 ms of audio as one token


def transcript_response(transcript: Transcript, parameters: Parameters, wall_s: float) -> Response:
    """The whole transcript as one answer, in the format that was asked for."""
    match parameters.response_format:
        case "json":
            return JSONResponse(_json(transcript, logprobs=parameters.options.token_scores))
        case "verbose_json":
            words, segments = parameters.options.word_timestamps, parameters.segments
            return JSONResponse(verbose(transcript, wall_s, words=words, segments=segments))
        case "text":
            return PlainTextResponse(transcript.text + "\n")
        case "srt":
            return PlainTextResponse(formats.srt(transcript, parameters.layout))
        case "vtt":
            return PlainTextResponse(formats.vtt(transcript, parameters.layout), media_type="text/vtt")
        case _:
            assert_never(parameters.response_format)


def verbose(transcript: Transcript, wall_s: float, *, words: bool, segments: bool = True) -> dict[str, Any]:
    """OpenAI's ``verbose_json`` with its usage and what whisperd adds.

    Args:
        transcript: the result.
        wall_s: time since the request's head.
        words: whether words were asked for: the list is there even when nobody spoke.
        segments: False leaves the segments out, as OpenAI does where only words are asked for.
    """
    whole = formats.verbose_json(transcript)
    if words:
        whole.setdefault("words", [])
    if not segments:
        del whole["segments"]
    return (
        whole
        | {"usage": _seconds(transcript), "x_whisperd": formats.extension(transcript, wall_s)}
        | warnings_member(transcript)
    )


def done_members(transcript: Transcript, *, logprobs: bool) -> dict[str, Any]:
    """Members of the event ``transcript.text.done``. Its usage must be in tokens: OpenAI's type knows no other."""
    return (
        {"text": transcript.text, "usage": _tokens(transcript)}
        | _languages(transcript)
        | scores(transcript.segments, asked=logprobs)
        | warnings_member(transcript)
    )


def warnings_member(transcript: Transcript) -> dict[str, Any]:
    """The member ``warnings`` when there are any."""
    return {"warnings": list(transcript.warnings)} if transcript.warnings else {}


def _seconds(transcript: Transcript) -> dict[str, Any]:
    """Usage of a model that OpenAI bills by time."""
    return {"type": "duration", "seconds": round(transcript.duration_s, 3)}


def _tokens(transcript: Transcript) -> dict[str, Any]:
    """Usage of a model that OpenAI bills by token: audio at OpenAI's rate, and the tokens that the model wrote."""
    n_input = math.ceil(transcript.duration_s * AUDIO_TOKENS_PER_S)
    n_output = sum(len(segment.tokens) for segment in transcript.segments)
    return {
        "type": "tokens",
        "input_tokens": n_input,
        "input_token_details": {"audio_tokens": n_input},
        "output_tokens": n_output,
        "total_tokens": n_input + n_output,
    }


def _languages(transcript: Transcript) -> dict[str, Any]:
    """What was spoken; OpenAI has it for transcriptions only. Empty where the language is not known."""
    if transcript.task == "translate":
        return {}
    return {"languages": [{"code": transcript.language}] if transcript.language else []}


def error_response(error: Error, *, headers: Mapping[str, str] | None = None) -> Response:
    """Returns an error with its status, and with the headers of ``error_headers``."""
    return JSONResponse(
        error_body(error), status_code=error.http_status, headers=error_headers(error) | dict(headers or {})
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


def error_headers(error: Error) -> dict[str, str]:
    """When to come back, in whole seconds for everybody and in milliseconds for OpenAI's clients; how to log in.

    OpenAI's clients also repeat what took too long, unless a header forbids it.
    """
    if isinstance(error, InvalidApiKey):
        return {"www-authenticate": 'Bearer realm="whisperd"'}
    if isinstance(error, DeadlineExceeded):
        return {"x-should-retry": "false"}
    if not isinstance(error, Unavailable):
        return {}
    return {
        "retry-after": str(math.ceil(error.retry_after_s)),
        "retry-after-ms": str(math.ceil(error.retry_after_s * 1000)),
    }


def scores(segments: Sequence[Segment], *, asked: bool) -> dict[str, Any]:
    """The member ``logprobs`` when it was asked for; empty when nobody spoke."""
    return {"logprobs": formats.logprobs(segments)} if asked else {}


def _json(transcript: Transcript, *, logprobs: bool) -> dict[str, Any]:
    return (
        {"text": transcript.text, "usage": _seconds(transcript)}
        | _languages(transcript)
        | scores(transcript.segments, asked=logprobs)
        | warnings_member(transcript)
    )

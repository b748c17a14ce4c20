"""The routes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from http import HTTPStatus

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from whisperd.errors import DeadlineExceeded, Draining, ModelLoading
from whisperd.metrics import HttpMeter
from whisperd.serving import schema
from whisperd.serving.http.access import Guard, refuse_stranger
from whisperd.serving.http.deadline import deadline, silence_s
from whisperd.serving.http.events import stream, while_connected
from whisperd.serving.http.middleware import ContextMiddleware, RequestContext
from whisperd.serving.http.openapi import description
from whisperd.serving.http.params import Parameters, parse_fields
from whisperd.serving.http.reconcile import Reconcile
from whisperd.serving.http.responses import envelope, transcript_response
from whisperd.serving.http.upload import Upload, receive_upload
from whisperd.serving.interface import Admission, ApiSettings, Job, ModelCard, Service
from whisperd.serving.spool import Spool
from whisperd.serving.tasks import Pace
from whisperd.speech.transcript import Task, Transcript

EVENTS_HEADER = "x-whisperd-events"  # a client that sends "1" knows whisperd's own events


def create_app(service: Service, settings: ApiSettings, spool: Spool, meter: HttpMeter | None = None) -> Starlette:
    """Returns the ASGI application. Uploads go to ``spool``; ``meter`` counts every request."""
    routes = Routes(service)
    table = [
        Route("/v1/audio/transcriptions", Audio(service, settings, spool, "transcribe"), methods=["POST"]),
        Route("/v1/audio/translations", Audio(service, settings, spool, "translate"), methods=["POST"]),
        Route("/v1/models", routes.models),
        Route("/v1/models/{id:path}", routes.model),
        Route("/v1/whisperd/status", routes.status),
        Route("/v1/whisperd/reload", routes.reload, methods=["POST"]),
        Route("/v1/whisperd/reconcile", Reconcile(service, settings.keep_alive_s), methods=["POST"]),
        Route("/openapi.json", routes.openapi),
        Route("/metrics", routes.metrics),
        Route("/livez", routes.live),
        *(Route(path, routes.ready) for path in ("/readyz", "/healthz", "/health")),
    ]
    paths = frozenset(route.path for route in table)
    app = Starlette(
        routes=table,
        middleware=[
            Middleware(ContextMiddleware, meter=meter or HttpMeter(), routes=paths, send_idle_s=settings.send_idle_s),
            Middleware(Guard, hosts=settings.tcp_hosts, key=settings.tcp_key),
        ],
        exception_handlers={HTTPException: _router_error},
    )
    app.router.redirect_slashes = False
    return app


class Audio:
    """Transcribes or translates one upload.

    A request takes its place before its body: nobody uploads an hour of audio to be refused after it.
    """

    def __init__(self, service: Service, settings: ApiSettings, spool: Spool, task: Task) -> None:
        self._service = service
        self._settings = settings
        self._spool = spool
        self._pace = Pace(
            idle_s=settings.upload_idle_s, bytes_per_s=settings.upload_bytes_per_s, place_s=settings.place_s
        )
        self._task = task

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI; the file is closed when the answer is out."""
        with await self._service.admit() as admission:
            request = Request(scope, receive)
            upload = await receive_upload(
                request, self._spool, self._pace, self._service.resolve, admission.yield_place
            )
            with upload.file:
                await self._answer(request, upload, admission, send)

    async def _answer(self, request: Request, upload: Upload, admission: Admission, send: Send) -> None:
        parameters = parse_fields(upload.fields, self._task, self._service.default_options())
        context = RequestContext.of(request)
        context.model = parameters.model or next((card.id for card in self._service.models()), None)
        context.device = partial(self._service.device, parameters.model)
        job = Job(
            admission=admission,
            audio=upload.file.rewound(),
            filename=upload.filename,
            model=parameters.model,
            options=parameters.options,
            chunking=parameters.chunking,
            request_id=context.request_id,
            bulk=parameters.bulk,
            track=parameters.track,
        )
        last = deadline(parameters.timeout_s, request.headers, elapsed_s=context.wall_s, stream=parameters.stream)
        try:
            async with asyncio.timeout(last.left_s if last else None):
                await self._work(request, job, parameters, send)
        except TimeoutError as error:
            if last is None:
                raise
            raise DeadlineExceeded(last.message) from error

    async def _work(self, request: Request, job: Job, parameters: Parameters, send: Send) -> None:
        context = RequestContext.of(request)
        context.warnings = parameters.warnings

        async def transcribe(job: Job) -> Transcript:
            transcript = await self._service.transcribe(job)
            context.audio_s = transcript.duration_s
            context.warnings = (*parameters.warnings, *transcript.warnings)
            return replace(transcript, warnings=context.warnings)

        if parameters.stream:
            extended = request.headers.get(EVENTS_HEADER) == "1"
            keep_alive_s = silence_s(request.headers, self._settings.keep_alive_s)
            events = stream(transcribe, job, context, extended=extended, keep_alive_s=keep_alive_s)
            await while_connected(events, request.receive)
        else:
            transcript = await while_connected(transcribe(job), request.receive)
            response = transcript_response(transcript, parameters, context.wall_s)
            await response(request.scope, request.receive, send)


class Routes:
    """The routes without audio."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def models(self, _: Request) -> Response:
        """``GET /v1/models``"""
        return JSONResponse({"object": "list", "data": [_card(card) for card in self._service.models()]})

    async def model(self, request: Request) -> Response:
        """``GET /v1/models/{id}``, by every name that a request may use."""
        cards = {name: card for card in self._service.models() for name in (card.id, *card.aliases)}
        wanted = request.path_params["id"]
        card = cards.get(wanted) or cards.get(self._service.resolve(wanted))
        if card is None:
            raise ModelLoading(f"model {wanted!r} comes or goes with a reload at this moment")
        return JSONResponse(_card(card))

    async def live(self, _: Request) -> Response:
        """``GET /livez``: the loop answers."""
        return JSONResponse({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """``GET /readyz``: a request sent now would be served."""
        refuse_unready(self._service)
        return JSONResponse({"status": "ok"})

    async def status(self, _: Request) -> Response:
        """``GET /v1/whisperd/status``"""
        return JSONResponse(self._service.status())

    async def metrics(self, request: Request) -> Response:
        """``GET /metrics`` for Prometheus."""
        body, content_type = self._service.metrics(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    async def openapi(self, _: Request) -> Response:
        """``GET /openapi.json``: this interface for machines."""
        return JSONResponse(description())

    async def reload(self, request: Request) -> Response:
        """``POST /v1/whisperd/reload``: root and the daemon's own user may."""
        refuse_stranger(request)
        return JSONResponse(await self._service.reload())


def refuse_unready(service: Service) -> None:
    """Raises ModelLoading or Draining while no request is served."""
    readiness = service.readiness()
    if not readiness.ready:
        kind = Draining if readiness.draining else ModelLoading
        raise kind(readiness.reason or "not ready", retry_after_s=readiness.retry_after_s)


def _card(card: ModelCard) -> schema.Model:
    return {
        "id": card.id,
        "object": "model",
        "created": 0,
        "owned_by": card.id.partition("/")[0],
        "aliases": list(card.aliases),
        "source": card.source,
        "revision": card.revision,
        "loaded": card.loaded,
    }


async def _router_error(request: Request, error: Exception) -> Response:
    """Errors of starlette's router, in OpenAI's envelope."""
    status = error.status_code if isinstance(error, HTTPException) else HTTPStatus.INTERNAL_SERVER_ERROR
    headers: Mapping[str, str] = (error.headers if isinstance(error, HTTPException) else None) or {}
    asked = f"{request.method} {request.url.path[:200]}"
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        message, code = f"{asked}: this route takes {headers.get('Allow', 'another method')}", "method_not_allowed"
    else:
        message, code = f"{asked}: no such route; try GET /v1/models or POST /v1/audio/transcriptions", "not_found"
    return JSONResponse(
        envelope(message, type="invalid_request_error", code=code), status_code=status, headers=dict(headers)
    )

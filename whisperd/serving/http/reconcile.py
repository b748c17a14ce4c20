"""``POST /v1/whisperd/reconcile``: the daemon works on its cache and streams its progress."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from whisperd.errors import Cancelled, RequestError
from whisperd.serving.http.access import refuse_stranger
from whisperd.serving.http.events import DONE, EventQueue, event, send_events, while_connected
from whisperd.serving.http.middleware import RequestContext
from whisperd.serving.interface import ReconcileOrder, Service
from whisperd.serving.schema import Report

ORDER_BYTES = 64 * 1024  # the longest body; a list of a thousand models fits


class OrderTooLong(RequestError):
    """The body of an order is over the limit; the rest was not read."""

    http_status = 413
    code = "order_too_long"

    def __init__(self) -> None:
        super().__init__(f"the body of an order has at most {ORDER_BYTES} bytes")


class OrderBody(BaseModel):
    """The body: all members may be left out."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    check: bool = False
    force: bool = False
    verify: bool = False
    update: bool = False
    prune: bool = False
    models: list[str] | None = None


class Reconcile:
    """Streams ``whisperd.plan``, ``whisperd.progress`` and ``whisperd.report``."""

    def __init__(self, service: Service, keep_alive_s: float) -> None:
        self._service = service
        self._keep_alive_s = keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, _send: Send) -> None:
        """ASGI; a client that goes away ends the work, and nothing is left half done."""
        request = Request(scope, receive)
        refuse_stranger(request)
        order = _order(await _body(request))
        feed = EventQueue()
        told = send_events(
            feed,
            self._service.reconcile(order, lambda kind, members: feed.put(event(kind, **members))),
            RequestContext.of(request),
            keep_alive_s=self._keep_alive_s,
            last=_report,
        )
        await while_connected(told, receive)


async def _body(request: Request) -> bytes:
    """The whole body; raises OrderTooLong, or Cancelled when the client went away."""
    body = b""
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > ORDER_BYTES:
                raise OrderTooLong
    except ClientDisconnect as error:
        raise Cancelled("the client went away in the middle of its order") from error
    return body


def _order(body: bytes) -> ReconcileOrder:
    try:
        found = OrderBody.model_validate_json(body or b"{}")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "body"
        raise RequestError(f"{place}: {first['msg']}; expected a JSON object as in the README", param=place) from error
    members = found.model_dump()
    models = members.pop("models")
    return ReconcileOrder(**members, models=None if models is None else tuple(models))


def _report(report: Report) -> bytes:
    return event("whisperd.report", **report) + DONE

"""The bodies and events have the types that are declared for them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx2
import pytest
from pydantic import TypeAdapter

from tests.support.api import AUDIO, URL
from tests.support.service_fake import Daemon
from whisperd.errors import HubUnreachable
from whisperd.serving import schema
from whisperd.store.plan import CachePlan, Removal
from whisperd.store.progress import Amount, Progress
from whisperd.store.reconcile import Report, Result

EVENTS = {
    "transcript.text.delta": schema.Delta,
    "transcript.text.done": schema.Done,
    "whisperd.segment": schema.Segment,
    "whisperd.progress": schema.Progress,
    "whisperd.transcript": schema.VerboseTranscription,
    "whisperd.plan": schema.Plan,
    "whisperd.report": schema.Report,
}


def check(kind: Any, found: Any) -> None:
    """Fails where a member is missing, has another type, or is not declared."""
    strict: TypeAdapter[Any] = TypeAdapter(kind)
    assert strict.validate_json(json.dumps(found), strict=True) == found


@pytest.mark.parametrize(
    ("route", "kind"),
    [
        ("/v1/models", schema.Models),
        ("/v1/models/whisper-1", schema.Model),
        ("/v1/models/nope", schema.Error),
        ("/v1/whisperd/status", schema.Status),
        ("/livez", schema.Health),
        ("/readyz", schema.Health),
        ("/v1/no/route", schema.Error),
    ],
)
def test_bodies(client: httpx2.Client, route: str, kind: Any) -> None:
    """Answers without audio."""
    check(kind, client.get(route).json())


def test_reload(client: httpx2.Client) -> None:
    """The outcome of a reload."""
    check(schema.Reload, client.post("/v1/whisperd/reload").json())


@pytest.mark.parametrize("fields", [{}, {"include[]": "logprobs", "seed": "1"}])
def test_transcripts(client: httpx2.Client, fields: dict[str, str]) -> None:
    """Both JSON formats."""
    check(schema.Transcription, client.post(URL, files=[AUDIO], data=fields).json())
    form = {"response_format": "verbose_json", "timestamp_granularities": "word,segment", "seed": "1"}
    check(schema.VerboseTranscription, client.post(URL, files=[AUDIO], data=form).json())


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(frame.partition("data: ")[2]) for frame in text.split("\n\n") if frame.startswith("event: ")]


def test_events(client: httpx2.Client, whisperd: Daemon) -> None:
    """Every event of a transcription and of a reconcile."""
    headers = {"x-whisperd-events": "1"}
    found = events(client.post(URL, files=[AUDIO], data={"stream": "true"}, headers=headers).text)
    found += events(client.post("/v1/whisperd/reconcile").text)
    assert {event["type"] for event in found} == set(EVENTS)
    for event in found:
        check(EVENTS[event.pop("type")], event)
    assert len(whisperd.service.orders) == 1


def test_reports_of_the_store() -> None:
    """The JSON of the store, which does not depend on these types, has them all the same."""
    results = (
        Result(name="a", outcome="downloaded", path=Path("/cache/a"), commit="c" * 40, fetched_bytes=7),
        Result(name="b", outcome="failed", error=HubUnreachable("no route"), warning="old"),
    )
    report = Report(
        plan=CachePlan(actions=()), results=results, removed=(Removal(repo="o/n", commit="d" * 40, bytes=1),)
    )
    check(schema.Report, {**report.as_dict(), "lines": report.lines()})
    amount = Amount(done_bytes=1, total_bytes=2)
    check(schema.Download, asdict(Progress(name="a", model=amount, run=amount)))

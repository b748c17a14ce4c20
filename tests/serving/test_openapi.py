"""The interface describes itself, and anything that is sent is answered as described."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.service_fake import MODEL, PATIENCE_S, Daemon, daemon
from whisperd.serving.http.openapi import description
from whisperd.serving.http.params import FIELDS

FORM = description()["paths"]["/v1/audio/transcriptions"]["post"]["requestBody"]["content"]["multipart/form-data"]
PROPERTIES: dict[str, Any] = FORM["schema"]["properties"]


@pytest.fixture(scope="module")
def whisperd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with daemon(tmp_path_factory.mktemp("api")) as running:
        yield running


@pytest.fixture(scope="module")
def client(whisperd: Daemon) -> Iterator[httpx2.Client]:
    transport = httpx2.HTTPTransport(uds=str(whisperd.path))
    with httpx2.Client(transport=transport, base_url="http://whisperd", timeout=PATIENCE_S) as client:
        yield client


def test_served(client: httpx2.Client, whisperd: Daemon) -> None:
    """The document is served, names every route of the application, and its references resolve."""
    found = client.get("/openapi.json").json()
    assert found == description()
    routes = {route.path.replace(":path", "") for route in whisperd.app.routes}  # type: ignore[attr-defined]
    assert set(found["paths"]) == routes
    identifiers = [operation["operationId"] for path in found["paths"].values() for operation in methods(path)]
    assert len(identifiers) == len(set(identifiers))
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(found)))
    assert references <= set(found["components"]["schemas"])
    assert found["components"]["schemas"]["Status"]["properties"]["requests"] == {
        "$ref": "#/components/schemas/RequestStatus"
    }


def methods(path: dict[str, Any]) -> list[dict[str, Any]]:
    return [path[method] for method in ("get", "post") if method in path]


def test_every_field_is_described() -> None:
    """Every field that is read is in the document."""
    assert {name.removesuffix("[]") for name in PROPERTIES} == {"file", *FIELDS}


def test_headers_are_there(client: httpx2.Client) -> None:
    """A transcript has the headers that the document names."""
    path = "/v1/audio/transcriptions"
    named = description()["paths"][path]["post"]["responses"]["200"]["headers"]
    assert named.keys() <= client.post(path, files={"file": b"x"}, data={"seed": "1"}).headers.keys()


def test_every_choice_is_accepted(client: httpx2.Client) -> None:
    """Every value that the document lists is accepted."""
    for name, schema in PROPERTIES.items():
        for choice in schema.get("items", schema).get("enum", ()):
            fields = {name: choice, "response_format": "verbose_json"} | ({name: choice})
            if name == "include[]":
                fields["response_format"] = "json"
            response = client.post("/v1/audio/transcriptions", files={"file": b"x"}, data=fields)
            assert response.status_code == (400 if choice == "diarized_json" else 200), (name, choice, response.text)


NUMBERS = ("0", "1", "-1", "1e999", "nan", "9" * 400)
WORDS = ("true", "auto", "none", "en", "word", "logprobs", "json", MODEL, "\x00", "\ud7ff")
JSON = ("{", "[1]", "{}", '{"type": "server_vad"}', '{"type": "server_vad", "threshold": 9}')
anything = st.text(max_size=30) | st.sampled_from((*NUMBERS, *WORDS, *JSON))
names = st.sampled_from(sorted(PROPERTIES) + [name.removesuffix("[]") for name in PROPERTIES if name.endswith("[]")])
objects = st.sampled_from(["chunking_strategy[type]", "chunking_strategy[threshold]", "chunking_strategy[x]", "a[b]"])
forms = st.lists(st.tuples(names | objects | st.text(max_size=8), anything), max_size=6)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(form=forms, path=st.sampled_from(["transcriptions", "translations"]))
def test_no_form_breaks_it(client: httpx2.Client, form: list[tuple[str, str]], path: str) -> None:
    """Whatever the fields are, the answer is a transcript or a client error in the envelope."""
    parts: list[tuple[str, Any]] = [(name, (None, value.encode())) for name, value in form if name != "file"]
    response = client.post(f"/v1/audio/{path}", files=[("file", ("a.wav", b"x")), *parts])
    assert response.status_code < 500, response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert len(error["message"]) < 1000


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=300), content_type=st.sampled_from(["multipart/form-data; boundary=x", "", "text/x"]))
def test_no_body_breaks_it(client: httpx2.Client, body: bytes, content_type: str) -> None:
    """A body that is no form is a client error."""
    response = client.post("/v1/audio/transcriptions", content=body, headers={"content-type": content_type})
    assert response.status_code == 400
    assert response.json()["error"]["code"]

"""The interface as an OpenAPI document, made from the table that reads the forms and the types of the wire."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import TypeAdapter

from whisperd.serving import schema
from whisperd.serving.http.params import FIELDS, Field
from whisperd.serving.http.reconcile import OrderBody
from whisperd.version import VERSION

Json = dict[str, Any]

BODIES: tuple[type[Any], ...] = (
    schema.Error, schema.Health, schema.Model, schema.Models, schema.Reload, schema.Status,
    schema.Transcription, schema.VerboseTranscription, schema.Delta, schema.Done, schema.Progress,
    schema.Plan, schema.Download, schema.Report,
)  # fmt: skip
EVENTS = "Events: whisperd.plan (Plan), whisperd.progress (Download), whisperd.report (Report)."
ERRORS = {
    "400": "A field is missing or wrong, or the audio cannot be decoded.",
    "404": "No such model.",
    "408": "The upload stood still.",
    "413": "The file or the audio is over the limit.",
    "429": "Too many requests wait; Retry-After says when to come back.",
    "500": "The engine failed.",
    "503": "The model loads, the daemon stops, or the spool is full; Retry-After says when to come back.",
    "504": "It was not done in the time that the request gave it, or after which its client gives up.",
}

HEADERS: Json = {
    name: {"description": text, "schema": {"type": "string"}}
    for name, text in {
        "x-request-id": "The request's own, or one that was made for it; the log has it too.",
        "openai-processing-ms": "Time since the headers of the request were there.",
        "x-whisperd-warning": "Absent, or what the caller should know of the result, such as an ignored field.",
        "x-whisperd-device": 'What the model computes on; "cpu (fallback)" while its GPU is lost.',
    }.items()
}


def description() -> Json:
    """OpenAPI 3.1."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "whisperd",
            "version": VERSION,
            "description": "Speech to text in OpenAI's wire format. Unknown fields are refused with 400; harmless "
            "fields of other servers are ignored, which the header x-whisperd-warning says.",
        },
        "paths": {
            "/v1/audio/transcriptions": {"post": _audio("Transcribe", "The text in the language that is spoken.")},
            "/v1/audio/translations": {"post": _audio("Translate", "The text in English.")},
            "/v1/models": {"get": _get("Models", "The declared models, the default one first.", schema.Models)},
            "/v1/models/{id}": {
                "get": _get("Model", "One model, by name or alias.", schema.Model, "404") | {"parameters": [_ID]}
            },
            "/v1/whisperd/status": {"get": _get("Status", "Figures for people.", schema.Status)},
            "/v1/whisperd/reload": {
                "post": _operation(
                    "Reload", "Reads the configuration again.", "What changed.", schema.Reload, "403", "500"
                )
            },
            "/v1/whisperd/reconcile": {"post": _reconcile()},
            "/openapi.json": {"get": _get("OpenApi", "This document.", None)},
            "/metrics": {"get": _text("Metrics", "Figures for Prometheus.")},
            "/livez": {"get": _get("Live", "200 while the daemon answers.", schema.Health)},
            "/readyz": {"get": _get("Ready", "200 when a request sent now would be served.", schema.Health, "503")},
            "/healthz": {"get": _get("Healthz", "The same as /readyz.", schema.Health, "503")},
            "/health": {"get": _get("Health", "The same as /readyz.", schema.Health, "503")},
        },
        "components": {"schemas": _schemas()},
    }


def _schemas() -> Json:
    """The types of the wire by their names, with those that they are made of."""
    named: list[tuple[str, Literal["serialization"], TypeAdapter[Any]]]
    named = [(kind.__name__, "serialization", TypeAdapter(kind)) for kind in BODIES]
    _, found = TypeAdapter.json_schemas(named, ref_template="#/components/schemas/{model}")
    return dict(found["$defs"])


def _audio(name: str, summary: str) -> Json:
    properties: Json = {"file": {"type": "string", "format": "binary", "description": "Audio in any container."}}
    for field_name, field in FIELDS.items():
        properties[f"{field_name}[]" if field.array else field_name] = _field(field)
    form = {"type": "object", "required": ["file"], "properties": properties, "additionalProperties": False}
    operation = _operation(name, summary, "The transcript.", None, *ERRORS)
    operation["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": form}}}
    operation["responses"]["200"]["content"] = {
        "application/json": {"schema": {"anyOf": [_ref(schema.Transcription), _ref(schema.VerboseTranscription)]}},
        "text/plain": {"schema": {"type": "string"}},
        "text/vtt": {"schema": {"type": "string"}},
        "text/event-stream": {"schema": {"type": "string"}},
    }
    operation["responses"]["200"]["headers"] = HEADERS
    return operation


def _reconcile() -> Json:
    operation = _operation(
        "Reconcile", "Brings the cache into the declared state.", EVENTS, None, "400", "403", "413", "500"
    )
    operation["requestBody"] = {"content": {"application/json": {"schema": OrderBody.model_json_schema()}}}
    operation["responses"]["200"]["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
    return operation


def _field(field: Field) -> Json:
    one: Json = {"type": "string"}
    if field.choices:
        one["enum"] = list(field.choices)
    if field.array:
        return {"type": "array", "items": one, "description": f"Each: {field.expects}."}
    return one | {"description": f"{field.expects[:1].upper()}{field.expects[1:]}."}


def _get(name: str, summary: str, body: type[Any] | None, *errors: str) -> Json:
    return _operation(name, summary, summary, body, *errors)


def _text(name: str, summary: str) -> Json:
    operation = _operation(name, summary, summary, None)
    operation["responses"]["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    return operation


def _operation(name: str, summary: str, found: str, body: type[Any] | None, *errors: str) -> Json:
    error = {"application/json": {"schema": _ref(schema.Error)}}
    shape = {"type": "object"} if body is None else _ref(body)
    responses: Json = {"200": {"description": found, "content": {"application/json": {"schema": shape}}}}
    texts = ERRORS | {"403": "This user may not do it."}
    responses |= {status: {"description": texts[status], "content": error} for status in errors}
    return {"operationId": name[:1].lower() + name[1:], "summary": summary, "responses": responses}


def _ref(body: type[Any]) -> Json:
    return {"$ref": f"#/components/schemas/{body.__name__}"}


_ID: Json = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}

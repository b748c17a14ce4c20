"""Bodies and events on the wire, as types: the daemon writes them, client and command line read them.

``/openapi.json`` takes its schemas from here. Transcripts have OpenAI's shapes; everything else is whisperd's own.
"""

from __future__ import annotations

from typing import (
    Literal,
    NotRequired,  # pydantic needs these before Python 3.12
)

from typing_extensions import TypedDict


class ErrorMembers(TypedDict):
    """What is wrong; ``param`` names the field of the request."""

    message: str
    type: str
    param: str | None
    code: str


class Error(TypedDict):
    """OpenAI's envelope of an error."""

    error: ErrorMembers


class Health(TypedDict):
    """The daemon lives, or is ready."""

    status: Literal["ok"]


class Model(TypedDict):
    """A declared model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    aliases: list[str]
    source: str
    revision: str | None
    loaded: bool


class Models(TypedDict):
    """The declared models, the default one first."""

    object: Literal["list"]
    data: list[Model]


class Changes(TypedDict):
    """What a reload has changed, which options wait for a restart, and what the file warns of."""

    changed: list[str]
    needs_restart: list[str]
    warnings: list[str]


class Reload(TypedDict):
    """The outcome of a reload, ``at`` in seconds since 1970. One with an ``error`` changed nothing."""

    ok: bool
    at: float
    error: str | None
    changed: NotRequired[list[str]]
    needs_restart: NotRequired[list[str]]
    warnings: NotRequired[list[str]]


class ConfigStatus(TypedDict):
    """The configuration in effect, each value as TOML text."""

    file: str | None
    values: dict[str, str]
    needs_restart: list[str]
    warnings: list[str]
    last_reload: Reload | None


class RequestStatus(TypedDict):
    """Requests for transcriptions since the start; audio in seconds."""

    active: int
    waiting_audio_s: float
    done: int
    failed: int
    audio_s: float


class ModelStatus(TypedDict):
    """A declared model. The optional members are there while it is in memory."""

    name: str
    source: str
    revision: str | None
    loaded: bool
    failure: str | None
    fallback: NotRequired[str | None]
    engine_pid: NotRequired[int | None]
    engine_restarts: NotRequired[int]
    memory_bytes: NotRequired[int]
    engine: NotRequired[str]
    device: NotRequired[str]
    compute_type: NotRequired[str]
    slots: NotRequired[int]
    windows_waiting: NotRequired[int]
    windows_running: NotRequired[int]


class Status(TypedDict):
    """What the daemon is doing."""

    version: str
    pid: int
    phase: Literal["starting", "ready", "reloading", "stopping"]
    note: str
    uptime_s: float
    config: ConfigStatus
    cache_dir: str
    problems: list[str]
    models: list[ModelStatus]
    requests: RequestStatus


class Plan(TypedDict):
    """The event ``whisperd.plan``: the plan for people, and whether it changes anything."""

    lines: list[str]
    pending: bool


class Amount(TypedDict):
    """Bytes of a download, and its rate."""

    done_bytes: int
    total_bytes: int
    bytes_per_s: float


class Download(TypedDict):
    """The event ``whisperd.progress`` of a reconcile: the download of one model, and of all in this run."""

    name: str
    model: Amount
    run: Amount
    n_models: int


class Failure(TypedDict):
    """Why a model could not be brought into the declared state."""

    code: str
    message: str


class ModelResult(TypedDict):
    """The outcome of a reconcile for one model."""

    name: str
    outcome: Literal["ok", "downloaded", "updated", "repaired", "pending", "failed"]
    path: str | None
    commit: str | None
    error: Failure | None
    warning: str | None
    fetched_bytes: int


class Removed(TypedDict):
    """A snapshot that was removed."""

    repo: str
    commit: str


class Report(TypedDict):
    """The event ``whisperd.report``: the outcome of a reconcile; ``lines`` are for people."""

    exit_code: int
    wall_s: float
    plan: list[str]
    removed: list[Removed]
    models: list[ModelResult]
    lines: list[str]


class Progress(TypedDict):
    """The event ``whisperd.progress`` of a transcription, in seconds of audio; the total where it is known."""

    done_s: float
    total_s: float | None


class Logprob(TypedDict):
    """A token; ``bytes`` are exact where ``token`` cannot be."""

    token: str
    logprob: float
    bytes: list[int]


class Language(TypedDict):
    """A language that was spoken."""

    code: str


class UsageSeconds(TypedDict):
    """Usage in seconds of audio."""

    type: Literal["duration"]
    seconds: float


class InputTokens(TypedDict):
    """What the input tokens were."""

    audio_tokens: int


class UsageTokens(TypedDict):
    """Usage in tokens: ten for a second of audio, and those that the model wrote."""

    type: Literal["tokens"]
    input_tokens: int
    input_token_details: InputTokens
    output_tokens: int
    total_tokens: int


class Transcription(TypedDict):
    """A transcript in the format ``json``. Translations have no ``languages``."""

    text: str
    usage: UsageSeconds
    languages: NotRequired[list[Language]]
    logprobs: NotRequired[list[Logprob]]
    warnings: NotRequired[list[str]]


class Delta(TypedDict):
    """The event ``transcript.text.delta``: the text of a segment."""

    delta: str
    logprobs: NotRequired[list[Logprob]]


class Done(TypedDict):
    """The event ``transcript.text.done``. OpenAI's type has usage in tokens only."""

    text: str
    usage: UsageTokens
    languages: NotRequired[list[Language]]
    logprobs: NotRequired[list[Logprob]]
    warnings: NotRequired[list[str]]


class Segment(TypedDict):
    """A phrase, times in seconds."""

    id: int
    seek: int
    start: float
    end: float
    text: str
    tokens: list[int]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float


class Word(TypedDict):
    """A word, times in seconds; ``segment`` is the id of its segment."""

    word: str
    start: float
    end: float
    probability: float
    segment: int


class Windows(TypedDict):
    """Counts of the windows of a request; ``halved``: a batch did not fit into memory."""

    decoded: int
    retried: int
    dropped: int
    continued: int
    halved: int


class Extension(TypedDict):
    """What whisperd knows beyond OpenAI's shape."""

    language: str
    language_probability: float
    windows: Windows
    wall_s: float


class VerboseTranscription(TypedDict):
    """A transcript in the format ``verbose_json``, and the event ``whisperd.transcript``."""

    task: Literal["transcribe", "translate"]
    language: str
    duration: float
    text: str
    segments: NotRequired[list[Segment]]
    words: NotRequired[list[Word]]
    usage: UsageSeconds
    x_whisperd: Extension
    warnings: NotRequired[list[str]]

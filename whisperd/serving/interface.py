"""What the front ends need of the daemon, and what they hand to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, Protocol, Self

from whisperd.serving.schema import Reload, Report, Status
from whisperd.speech.fallback import Options
from whisperd.speech.transcript import Segment, Transcript

Emit = Callable[[str, Mapping[str, Any]], None]


class Peer(NamedTuple):
    """The process at the other end of a Unix socket, as the kernel names it."""

    pid: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """Whether a request sent now would be served; if not, the reason, and when to ask again.

    ``draining``: this daemon will not become ready any more.
    """

    ready: bool
    reason: str = ""
    retry_after_s: float = 1.0
    draining: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """A declared model as ``/v1/models`` shows it. Without ``languages`` it is not known which it has."""

    id: str
    aliases: tuple[str, ...] = ()
    source: str = ""
    revision: str | None = None
    loaded: bool = False
    languages: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunking:
    """How the audio of a request is cut; None is the configured value. Padding and silence are those around speech."""

    vad_filter: bool | None = None
    threshold: float | None = None
    padding_ms: int | None = None
    silence_ms: int | None = None


class Admission(Protocol):
    """A place among the requests that are served at the same time, from the headers to the answer; given back at the
    end of a ``with`` block."""

    def __enter__(self) -> Self:
        """Returns itself."""
        ...

    def __exit__(self, *_: object) -> None:
        """Gives it back."""
        ...

    def yield_place(self) -> None:
        """The body comes slowly: another request may have the place."""
        ...

    async def take_place(self) -> None:
        """Returns when the request has a place again, at once where it was not yielded."""
        ...

    def begin(self) -> None:
        """Counts the request as work: all of it has arrived."""
        ...

    def announce(self, total_s: float, limit_s: float) -> None:
        """Sets the length of the audio; raises QueueFull when all requests together would be over ``limit_s``."""
        ...

    def progress(self, done_s: float) -> None:
        """Sets how much of the audio is transcribed."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One request for a transcription.

    ``admission`` is what ``admit`` returned for it. ``audio`` stands at its beginning and stays open until
    ``transcribe`` has ended. A ``model`` of None is the default one; a ``bulk`` of None goes by the length of the
    audio; a ``track`` is the number of an audio track or its language, None the default one. The callbacks may be
    called from any thread.
    """

    admission: Admission
    audio: BinaryIO
    filename: str
    model: str | None
    options: Options
    chunking: Chunking
    request_id: str
    bulk: bool | None = None
    track: int | str | None = None
    on_segment: Callable[[Segment], None] = lambda _: None
    on_progress: Callable[[float, float | None], None] = lambda _done_s, _total_s: None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconcileOrder:
    """A reconcile as a client orders it; ``models`` of None means all that are declared."""

    check: bool = False
    force: bool = False
    verify: bool = False
    update: bool = False
    prune: bool = False
    models: tuple[str, ...] | None = None


class Service(Protocol):
    """The daemon as the HTTP interface sees it; every method is called on the event loop."""

    def readiness(self) -> Readiness:
        """Whether requests are served now."""
        ...

    async def admit(self) -> Admission:
        """Returns when a request for a transcription may go on; raises Unavailable when that is not soon."""
        ...

    def resolve(self, name: str) -> str:
        """The declared model that a name means; raises ModelNotFound, or ModelLoading while that is not known."""
        ...

    def models(self) -> Sequence[ModelCard]:
        """The declared models, the default one first."""
        ...

    def device(self, model: str | None) -> str | None:
        """Where a model computes now, as in ``cuda`` or ``cpu (fallback)``; None when it is not in memory."""
        ...

    def status(self) -> Status:
        """Figures for people."""
        ...

    def metrics(self, accept: str) -> tuple[bytes, str]:
        """Figures for Prometheus and their content type, chosen by an Accept header."""
        ...

    def default_options(self) -> Options:
        """How a request without parameters is decoded."""
        ...

    async def transcribe(self, job: Job) -> Transcript:
        """Does the job; cancelling the task cancels the work, and ends only when the audio is no longer read."""
        ...

    async def reload(self) -> Reload:
        """Reads the configuration again; raises Error when anything stays as it was."""
        ...

    async def reconcile(self, order: ReconcileOrder, emit: Emit) -> Report:
        """Works on the cache and returns the report; ``emit`` may be called from any thread.

        Cancelling the task ends the work at once, and nothing is half done.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Limits in time of the HTTP server. ``drain_s``: how long requests in flight may take after ``stop``."""

    header_timeout_s: float = 10.0
    keep_alive_s: int = 75
    drain_s: int = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiSettings:
    """Limits of the HTTP interface.

    A stream that has nothing to send sends a comment every ``keep_alive_s``. An upload that is slow for ``place_s``
    yields its place; one that stands still for ``upload_idle_s``, or is slower than ``upload_bytes_per_s`` after it, is
    given up, and so is a client that does not read its answer for ``send_idle_s``. ``tcp_hosts`` and ``tcp_key``
    are for the TCP listener, see ``Guard``.
    """

    keep_alive_s: float = 15.0
    upload_idle_s: float = 60.0
    upload_bytes_per_s: float = 512.0
    place_s: float = 3.0
    send_idle_s: float = 60.0
    tcp_hosts: tuple[str, ...] = ()
    tcp_key: str | None = None

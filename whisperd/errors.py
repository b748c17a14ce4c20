"""The one exception tree. Each class knows its exit code, HTTP status and OpenAI error code.

    Error
    ├── UsageError               the command line is wrong
    ├── ConfigError              whisperd.toml, -o or the environment is wrong (carries every Problem)
    ├── RequestError             a parameter of a request is wrong
    │   ├── UnsupportedParameter
    │   ├── ModelNotFound
    │   ├── FileTooLarge
    │   ├── PeerNotAllowed
    │   └── HostNotAllowed  InvalidApiKey    over TCP only
    ├── AudioError               the audio cannot be decoded
    │   └── AudioTooLong
    ├── StoreError               the cache could not be brought into the declared state
    │   ├── SourceError          a model reference leads nowhere (missing directory, package, file)
    │   ├── HubError             the Hub refused, or could not be reached
    │   │   ├── HubAuthError  GatedError  RepoNotFound  RevisionNotFound
    │   │   └── HubUnreachable  HubRateLimited  HubServerError
    │   ├── DiskFull  CachePermissionError  IntegrityError
    │   └── CacheBusy            another reconcile holds the lock
    ├── EngineError              inference failed
    │   └── OutOfMemory
    ├── Unavailable              try again later
    │   └── QueueFull  ModelLoading  Draining  SpoolFull
    ├── DaemonUnreachable        no daemon answers on the socket
    │   └── SocketPermissionError
    ├── OutputError              stdout cannot be written: it is closed, or its disk is full
    ├── RemoteError              the daemon answered with an error (client side)
    └── Cancelled                the client disconnected or pressed Ctrl-C
        └── DeadlineExceeded

Only ``cli.main`` and the HTTP handler catch ``Error``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """The code that a command ends with; from 65 to 78 those of sysexits.h, 130 is the shell's for SIGINT."""

    DONE = 0
    FAILED = 1
    WRONG_USAGE = 2
    PENDING = 3
    UNCHECKED = 4
    BAD_DATA = 65
    NO_INPUT = 66
    UNAVAILABLE = 69
    SOFTWARE = 70
    CANNOT_CREATE = 73
    IO_ERROR = 74
    TRY_AGAIN = 75
    NO_PERMISSION = 77
    BAD_CONFIG = 78
    INTERRUPTED = 130


class Error(Exception):
    """Base of all errors that whisperd raises on purpose."""

    exit_code: ClassVar[int] = ExitCode.FAILED
    http_status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One mistake in the configuration: where it stands, which key, what is wrong and what to try."""

    where: str
    key: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.key, self.message) if part)


class UsageError(Error):
    """The command line asks for something that does not exist."""

    exit_code = ExitCode.WRONG_USAGE
    http_status = 400
    type = "invalid_request_error"
    code = "usage"


class ConfigError(Error):
    """The configuration is wrong; all problems at once, one per line."""

    exit_code = ExitCode.BAD_CONFIG
    code = "config_error"

    def __init__(self, *problems: Problem) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


class RequestError(Error):
    """A field of a request is missing or has a value that cannot be used.

    Args:
        message: what was expected and what was got.
        param: name of the field as the client sent it.
    """

    exit_code = ExitCode.WRONG_USAGE
    http_status = 400
    type = "invalid_request_error"
    code = "invalid_value"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnsupportedParameter(RequestError):
    """A field of OpenAI's API that whisperd knows and cannot serve."""

    code = "unsupported_parameter"


class ModelNotFound(RequestError):
    """No declared model has this name."""

    http_status = 404
    code = "model_not_found"


class FileTooLarge(RequestError):
    """The upload is over the limit; the rest was not read."""

    http_status = 413
    code = "file_too_large"


class PeerNotAllowed(RequestError):
    """The process at the other end of the socket may not do this."""

    exit_code = ExitCode.NO_PERMISSION
    http_status = 403
    type = "permission_error"
    code = "peer_not_allowed"


class HostNotAllowed(RequestError):
    """A request over TCP has a Host or an Origin that is not this daemon's."""

    http_status = 403
    type = "permission_error"
    code = "host_not_allowed"


class InvalidApiKey(RequestError):
    """A request over TCP has no key, or a wrong one."""

    exit_code = ExitCode.NO_PERMISSION
    http_status = 401
    code = "invalid_api_key"


class AudioError(Error):
    """The input holds no audio that can be decoded."""

    exit_code = ExitCode.BAD_DATA
    http_status = 400
    type = "invalid_request_error"
    code = "audio_decode_error"


class AudioTooLong(AudioError):
    """The audio is longer than the limit."""

    http_status = 413
    code = "audio_too_long"


class StoreError(Error):
    """The cache could not be brought into the declared state."""

    http_status = 502
    code = "store_error"


class SourceError(StoreError):
    """A model reference leads nowhere, or to something that is not a Whisper model."""

    code = "source_error"


class HubError(StoreError):
    """The Hub refused, or could not be reached."""

    code = "hub_error"


class HubAuthError(HubError):
    """The token is missing, wrong, or has no access."""

    code = "hub_auth"


class GatedError(HubAuthError):
    """The conditions of the repository must be accepted first."""

    code = "hub_gated"


class RepoNotFound(HubError):
    """The Hub has no such repository, or hides it from this token."""

    code = "repo_not_found"


class RevisionNotFound(HubError):
    """The repository has no such branch, tag or commit."""

    code = "revision_not_found"


class HubUnreachable(HubError):
    """No connection, no answer in time, or an answer that is not the Hub's."""

    code = "hub_unreachable"


class HubRateLimited(HubError):
    """The Hub limits the rate of requests."""

    code = "hub_rate_limited"


class HubServerError(HubError):
    """The Hub answered with a 5xx status."""

    code = "hub_server_error"


class DiskFull(StoreError):
    """Not enough bytes or inodes are free."""

    code = "disk_full"


class CachePermissionError(StoreError):
    """The cache directory cannot be read or written by this user."""

    exit_code = ExitCode.NO_PERMISSION
    code = "cache_permission"


class IntegrityError(StoreError):
    """Bytes on disk differ from what the Hub declared, twice."""

    code = "integrity"


class CacheBusy(StoreError):
    """Another reconcile holds the lock on the cache."""

    exit_code = ExitCode.TRY_AGAIN
    http_status = 409
    code = "cache_busy"


class EngineError(Error):
    """Inference failed."""

    exit_code = ExitCode.SOFTWARE
    code = "engine_error"


class OutOfMemory(EngineError):
    """The device has not enough memory for this batch."""

    code = "out_of_memory"


class Unavailable(Error):
    """The request cannot be served now; ``retry_after_s`` is when to repeat it."""

    exit_code = ExitCode.TRY_AGAIN
    http_status = 503
    code = "unavailable"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(Unavailable):
    """More requests wait than the limit admits."""

    http_status = 429
    type = "rate_limit_error"
    code = "queue_full"


class ModelLoading(Unavailable):
    """The model is not loaded yet."""

    code = "model_loading"


class Draining(Unavailable):
    """The daemon is stopping and takes no new work."""

    code = "draining"


class SpoolFull(Unavailable):
    """The spool directory has no room for the upload."""

    code = "spool_full"


class DaemonUnreachable(Error):
    """No daemon answers on the socket."""

    exit_code = ExitCode.UNAVAILABLE
    code = "daemon_unreachable"


class SocketPermissionError(DaemonUnreachable):
    """The socket is there, but this user may not use it."""

    exit_code = ExitCode.NO_PERMISSION
    code = "socket_permission"


class OutputError(Error):
    """Standard output cannot be written."""

    exit_code = ExitCode.IO_ERROR
    code = "output_error"


class RemoteError(Error):
    """The daemon answered with an error.

    Args:
        message: the message of the daemon.
        status: HTTP status of the answer.
        code: OpenAI error code of the answer.
        exit_code: the exit code of the command.
        retry_after_s: when to repeat the request, if the daemon named a time.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str,
        exit_code: int = ExitCode.FAILED,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        self.remote_code = code
        self.remote_exit_code = exit_code


class Cancelled(Error):
    """The client disconnected or pressed Ctrl-C."""

    exit_code = ExitCode.INTERRUPTED
    http_status = 499
    code = "cancelled"


class DeadlineExceeded(Cancelled):
    """The request was not finished by its deadline."""

    exit_code = ExitCode.TRY_AGAIN
    http_status = 504
    code = "deadline_exceeded"

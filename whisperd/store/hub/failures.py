"""Failures of requests to the Hub and of the local disk, translated into whisperd's errors.

``BY_NAME`` knows every exception of ``huggingface_hub.errors``, by name since this module must not import the library;
a test proves that none is missing.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from whisperd.errors import (
    CachePermissionError,
    DiskFull,
    GatedError,
    HubAuthError,
    HubError,
    HubRateLimited,
    HubServerError,
    HubUnreachable,
    IntegrityError,
    RepoNotFound,
    RevisionNotFound,
    SourceError,
    StoreError,
)
from whisperd.store.wording import MAKE_ROOM

CAUSE_CHARS = 300
MESSAGE_CHARS = 1000
READ_CHARS = 10_000
RETRIED = (HubUnreachable, HubRateLimited, HubServerError)

# Classes that are less specific than the HTTP status, the errno or the cause that they carry.
LOOK_INSIDE = frozenset({"HfHubHTTPError", "LocalEntryNotFoundError", "DryRunError", "FileMetadataError"})

BY_NAME: Mapping[str, type[StoreError]] = {
    "GatedRepoError": GatedError,
    "RepositoryNotFoundError": RepoNotFound,
    "RevisionNotFoundError": RevisionNotFound,
    "RevisionResolutionError": RevisionNotFound,
    "RemoteEntryNotFoundError": HubError,
    "EntryNotFoundError": HubError,
    "DisabledRepoError": HubError,
    "BadRequestError": HubError,
    "LocalTokenNotFoundError": HubAuthError,
    "OIDCError": HubAuthError,
    "DeviceCodeError": HubAuthError,
    "HFValidationError": SourceError,
    "HfUriError": SourceError,
    "OfflineModeIsEnabled": HubUnreachable,
    "FileMetadataError": HubUnreachable,
    "DryRunError": HubUnreachable,
    "LocalEntryNotFoundError": HubUnreachable,
    "IncompleteSnapshotError": IntegrityError,
    "XetDownloadError": HubUnreachable,
    "CacheNotFound": StoreError,
    "CorruptedCacheException": IntegrityError,
    "CachedRepoTreeNotFoundError": StoreError,
    "FileDuplicationError": StoreError,
    "HfHubHTTPError": HubError,
    # raised by parts of the library that whisperd does not use
    "BucketBatchError": HubError,
    "BucketNotFoundError": HubError,
    "CLIError": HubError,
    "CLIExtensionInstallError": HubError,
    "ConfirmationError": HubError,
    "DDUFCorruptedFileError": HubError,
    "DDUFError": HubError,
    "DDUFExportError": HubError,
    "DDUFInvalidEntryNameError": HubError,
    "GenerationError": HubError,
    "IncompleteGenerationError": HubError,
    "InferenceEndpointError": HubError,
    "InferenceEndpointTimeoutError": HubError,
    "InferenceTimeoutError": HubError,
    "JobNotFoundError": HubError,
    "NotASafetensorsRepoError": HubError,
    "OverloadedError": HubError,
    "SafetensorsParsingError": HubError,
    "SandboxCommandError": HubError,
    "SandboxError": HubError,
    "StrictDataclassClassValidationError": HubError,
    "StrictDataclassDefinitionError": HubError,
    "StrictDataclassError": HubError,
    "StrictDataclassFieldValidationError": HubError,
    "TextGenerationError": HubError,
    "UnknownError": HubError,
    "ValidationError": HubError,
}
BY_STATUS: Mapping[int, type[StoreError]] = {
    401: HubAuthError,
    403: HubAuthError,
    404: RepoNotFound,
    408: HubUnreachable,
    416: HubUnreachable,
    429: HubRateLimited,
}
# The storage's error for an expired address; the storage has no token or repository to report on.
GONE = frozenset({401, 403, 404, 410})
BY_ERRNO: Mapping[int, type[StoreError]] = {
    errno.ENOSPC: DiskFull,
    errno.EDQUOT: DiskFull,
    errno.EACCES: CachePermissionError,
    errno.EPERM: CachePermissionError,
    errno.EROFS: CachePermissionError,
}
# Exceptions of Python and of the HTTP client: an invalid answer comes from something that is no Hub.
BY_BASE: Mapping[str, type[StoreError]] = {
    "HTTPError": HubUnreachable,  # of httpx2, whose name changes with huggingface_hub's major version
    "ConnectionError": HubUnreachable,
    "TimeoutError": HubUnreachable,
    "FileExistsError": StoreError,
    "NotADirectoryError": StoreError,
    "OSError": HubUnreachable,  # a file of another size than declared: has no errno
    "JSONDecodeError": HubUnreachable,
    "AssertionError": HubUnreachable,
    "RuntimeError": HubUnreachable,
    "ValueError": HubError,
}

CURES: Mapping[type[StoreError], str] = {
    GatedError: "accept the conditions at {endpoint}/{repo}, and set HF_TOKEN to a token of that account",
    HubAuthError: "set HF_TOKEN to a valid token that may read {repo}",
    RepoNotFound: "check the name; if the repository is private, set HF_TOKEN to a token that may read it",
    RevisionNotFound: "check the revision at {endpoint}/{repo}/tree/main",
    HubUnreachable: "check the network, the proxy and the endpoint",
    HubRateLimited: "try again later, or set HF_TOKEN for a higher limit",
    HubServerError: "try again later",
    DiskFull: MAKE_ROOM,
    CachePermissionError: "give this user write access to the cache, or choose another cache_dir",
    IntegrityError: "look for a proxy or a mirror that changes files",
}
IN_THE_WAY = frozenset({errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY})
MOVE_AWAY = "something is in the way there: move it, or choose another cache_dir"
WORDS: Mapping[type[StoreError], str] = {
    GatedError: "the repository asks for its conditions to be accepted",
    HubAuthError: "the Hub refused the token",
    RepoNotFound: "the Hub has no such repository",
    RevisionNotFound: "the repository has no such revision",
    HubUnreachable: "the Hub could not be asked",
    HubRateLimited: "the Hub asked to come back later",
    HubServerError: "the Hub failed",
    DiskFull: "the disk is full",
    CachePermissionError: "the cache cannot be written",
    IntegrityError: "the download is broken",
}
KINDS: Mapping[str, type[StoreError]] = {
    kind.__name__: kind for kind in {*BY_NAME.values(), *BY_STATUS.values(), *BY_ERRNO.values(), HubServerError}
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The repository, revision and endpoint of a request, for messages."""

    repo: str
    revision: str
    endpoint: str

    def own(self, error: StoreError) -> StoreError:
        """An error that whisperd raised itself, with the place."""
        return type(error)(f"{self.repo}@{self.revision} on {self.endpoint}: {error}"[:MESSAGE_CHARS])

    def error(self, kind: type[StoreError], cause: str) -> StoreError:
        """An error of this class with a message: what, where, why, and what to try."""
        place = f"{self.repo}@{self.revision} on {self.endpoint}"
        cure = CURES.get(kind, "").format(endpoint=self.endpoint, repo=self.repo)
        return kind(f"{place}: {WORDS.get(kind, 'failed')} ({cause}){f'; {cure}' if cure else ''}")


def classify(error: BaseException) -> type[StoreError]:
    """The class of whisperd for an exception of a job; whisperd's own are kept."""
    return type(error) if isinstance(error, StoreError) else _classify(error)


def _classify(error: BaseException) -> type[StoreError]:
    """The class of whisperd for an exception that came out of huggingface_hub."""
    names = [cls.__name__ for cls in type(error).__mro__]
    opaque = names[0] in LOOK_INSIDE
    kind = next((BY_NAME[name] for name in names if name in BY_NAME and name not in LOOK_INSIDE), None)
    if kind is not None and not opaque:
        return kind
    if (status := _status(error)) is not None:
        if _is_redirected(error) and status in GONE:
            return HubServerError
        return BY_STATUS.get(status, HubServerError if status >= 500 else HubError)
    if isinstance(error, OSError) and (error.errno or 0) in BY_ERRNO:
        return BY_ERRNO[error.errno or 0]
    if error.__cause__ is not None and (opaque or BY_BASE.keys().isdisjoint(names)):
        return _classify(error.__cause__)
    bases = (BY_BASE.get(name) or BY_NAME.get(name) for name in names)
    return next((base for base in bases if base is not None), HubError)


def describe(error: BaseException, secret: str | None) -> str:
    """The server's own words, else those of the innermost cause, in one line, without the token."""
    chain = list(_causes(error))
    told = next((one for one in chain if getattr(one, "server_message", None)), chain[-1])
    text = str(getattr(told, "server_message", None) or told)[:READ_CHARS]
    text = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    status = _status(told)
    words = f"HTTP {status}: {text}" if status else f"{type(told).__name__}: {text}"
    return (words.replace(secret, "***") if secret else words)[:CAUSE_CHARS]


def retry_after_s(error: BaseException) -> float | None:
    """How long the server asked to wait, in the form of seconds; None if it did not."""
    value = str(_header(error, "Retry-After") or "").strip()
    return float(value) if value.isdecimal() else None


def is_timeout(error: BaseException) -> bool:
    """True if nothing arrived within a time limit."""
    return isinstance(error, TimeoutError) or any(cls.__name__ == "TimeoutException" for cls in type(error).__mro__)


def is_nonsense(error: BaseException) -> bool:
    """Whether the bytes so far cannot belong to the file: its size is wrong, or the server has no more."""
    return _status(error) == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or (
        type(error) is OSError and not error.errno  # "the file should be of size"
    )


def disk_error(error: OSError, path: Path) -> StoreError:
    """An error of the local file system as one of whisperd's, with its path."""
    kind = BY_ERRNO.get(error.errno or 0, StoreError)
    cure = MOVE_AWAY if error.errno in IN_THE_WAY else CURES.get(kind, "")
    place = error.filename2 or error.filename or path
    return kind(f"{place}: {error.strerror or error}{f'; {cure}' if cure else ''}")


def _is_redirected(error: BaseException) -> bool:
    """Whether the storage to which the Hub redirected the client answered, and not the Hub."""
    return bool(getattr(getattr(error, "response", None), "history", None))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _header(error: BaseException, name: str) -> object:
    headers = getattr(getattr(error, "response", None), "headers", {})
    return headers.get(name)

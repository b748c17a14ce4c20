"""Every exception of huggingface_hub is translated into an error of whisperd."""

from __future__ import annotations

import errno
import inspect

import huggingface_hub.errors
import pytest

from whisperd import errors
from whisperd.store.hub.failures import BY_NAME, CURES, KINDS, Subject, classify, describe


def raised_by_the_library() -> set[str]:
    found = vars(huggingface_hub.errors).items()
    return {
        name
        for name, value in found
        if inspect.isclass(value) and issubclass(value, Exception) and value.__module__ == "huggingface_hub.errors"
    }


def test_the_table_is_complete() -> None:
    """Every exception class of the installed library has a class of whisperd; an older one has fewer of them."""
    known = raised_by_the_library()
    assert known <= set(BY_NAME)
    assert {"HfHubHTTPError", "GatedRepoError", "RepositoryNotFoundError", "RevisionNotFoundError"} <= known


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), errors.DiskFull),
        (PermissionError(errno.EACCES, "Permission denied"), errors.CachePermissionError),
        (OSError("Consistency check failed: file should be of size 1"), errors.HubUnreachable),
        (ConnectionResetError("reset"), errors.HubUnreachable),
        (TimeoutError("slow"), errors.HubUnreachable),
        (AssertionError("no sha"), errors.HubUnreachable),
        (huggingface_hub.errors.HFValidationError("bad id"), errors.SourceError),
    ],
)
def test_classes(error: Exception, expected: type[errors.StoreError]) -> None:
    """Exceptions of Python itself are classified by their meaning."""
    assert classify(error) is expected


def test_the_cause_counts() -> None:
    """An error that hides another is classified as the other one."""
    outer = huggingface_hub.errors.LocalEntryNotFoundError("cannot find it")
    outer.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert classify(outer) is errors.DiskFull


def test_no_token_in_a_message() -> None:
    """A secret that an exception quotes is removed."""
    assert "hf_secret" not in describe(ValueError("Authorization: Bearer hf_secret"), "hf_secret")


def test_messages() -> None:
    """A message says what, where, why and what to try."""
    subject = Subject(repo="o/n", revision="main", endpoint="https://hub")
    text = str(subject.error(errors.GatedError, "HTTP 403"))
    assert text.startswith(
        "o/n@main on https://hub: the repository asks for its conditions to be accepted (HTTP 403); "
    )
    assert "https://hub/o/n" in text
    assert set(CURES) <= set(KINDS.values())

"""A fake daemon behind the real server, and a client of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.support.api import client_of
from tests.support.service_fake import Daemon, daemon


@pytest.fixture
def whisperd(tmp_path: Path) -> Iterator[Daemon]:
    with daemon(tmp_path) as running:
        yield running


@pytest.fixture
def client(whisperd: Daemon) -> Iterator[httpx2.Client]:
    with client_of(whisperd.path) as client:
        yield client

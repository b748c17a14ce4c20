"""The loader as the event loop sees it: one task at a time is at it, and the others wait without holding a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from whisperd.config import Config
from whisperd.daemon.loader import Loader
from whisperd.errors import ModelLoading

PATIENCE_S = 120.0  # how long a request waits while models are switched, as it would at a boot
RETRY_AFTER_S = 10.0


class LoaderQueue:
    """Used on the event loop only.

    Args:
        loader: does the work, in a thread.
        patience_s: how long a request waits for its turn.
    """

    def __init__(self, loader: Loader, *, patience_s: float = PATIENCE_S) -> None:
        self._loader = loader
        self._patience_s = patience_s
        self._turn = asyncio.Lock()

    async def switch(self, config: Config, snapshots: Mapping[str, Path]) -> None:
        """See ``Loader.switch``."""
        async with self._turn:
            await asyncio.to_thread(self._loader.switch, config, snapshots)

    async def load_one(self, name: str) -> None:
        """See ``Loader.load_one``; raises ModelLoading as well when models are switched for too long."""
        try:
            async with asyncio.timeout(self._patience_s):
                await self._turn.acquire()
        except TimeoutError as error:
            raise ModelLoading(f"model {name!r} waits for other models to load", retry_after_s=RETRY_AFTER_S) from error
        try:
            await asyncio.to_thread(self._loader.load_one, name)
        finally:
            self._turn.release()

    async def unload_idle(self, idle_s: float) -> None:
        """See ``Loader.unload_idle``."""
        async with self._turn:
            await asyncio.to_thread(self._loader.unload_idle, idle_s)

"""``python openai_async.py FILE...``: many files at a time with OpenAI's SDK; their windows share batches."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx2
import openai

AT_ONCE = 16  # below limits.requests, so that none is refused


async def transcribe(client: openai.AsyncOpenAI, path: Path, turns: asyncio.Semaphore) -> str:
    """The text of one file."""
    async with turns:
        return (await client.audio.transcriptions.create(model="whisper-1", file=path)).text


async def main(paths: Sequence[Path]) -> None:
    """Prints each file with its text, in the order given."""
    transport = httpx2.AsyncHTTPTransport(uds=os.environ.get("WHISPERD_SOCKET", "/run/whisperd.sock"))
    http_client = openai.DefaultAsyncHttpxClient(transport=transport)
    turns = asyncio.Semaphore(AT_ONCE)
    async with openai.AsyncOpenAI(base_url="http://whisperd/v1", api_key="none", http_client=http_client) as client:
        texts = await asyncio.gather(*(transcribe(client, path, turns) for path in paths))
    for path, text in zip(paths, texts, strict=True):
        sys.stdout.write(f"{path.name}: {text}\n")


if __name__ == "__main__":
    asyncio.run(main([Path(name) for name in sys.argv[1:]]))

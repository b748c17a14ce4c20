"""``python openai_sdk.py FILE``: OpenAI's SDK with whisperd; ``pip install openai``.

Over TCP (``tcp`` in ``[server]``) the ordinary client will do: ``OPENAI_BASE_URL=http://127.0.0.1:9000/v1`` and, with
``tcp_key_file``, its key as ``OPENAI_API_KEY``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import httpx2
import openai


def make_client() -> openai.OpenAI:
    """A client over TCP where the environment has an address, else over the Unix socket."""
    if "OPENAI_BASE_URL" in os.environ:
        return openai.OpenAI()
    transport = httpx2.HTTPTransport(uds=os.environ.get("WHISPERD_SOCKET", "/run/whisperd.sock"))
    http_client = openai.DefaultHttpxClient(transport=transport)
    return openai.OpenAI(base_url="http://whisperd/v1", api_key="none", http_client=http_client)


def main(path: Path) -> None:
    """Prints the text, the times of the words, and the text again as it becomes known."""
    with make_client() as client:
        transcriptions = client.audio.transcriptions
        sys.stdout.write(transcriptions.create(model="whisper-1", file=path).text + "\n")
        verbose = transcriptions.create(
            model="whisper-1", file=path, response_format="verbose_json", timestamp_granularities=["word"]
        )
        for word in verbose.words or ():
            sys.stdout.write(f"{word.start:7.2f} {word.end:7.2f}  {word.word}\n")
        for event in transcriptions.create(model="whisper-1", file=path, stream=True):
            if event.type == "transcript.text.delta":
                sys.stdout.write(event.delta)
        sys.stdout.write("\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

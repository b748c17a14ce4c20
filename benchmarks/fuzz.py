"""Damages recordings of every container at random and decodes them as the daemon does.

    python -m benchmarks.fuzz --files 1000 --seed 1

Each answer must be samples or a refusal; anything else ends the run with the seed of the file. Needs ffmpeg.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import resource
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from whisperd.errors import AudioError
from whisperd.speech.audio import AudioRequest
from whisperd.speech.isolation import IsolatedDecoder

MAX_S = 3600.0
PARALLEL = 4
SECONDS = 3
LIMITS = ("of memory", "CPU time", "the process that decoded it")  # how messages name them
FORMS: dict[str, tuple[str, ...]] = {
    "aac": ("-c:a", "aac"),
    "ac3": (),
    "aiff": (),
    "au": (),
    "avi": ("-c:a", "mp3"),
    "caf": (),
    "eac3": (),
    "flac": (),
    "flv": ("-c:a", "aac"),
    "m4a": ("-c:a", "aac"),
    "mkv": ("-c:a", "libvorbis"),
    "mov": ("-c:a", "alac"),
    "mp2": (),
    "mp3": (),
    "mpg": ("-c:a", "mp2"),
    "ogg": ("-c:a", "libopus"),
    "oga": ("-c:a", "libvorbis"),
    "spx": ("-c:a", "libspeex", "-ar", "16000"),
    "ts": ("-c:a", "aac"),
    "tta": (),
    "w64": (),
    "wav": ("-c:a", "pcm_f32le"),
    "webm": ("-c:a", "libopus"),
    "wma": (),
    "wv": (),
}


def originals(directory: Path) -> dict[str, bytes]:
    """A few seconds of noise in each container, by suffix."""
    found: dict[str, bytes] = {}
    for suffix, arguments in FORMS.items():
        path = directory / f"x.{suffix}"
        source = ("-f", "lavfi", "-i", f"anoisesrc=d={SECONDS}:a=0.1:seed=1", "-ac", "2")
        subprocess.run(["ffmpeg", "-nostdin", "-v", "error", "-y", *source, *arguments, str(path)], check=True)  # noqa: S607
        found[suffix] = path.read_bytes()
    return found


def damaged(data: bytes, chance: random.Random) -> bytes:
    """The file with bytes changed, mostly in its head, where the numbers are; parts lost, doubled or cut off."""
    found = bytearray(data)
    for _ in range(chance.choice((1, 2, 5, 20, 100))):
        at = chance.randrange(min(len(found), chance.choice((64, 512, 4096, 1 << 30))) or 1)
        match chance.randrange(5):
            case 0:
                found[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                found[at : at + 4] = chance.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", bytes(4), b"\0\0\0\1"))
            case 2:
                found[at : at + chance.randrange(1, 2000)] = b""
            case 3:
                found[at:at] = found[at : at + chance.randrange(1, 2000)]
            case _:
                found[at : at + 24] = chance.randbytes(24)
        if not found:
            break
    return bytes(found[: chance.randrange(len(found) + 1)] if chance.randrange(8) == 0 else found)


def outcome(decoder: IsolatedDecoder, data: bytes) -> str:
    """``read``, or the class of the error that refuses the file."""
    try:
        with decoder.open(io.BytesIO(data), AudioRequest(name="fuzz", max_s=MAX_S)) as recording:
            for block in recording.blocks():
                if not np.isfinite(block).all() or np.abs(block).max() > 1.0:
                    raise AssertionError("samples out of range")
    except AudioError as error:
        text = str(error)
        return next((kind for kind in LIMITS if kind in text), type(error).__name__)
    return "read"


def fuzz(n_files: int, seed: int) -> Counter[str]:
    """Counts the outcomes of so many files."""
    decoder = IsolatedDecoder(os.environ)
    decoder.start()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(PARALLEL) as pool:
        whole = originals(Path(name))

        def one(number: int) -> str:
            chance = random.Random(f"{seed}-{number}")
            suffix = chance.choice(sorted(whole))
            return outcome(decoder, damaged(whole[suffix], chance))

        try:
            return Counter(pool.map(one, range(n_files)))
        finally:
            decoder.close()


def _lines(n_files: int, seed: int) -> Iterator[str]:
    started_s, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts = fuzz(n_files, seed)
    yield f"{n_files} files in {time.monotonic() - started_s:.0f} s: {dict(counts)}"
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield f"most memory of the parent: {before // 1024} MiB before, {after // 1024} MiB after"


def main() -> None:
    """Prints how many files were read and how many refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    for line in _lines(given.files, given.seed):
        print(line, flush=True)


if __name__ == "__main__":
    main()

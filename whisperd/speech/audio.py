"""Any container to mono float32 at 16 kHz, as a stream. Home of PyAV."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, pairwise
from typing import TYPE_CHECKING, BinaryIO, cast

import numpy as np

from whisperd.errors import AudioError, AudioTooLong
from whisperd.speech.units import SAMPLE_RATE_HZ, Samples

if TYPE_CHECKING:
    from av.audio.fifo import AudioFifo
    from av.audio.frame import AudioFrame
    from av.container import InputContainer


BLOCK_SAMPLES = 10 * SAMPLE_RATE_HZ  # large enough that the detector runs at full speed, small enough to stream
MAX_BAD_PACKETS = 100  # ffmpeg skips damaged packets too; past this the file is not worth guessing

# Only demuxers that read one self-contained stream: playlists, concat scripts and image or text "videos" could open
# other files or addresses in the daemon's name.
DEMUXERS = (
    "aac", "ac3", "aiff", "amr", "asf", "au", "avi", "caf", "dts", "eac3", "flac", "flv", "matroska", "webm", "mov",
    "mp4", "m4a", "3gp", "3g2", "mj2", "mp3", "mpeg", "mpegts", "ogg", "tta", "w64", "wav", "wv",
)  # fmt: skip
FORMATS = "wav, flac, mp3, m4a, aac, ogg, opus, webm, mp4, mkv, mov, aiff, wma, amr, avi"


def probe(file: BinaryIO) -> float | None:
    """Duration in seconds as the container's header states it, None when it does not; leaves ``file`` at 0."""
    try:
        with _open(file, None) as container:
            return container.duration / 1_000_000 if container.duration else None
    except AudioError:
        return None  # ``blocks`` will say what is wrong
    finally:
        file.seek(0)


def blocks(file: BinaryIO, *, name: str | None = None, max_s: float | None = None) -> Iterator[Samples]:
    """Decodes the first audio stream to float32 blocks [n] of mono 16 kHz, n <= BLOCK_SAMPLES.

    Args:
        file: seekable, positioned at the start.
        name: what the user calls it, for messages.
        max_s: longer audio raises AudioTooLong.

    Raises:
        AudioError: nothing in it can be decoded. A damaged or truncated file yields what is there.
    """
    label = repr(name) if name else "the audio"
    n_samples = 0
    for block in _gathered(_decoded(file, label)):
        n_samples += len(block)
        if max_s is not None and n_samples > max_s * SAMPLE_RATE_HZ:
            raise AudioTooLong(f"{label} is longer than the limit of {max_s:g} s (limits.audio_s)")
        yield block


def _gathered(pieces: Iterator[Samples]) -> Iterator[Samples]:
    waiting: list[Samples] = []
    n_waiting = 0
    for piece in pieces:
        waiting.append(piece)
        n_waiting += len(piece)
        if n_waiting >= BLOCK_SAMPLES:
            joined = np.concatenate(waiting)
            whole = len(joined) // BLOCK_SAMPLES * BLOCK_SAMPLES
            yield from joined[:whole].reshape(-1, BLOCK_SAMPLES)
            waiting, n_waiting = [joined[whole:]], len(joined) - whole
    if n_waiting:
        yield np.concatenate(waiting)


def _decoded(file: BinaryIO, label: str) -> Iterator[Samples]:
    import av

    n_samples = 0
    with _open(file, label) as container, _translated(label):
        if not container.streams.audio:
            raise AudioError(f"{label} has no audio stream")
        path = _path(file)
        broken = av.error.FFmpegError
        for piece in _by_packets(container, broken) if path is None else _by_filters(path, container, broken):
            n_samples += len(piece)
            yield piece
    if not n_samples:
        raise AudioError(f"{label} holds no audio that can be decoded; is the file damaged or cut off?")


def _path(file: BinaryIO) -> str | None:
    """Where ffmpeg can open the same file by itself, deleted or not; None: it is in memory, or who knows where."""
    try:
        path = f"/proc/self/fd/{file.fileno()}"
    except (AttributeError, OSError):
        return None
    return path if os.access(path, os.R_OK) else None


def _by_filters(path: str, container: InputContainer, broken: type[Exception]) -> Iterator[Samples]:
    """All of the work in one graph of ffmpeg's filters, which Python asks for seconds and not for packets.

    Packets are many and small: in Python, one request at a time would be busy with them. Damaged ones are skipped.
    """
    from av.filter import Graph

    graph = Graph()
    rate = str(SAMPLE_RATE_HZ)
    options = f"format_whitelist={','.join(DEMUXERS)}:protocol_whitelist=file"
    links = [
        graph.add("amovie", filename=path, format_name=container.format.name, streams="a:0", format_opts=options),
        graph.add("aformat", sample_fmts="flt", sample_rates=rate, channel_layouts="mono"),
        graph.add("asetnsamples", nb_out_samples=rate, pad="0"),
        graph.add("abuffersink"),
    ]
    for one, other in pairwise(links):
        one.link_to(other)
    graph.configure()
    n_bad = 0
    while n_bad <= MAX_BAD_PACKETS:
        try:
            frame = cast("AudioFrame", links[-1].pull())
        except EOFError:
            return
        except broken:
            n_bad += 1
        else:
            yield _samples(frame)


def _by_packets(container: InputContainer, broken: type[Exception]) -> Iterator[Samples]:
    """The same for a file that only Python can read."""
    from av.audio.resampler import AudioResampler

    resampler = AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE_HZ)
    for frame in chain(_frames(container, broken), (None,)):
        for out in resampler.resample(frame):
            yield _samples(out)


def _frames(container: InputContainer, broken: type[Exception]) -> Iterator[AudioFrame]:
    """The first audio stream in frames of about a second; damaged packets are skipped, a damaged end is the end.

    What Python does for each packet, it does for one request at a time: hence so little.
    """
    from av.audio.fifo import AudioFifo

    fifo, n_bad = AudioFifo(), 0
    packets = container.demux(container.streams.audio[0])
    while n_bad <= MAX_BAD_PACKETS:
        try:
            for packet in packets:
                for frame in packet.decode():
                    frame.pts = None  # gaps and jumps in a file's clock must not stop the resampler
                    fifo.write(frame)
                if fifo.samples >= SAMPLE_RATE_HZ:
                    yield from _read(fifo)
            break
        except (broken, EOFError):
            n_bad += 1
    yield from _read(fifo)


def _read(fifo: AudioFifo) -> Iterator[AudioFrame]:
    """All that it holds, if anything."""
    frame = fifo.read() if fifo.samples else None
    if frame is not None:
        yield frame


def _samples(frame: AudioFrame) -> Samples:
    return np.asarray(frame.to_ndarray(), np.float32).reshape(-1)


@contextmanager
def _open(file: BinaryIO, label: str | None) -> Iterator[InputContainer]:
    import av

    av.logging.set_level(av.logging.PANIC)
    label = label or "the audio"
    if not file.read(1):
        raise AudioError(f"{label} is empty (0 bytes)")
    file.seek(0)
    with _translated(label):
        container = av.open(file, mode="r", metadata_errors="ignore", options={"format_whitelist": ",".join(DEMUXERS)})
    with container:
        yield container


@contextmanager
def _translated(label: str) -> Iterator[None]:
    """PyAV's errors have one base class; whichever it is, this input cannot be read."""
    import av

    try:
        yield
    except (av.error.FFmpegError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise AudioError(f"{label} is not audio that whisperd can read ({reason}); it reads {FORMATS}") from error

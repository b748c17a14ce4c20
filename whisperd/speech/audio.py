"""Any container to mono float32 at 16 kHz, on the file's own timeline. Home of PyAV.

Frames of one format are converted together, two seconds at a time. When the rate, the layout or the sample format
changes, what was begun is finished and the next frames get a converter of their own: nothing is lost at the seam.
Damaged packets cost themselves and nothing else, and silence stands for them.
"""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from whisperd.errors import AudioError, AudioTooLong, RequestError
from whisperd.speech import chains, mixing
from whisperd.speech.languages import language_code
from whisperd.speech.timeline import Completeness, Timeline
from whisperd.speech.units import SAMPLE_RATE_HZ, Samples

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame
    from av.audio.stream import AudioStream
    from av.container import InputContainer

BLOCK_SAMPLES = 10 * SAMPLE_RATE_HZ  # large enough that the detector runs at full speed, small enough to stream
TOGETHER_S = 2  # what is converted at once
READ_ERRORS_MAX = 100  # in a row, without one packet: the file cannot be read on
RATES_HZ = range(1_000, 1_000_000)  # outside of it no speech is left, and a header is damaged or hostile
SCAN_S = 600.0  # how much of a file of floats is read to find its scale
MICROSECONDS = 1_000_000
TAGS = (b"ID3", b"TAG", b"APETAGEX")  # between MP3s that were joined; no damage
ID3_BYTES = 10  # the head of a tag, with its size
XING_BYTES = 4096  # where an MP3's first frame, with its table of contents, lies
XING_SLACK = 17 / 16  # ffmpeg takes a larger file for a joined one

RIFF_BYTES = 12
CHUNK = struct.Struct("<4sI")
WAV_FORMAT = struct.Struct("<HHII")  # format, channels, rate, bytes per second
UNKNOWN_BYTES = 0x7FFF0000  # sizes from here on are what programs write that write to a pipe
DTYPES = {"u8": "u1", "s16": "i2", "s32": "i4", "s64": "i8", "flt": "f4", "dbl": "f8"}  # of ffmpeg's sample formats

# Only demuxers that read one self-contained stream: playlists, concat scripts and image or text "videos" could open
# other files or addresses in the daemon's name.
DEMUXERS = (
    "aac", "ac3", "aiff", "amr", "asf", "au", "avi", "caf", "dts", "eac3", "flac", "flv", "matroska", "webm", "mov",
    "mp4", "m4a", "3gp", "3g2", "mj2", "mp3", "mpeg", "mpegts", "ogg", "tta", "w64", "wav", "wv",
)  # fmt: skip
PROTOCOLS = "file,subfile"  # subfile: a part of one file
FORMATS = "wav, flac, mp3, m4a, aac, ogg, opus, webm, mp4, mkv, mov, aiff, wma, amr, avi"
# Formats whose header counts the audio; the others estimate a length from the bit rate
EXACT = frozenset({"aiff", "asf", "au", "avi", "caf", "flac", "matroska", "mov", "ogg", "tta", "w64", "wv"})
# Bare streams of one codec, in which timestamps are counted and not read
BARE = frozenset({"aac", "ac3", "amr", "dts", "eac3", "mp3", "tta", "wv"})
JOINED = frozenset({"mpeg", "mpegts"})  # broadcast streams, whose clocks jump where recordings are joined


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioRequest:
    """What is read of a file, and how far.

    ``name`` is what the user calls it, for messages. Audio longer than ``max_s`` is refused. ``track`` is the number
    of an audio track, from 0, or its language; None is the container's default track.
    """

    name: str | None = None
    max_s: float | None = None
    track: int | str | None = None

    @property
    def label(self) -> str:
        """The file in messages."""
        return repr(self.name) if self.name else "the audio"


class Recording(Protocol):
    """An open file."""

    @property
    def length_s(self) -> float | None:
        """As the container's header states it, which may be an estimate; None when it does not."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is missing of the audio, one sentence each; known behind the last block."""

    def blocks(self) -> Iterator[Samples]:
        """Float32 blocks [n] of mono 16 kHz in [-1, 1], n <= BLOCK_SAMPLES; once.

        Raises:
            AudioError: nothing in it can be decoded, or less than a third of what is in the file.
            AudioTooLong: it is longer than the request allows.
        """


class Decoder(Protocol):
    """Opens recordings; from any thread."""

    def open(self, file: BinaryIO, request: AudioRequest) -> AbstractContextManager[Recording]:
        """``file`` is seekable, positioned at the start. Raises AudioError, or RequestError for an unknown track."""


class InProcessDecoder:
    """Decodes where it is called: for files that are trusted, and inside a process that is there for it."""

    @contextmanager
    def open(self, file: BinaryIO, request: AudioRequest) -> Iterator[Recording]:
        """See ``Decoder``."""
        source = _Source(file, request)
        with source.opened() as container:
            yield _Recording(source, container)


def blocks(
    file: BinaryIO, *, name: str | None = None, max_s: float | None = None, track: int | str | None = None
) -> Iterator[Samples]:
    """Decodes a trusted file in this process; see ``Recording.blocks``."""
    with InProcessDecoder().open(file, AudioRequest(name=name, max_s=max_s, track=track)) as recording:
        yield from recording.blocks()


def gathered(pieces: Iterator[Samples]) -> Iterator[Samples]:
    """The same samples in blocks of BLOCK_SAMPLES; the last one may be shorter."""
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


class _Source:
    """A file and what is asked of it; opened once for each link of a chained file."""

    def __init__(self, file: BinaryIO, request: AudioRequest) -> None:
        self.file = file
        self.request = request
        if not file.read(1):
            raise AudioError(f"{request.label} is empty (0 bytes)")
        self.links = chains.links(file)
        self._path = _path(file)

    @contextmanager
    def opened(self, link: tuple[int, int] | None = None) -> Iterator[InputContainer]:
        """The container, or the part of it between two bytes."""
        import av

        av.logging.set_level(av.logging.PANIC)
        options = {"format_whitelist": ",".join(DEMUXERS)} | ({"protocol_whitelist": PROTOCOLS} if self._path else {})
        # tags in any encoding must not matter; PyAV 19 reads them so by itself and has no such argument any more
        lenient: dict[str, Any] = {} if int(av.__version__.partition(".")[0]) >= 19 else {"metadata_errors": "ignore"}
        with _translated(self.request.label):
            container = av.open(self._input(link), mode="r", options=options, **lenient)
        with container:
            yield container

    def _input(self, link: tuple[int, int] | None) -> str | BinaryIO:
        if self._path is not None:
            return f"subfile,,start,{link[0]},end,{link[1]},,:{self._path}" if link else self._path
        self.file.seek(link[0] if link else 0)
        return io.BytesIO(self.file.read(link[1] - link[0])) if link else self.file


class _Recording:
    """See ``Recording``."""

    def __init__(self, source: _Source, container: InputContainer) -> None:
        names = set(container.format.name.split(","))
        self._source = source
        self._container = container
        self._request = source.request
        self._stream = _stream(container, source.request)
        is_chain = len(source.links) > 1
        self._claimed_s = None if is_chain else _claimed_s(container, self._stream, source.file)
        self.length_s = None if is_chain else _length_s(container)
        self._scale = _scale(source, self._stream.index) if _is_float_pcm(self._stream) else 1.0
        self._timeline = Timeline(self.length_s, joins=bool(names & JOINED), is_bare=bool(names & BARE))
        self._damage = _Damage()
        self._n_samples = 0  # that were yielded
        self._section: _Section | None = None
        self._n_decoded = 0
        self._silence_s = self._holes_s = 0.0
        self._n_holes = 0
        self.warnings: tuple[str, ...] = ()

    def blocks(self) -> Iterator[Samples]:
        """See ``Recording``."""
        label = self._request.label
        with _translated(label):
            yield from gathered(self._limited(self._decoded()))
        if not self._n_decoded:
            raise AudioError(f"{label} holds no audio that can be decoded; is the file damaged or cut off?")
        found = Completeness(
            end_s=self._n_samples / SAMPLE_RATE_HZ,
            claimed_s=self._claimed_s,
            silence_s=self._silence_s,
            lost_s=max(self._silence_s, self._damage.lost_s),
            n_damaged=self._damage.n_packets,
            holes_s=self._holes_s,
            n_holes=self._n_holes,
        )
        if found.is_mostly_missing:
            raise AudioError(f"most of {label} is missing: {'; '.join(found.warnings)}")
        self.warnings = found.warnings

    def _limited(self, pieces: Iterator[Samples]) -> Iterator[Samples]:
        max_s = self._request.max_s
        for piece in pieces:
            self._n_samples += len(piece)
            if max_s is not None and self._n_samples > max_s * SAMPLE_RATE_HZ:
                raise AudioTooLong(f"{self._request.label} is longer than the limit of {max_s:g} s (limits.audio_s)")
            yield piece

    def _decoded(self) -> Iterator[Samples]:
        if len(self._source.links) < 2:
            yield from self._converted(self._container, self._stream)
            return
        for link in self._source.links:
            self._timeline.restart(self._position_s)
            with suppress(AudioError), self._source.opened(link) as container:
                yield from self._converted(container, _stream(container, self._request))

    def _converted(self, container: InputContainer, stream: AudioStream) -> Iterator[Samples]:
        damage, timeline = self._damage, self._timeline
        for frame, stamp_s in _frames(container, stream, damage):
            self._n_decoded += 1
            section = self._section
            # frames are many and small: what is in its place, as a rule, is passed on with as little work as can be
            if damage.is_new or section is None or not timeline.is_in_place(self._position_s, stamp_s):
                yield from self._placed(stamp_s)
                section = self._section
            if section is None or not section.fits(frame):
                yield from self._finished()
                section = self._section = _Section(frame, self._scale)
            section.add(frame)
            if section.is_full:
                yield section.drain()
        if damage.is_new:
            yield from self._placed(damage.until_s)
        yield from self._finished()

    @property
    def _position_s(self) -> float:
        return self._n_samples / SAMPLE_RATE_HZ + (self._section.waiting_s if self._section else 0.0)

    def _placed(self, stamp_s: float | None) -> Iterator[Samples]:
        """Silence before a frame that begins later than the sound before it ends."""
        damaged, self._damage.is_new = self._damage.is_new, False
        hole_s = self._timeline.hole_s(self._position_s, stamp_s, damaged=damaged)
        if hole_s:
            yield from self._finished()
            self._silence_s += hole_s * damaged
            # sound may begin later than the picture
            is_inside = not damaged and self._n_decoded > 1
            self._holes_s += hole_s * is_inside
            self._n_holes += is_inside
            left = round(hole_s * SAMPLE_RATE_HZ)
            while left > 0:
                yield np.zeros(min(left, BLOCK_SAMPLES), np.float32)
                left -= BLOCK_SAMPLES

    def _finished(self) -> Iterator[Samples]:
        if self._section is not None:
            section, self._section = self._section, None
            yield section.finish()


class _Section:
    """Frames of one format on their way to 16 kHz."""

    def __init__(self, frame: AudioFrame, scale: float) -> None:
        from av.audio.fifo import AudioFifo
        from av.audio.resampler import AudioResampler

        self._format, self._layout = frame.format.name, frame.layout
        self._rate_hz = frame.sample_rate
        self._scale = scale
        self._is_float = frame.format.name.startswith(("flt", "dbl"))
        self._weights = mixing.channel_weights([channel.name for channel in frame.layout.channels])
        self._resampler = AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE_HZ)
        self._fifo = AudioFifo()
        self._n_taken = 0  # samples at the file's rate
        self._n_waiting = 0  # of these in the buffer
        self._n_given = 0  # samples at 16 kHz

    @property
    def is_full(self) -> bool:
        """True when enough has come together."""
        return self._n_waiting >= TOGETHER_S * self._rate_hz

    @property
    def waiting_s(self) -> float:
        """Sound that was added and not given out yet."""
        return self._n_taken / self._rate_hz - self._n_given / SAMPLE_RATE_HZ

    def fits(self, frame: AudioFrame) -> bool:
        """True when this frame has the format of the others."""
        return bool(
            frame.sample_rate == self._rate_hz and frame.layout == self._layout and frame.format.name == self._format
        )

    def add(self, frame: AudioFrame) -> None:
        """Takes the next frame, of any length."""
        frame.pts = None  # the timeline has placed it; the buffer would refuse what does not follow by the number
        self._fifo.write(frame)
        self._n_taken += frame.samples
        self._n_waiting += frame.samples

    def drain(self) -> Samples:
        """What can be converted now, float32 [n]."""
        self._n_waiting = 0
        frame = self._fifo.read()
        found = self._resampled(self._mono(frame)) if frame is not None else np.zeros(0, np.float32)
        self._n_given += len(found)
        return found

    def finish(self) -> Samples:
        """The rest, float32 [n]: all sections together are as long as what went in."""
        n_given, n_total = self._n_given, round(self._n_taken * SAMPLE_RATE_HZ / self._rate_hz)
        rest = np.concatenate([self.drain(), self._pulled(None)])[: max(0, n_total - n_given)]
        self._n_given = n_total
        return np.concatenate([rest, np.zeros(max(0, n_total - n_given - len(rest)), np.float32)])

    def _mono(self, frame: AudioFrame) -> Samples:
        channels = mixing.as_channels(_array(frame), len(self._weights))
        if self._is_float and (self._scale != 1.0 or not mixing.is_plausible(channels)):
            channels = mixing.within_range(channels, self._scale)
        return mixing.downmix(channels, self._weights)

    def _resampled(self, mono: Samples) -> Samples:
        from av.audio.frame import AudioFrame

        frame = AudioFrame.from_ndarray(np.ascontiguousarray(mono[None]), format="flt", layout="mono")
        frame.sample_rate = self._rate_hz
        return self._pulled(frame)

    def _pulled(self, frame: AudioFrame | None) -> Samples:
        found = [np.asarray(out.to_ndarray(), np.float32).reshape(-1) for out in self._resampler.resample(frame) if out]
        return np.clip(np.concatenate(found), -1.0, 1.0) if found else np.zeros(0, np.float32)


def _array(frame: AudioFrame) -> NDArray[Any]:
    """[channels, n] when planar, else [1, n * channels], in the frame's own type.

    As PyAV's ``to_ndarray``, which with ``planes`` goes past the last plane of a frame with eight channels or more.
    """
    from av.audio.plane import AudioPlane

    n_channels, n_samples = frame.layout.nb_channels, frame.samples
    n_planes, n_each = (n_channels, n_samples) if frame.format.is_planar else (1, n_samples * n_channels)
    dtype = np.dtype(DTYPES[frame.format.name.removesuffix("p")])
    planes = [np.frombuffer(memoryview(AudioPlane(frame, index)), dtype, n_each) for index in range(n_planes)]
    return planes[0][None] if n_planes == 1 else np.stack(planes)


@dataclass(slots=True)
class _Damage:
    """Packets that could not be decoded; ``is_new`` since the last frame, ``until_s`` the end of the last one."""

    n_packets: int = 0
    lost_s: float = 0.0
    until_s: float | None = None
    is_new: bool = False

    def count(self, packet: Any, unit_s: float, origin_s: float) -> None:
        """One more packet, whose times are in units of ``unit_s``."""
        self.n_packets += 1
        self.is_new = True
        duration = packet.duration or 0
        self.lost_s += duration * unit_s
        self.until_s = None if packet.pts is None else (packet.pts + duration) * unit_s - origin_s


def _frames(
    container: InputContainer, stream: AudioStream, damage: _Damage
) -> Iterator[tuple[AudioFrame, float | None]]:
    """The frames of one stream with their times in seconds from the start of the file, None where unknown."""
    origin_s = _origin_s(container)
    unit_s = float(stream.time_base or 0)
    for packet in _packets(container, stream, damage):
        frames = _frames_of(packet)
        if frames is None:
            damage.count(packet, unit_s, origin_s)
            continue
        for frame in frames:
            if frame.sample_rate in RATES_HZ:
                stamp = frame.pts
                yield frame, None if stamp is None else stamp * unit_s - origin_s
            else:
                damage.count(packet, unit_s, origin_s)


def _packets(container: InputContainer, stream: AudioStream, damage: _Damage) -> Iterator[Any]:
    """Reads on behind a damaged place in the container, as long as anything comes."""
    from av.error import FFmpegError

    n_errors = 0
    while n_errors <= READ_ERRORS_MAX:
        try:
            for packet in container.demux(stream):
                n_errors = 0
                yield packet
        except MemoryError:
            raise
        except FFmpegError:
            n_errors += 1
            damage.is_new = True
        except IndexError:  # PyAV up to 18 trips at the end over streams that appeared on the way
            return
        else:
            return


def _frames_of(packet: Any) -> list[AudioFrame] | None:
    """What a packet holds; None: it is damaged."""
    from av.error import FFmpegError

    try:
        return packet.decode()  # type: ignore[no-any-return]
    except MemoryError:
        raise
    except EOFError:
        return []
    except (FFmpegError, ValueError):
        return [] if bytes(memoryview(packet)[: len(TAGS[-1])]).startswith(TAGS) else None


def _origin_s(container: InputContainer) -> float:
    """The time that counts as zero: where the first of all streams begins, as for ffmpeg and players."""
    start_s = (container.start_time or 0) / MICROSECONDS
    return start_s if abs(start_s) < 1e12 else 0.0  # FFmpeg's "unknown", which not every PyAV translates


def _length_s(container: InputContainer) -> float | None:
    return container.duration / MICROSECONDS if container.duration and container.duration > 0 else None


def _stream(container: InputContainer, request: AudioRequest) -> AudioStream:
    """The track that is asked for, else the default one, else the first; of those that can be decoded."""
    label, track = request.label, request.track
    streams = list(container.streams.audio)
    if not streams:
        raise AudioError(f"{label} has no audio stream")
    if track is not None:
        return _asked_for(streams, track, label)
    known = [stream for stream in streams if stream.codec_context is not None]
    if not known:
        raise AudioError(f"{label} is compressed with a codec that whisperd cannot decode")
    return next(filter(_is_default, known), known[0])


def _is_default(stream: AudioStream) -> bool:
    """Whether the container marks the track as the default one (AV_DISPOSITION_DEFAULT)."""
    flags = getattr(stream, "disposition", 0)  # a Flag before PyAV 17, an IntFlag since
    return bool(int(getattr(flags, "value", flags)) & 1)


def _asked_for(streams: list[AudioStream], track: int | str, label: str) -> AudioStream:
    found = [
        stream
        for index, stream in enumerate(streams)
        if index == track or (isinstance(track, str) and _is_language(stream.language, track))
    ]
    if not found:
        tracks = ", ".join(f"{index} ({stream.language or 'no language'})" for index, stream in enumerate(streams))
        raise RequestError(f"{label} has no audio track {track!r}; it has {tracks}", param="audio_track")
    if found[0].codec_context is None:
        raise AudioError(f"track {track!r} of {label} is compressed with a codec that whisperd cannot decode")
    return found[0]


def _is_language(tag: str | None, wanted: str) -> bool:
    if tag is None or tag.lower() == wanted.lower():
        return tag is not None
    with suppress(RequestError):  # a tag that names no language of Whisper
        return language_code(tag) == language_code(wanted)
    return False


def _claimed_s(container: InputContainer, stream: AudioStream, file: BinaryIO) -> float | None:
    """Where the stream ends by the container's own account; None where that is no more than an estimate."""
    names = set(container.format.name.split(","))
    if "wav" in names:
        return _wav_s(file)
    if not (names & EXACT or ("mp3" in names and _counts_frames(file))):
        return None
    if stream.duration is not None and stream.time_base is not None and stream.duration > 0:
        start = (stream.start_time or 0) * stream.time_base
        return float(start + stream.duration * stream.time_base) - _origin_s(container)
    return _length_s(container) if len(container.streams) == 1 else None


def _wav_s(file: BinaryIO) -> float | None:
    """The length by the header, which ffmpeg corrects by the size of the file; None: written before it was known."""
    at = file.tell()
    bytes_per_s = 0
    try:
        file.seek(RIFF_BYTES)
        while len(head := file.read(CHUNK.size)) == CHUNK.size:
            name, n_bytes = CHUNK.unpack(head)
            if name == b"data":
                return n_bytes / bytes_per_s if bytes_per_s and 0 < n_bytes < UNKNOWN_BYTES else None
            body = file.read(WAV_FORMAT.size) if name == b"fmt " else b""
            if len(body) == WAV_FORMAT.size:
                bytes_per_s = WAV_FORMAT.unpack(body)[-1]
            file.seek(n_bytes + n_bytes % 2 - len(body), os.SEEK_CUR)
    finally:
        file.seek(at)
    return None


def _counts_frames(file: BinaryIO) -> bool:
    """Whether an MP3 counts its frames (Xing, Info); without that, its length is guessed from the first bit rate.

    Files that were joined byte by byte begin with the count of their first part: it knows fewer bytes than there are.
    """
    at = file.tell()
    try:
        n_bytes = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(ID3_BYTES)
        is_tagged = head[:3] == b"ID3" and len(head) == ID3_BYTES
        tag_bytes = sum(n << shift for n, shift in zip(head[6:], (21, 14, 7, 0), strict=False))
        file.seek(ID3_BYTES + tag_bytes if is_tagged else 0)
        first = file.read(XING_BYTES)
    finally:
        file.seek(at)
    found = re.search(rb"(?:Xing|Info)\0\0\0([\x03\x07\x0b\x0f]).{4}(.{4})", first, re.DOTALL)
    return found is not None and n_bytes <= XING_SLACK * int.from_bytes(found[2], "big")


def _is_float_pcm(stream: AudioStream) -> bool:
    return stream.codec_context.name.startswith("pcm_f")


def _scale(source: _Source, index: int) -> float:
    """What a file of floats takes for full scale, from the first SCAN_S of it."""
    meter = mixing.RangeMeter()
    with source.opened() as container:
        n_s = 0.0
        for frame, _ in _frames(container, container.streams[index], _Damage()):  # type: ignore[arg-type]
            meter.feed(_array(frame))
            n_s += frame.samples / frame.sample_rate
            if n_s > SCAN_S:
                break
    source.file.seek(0)
    if meter.scale is None:
        raise AudioError(
            f"{source.request.label} holds floating-point samples that are no sound in any scale (expected -1 to 1)"
        )
    return meter.scale


def _path(file: BinaryIO) -> str | None:
    """Where ffmpeg can open the same file by itself, deleted or not; None: it is in memory, or who knows where."""
    try:
        path = f"/proc/self/fd/{file.fileno()}"
    except (AttributeError, OSError):
        return None
    return path if os.access(path, os.R_OK) else None


@contextmanager
def _translated(label: str) -> Iterator[None]:
    """PyAV's errors have one base class; whichever it is, this input cannot be read."""
    import av

    try:
        yield
    except MemoryError:
        raise
    except (av.error.FFmpegError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise AudioError(f"{label} is not audio that whisperd can read ({reason}); it reads {FORMATS}") from error

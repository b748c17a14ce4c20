"""Where decoded sound belongs on a file's timeline, and how much of the file is missing. Pure.

A decoder gives sound without holes; the timestamps of a container may have them: sound that begins after the picture,
packets that were lost, a recorder that paused. Silence fills them, so that times in a transcript are times in the file.
Timestamps that cannot be times in this file (streams joined byte by byte begin again at zero, clocks wrap) only move
the zero point: the sound goes on where it is.
"""

from __future__ import annotations

from dataclasses import dataclass

TOLERANCE_S = 0.1  # timestamps are rounded, and an encoder's delay is not always declared
UNBOUNDED_HOLE_S = 600.0  # the longest believed where nothing tells a hole from a change of clock
OVERLAP_S = 10.0  # stamps that lag by up to this wait until the sound is where they are; ffmpeg's dts_delta_threshold
BEGINNING_S = 0.5  # a stamp up to here, behind later ones, is that of another beginning
MISSING_S = 1.0  # less than this is an encoder's padding, and no reason for a warning
MANY_HOLES = 3  # fewer are pauses of a recorder; more are lost packets
MISSING_MOST = 2 / 3  # of what is in the file: an answer that leaves out more would mislead


class Timeline:
    """Places frames of sound; times in seconds from the start of the file.

    Args:
        duration_s: the container's length, None when it states none.
        joins: whether files of this format are often joined byte by byte, as MPEG-TS: their clocks may jump.
        is_bare: whether the file is a bare stream of one codec. Its timestamps are made up by counting packets, and
            say something only behind one that could not be decoded.
    """

    def __init__(self, duration_s: float | None, *, joins: bool = False, is_bare: bool = False) -> None:
        self._duration_s = duration_s
        self._max_hole_s = UNBOUNDED_HOLE_S if joins or duration_s is None else duration_s
        self._is_bare = is_bare
        self._shift_s = 0.0

    def is_in_place(self, position_s: float, stamp_s: float | None) -> bool:
        """True where ``hole_s`` has nothing to do; where no packet was lost."""
        return stamp_s is None or -TOLERANCE_S <= stamp_s + self._shift_s - position_s <= TOLERANCE_S

    def hole_s(self, position_s: float, stamp_s: float | None, *, damaged: bool = False) -> float:
        """Seconds of silence before a frame with this timestamp, when ``position_s`` of sound came before it.

        ``damaged``: something between the two could not be decoded.
        """
        if stamp_s is None:
            return 0.0
        hole_s = stamp_s + self._shift_s - position_s
        if self._is_hole(hole_s, stamp_s) and (damaged or not self._is_bare):
            return hole_s if hole_s > (0.0 if self._is_bare else TOLERANCE_S) else 0.0
        self._shift_s -= hole_s
        return 0.0

    def restart(self, position_s: float) -> None:
        """The next timestamps count from here: another file begins within the file."""
        self._shift_s = position_s

    def _is_hole(self, hole_s: float, stamp_s: float) -> bool:
        """False for a clock that begins again or jumps."""
        if hole_s < -TOLERANCE_S:
            return hole_s >= -OVERLAP_S and stamp_s > BEGINNING_S
        return hole_s <= TOLERANCE_S or (hole_s <= self._max_hole_s and self._is_inside(stamp_s))

    def _is_inside(self, stamp_s: float) -> bool:
        return self._duration_s is None or stamp_s + self._shift_s <= self._duration_s + TOLERANCE_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Completeness:
    """What came out of a file, against what is in it; seconds.

    ``end_s`` is the length of the samples, with ``silence_s`` of it in place of damage. ``claimed_s`` is the end by
    the header, None where that is an estimate. ``lost_s`` is what ``n_damaged`` packets would have given. ``holes_s``
    is silence between timestamps, where no damage was seen: a recorder paused, or a container lost whole packets.
    """

    end_s: float
    claimed_s: float | None
    silence_s: float = 0.0
    lost_s: float = 0.0
    n_damaged: int = 0
    holes_s: float = 0.0
    n_holes: int = 0

    @property
    def missing_s(self) -> float:
        """What is in the file by its own account and not in the samples."""
        return self._total_s - self._decoded_s

    @property
    def is_mostly_missing(self) -> bool:
        """True where an answer would mislead: over two thirds of the audio are missing."""
        return self.missing_s > max(MISSING_S, MISSING_MOST * self._total_s)

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence for each kind of loss above MISSING_S."""
        found: list[str] = []
        if self.claimed_s is not None and self.claimed_s - self.end_s > MISSING_S:
            found.append(
                f"the audio ends at {self.end_s:.1f} s, but the file claims {self.claimed_s:.1f} s: it is cut off or "
                "damaged"
            )
        if self.lost_s > MISSING_S:
            packets = f"{self.n_damaged} damaged packet{'s' * (self.n_damaged != 1)}"
            silence = f"; {self.silence_s:.1f} s of silence stand for them" if self.silence_s else ""
            found.append(f"{packets} with {self.lost_s:.1f} s of audio could not be decoded{silence}")
        if self.holes_s > MISSING_S and self.n_holes >= MANY_HOLES:
            found.append(f"the file lacks {self.holes_s:.1f} s of audio in {self.n_holes} gaps; silence stands there")
        return tuple(found)

    @property
    def _decoded_s(self) -> float:
        return self.end_s - self.silence_s

    @property
    def _total_s(self) -> float:
        return max(self.claimed_s or 0.0, self._decoded_s + max(self.lost_s, self.silence_s))

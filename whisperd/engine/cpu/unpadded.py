"""Short windows without their padding: encodes the audio only, and appends the encoder states of silence.

Whisper pads every window to 30 s: for a sentence of three seconds its encoder spends most of its time on silence.
Here only the audio and a margin are encoded; the missing states are the last ones of a silent window, computed once for
each model. Without them the decoder loops; with them it still does at times, and such a window is decoded again whole.

Measured as a difference in word error rate to full windows (with its standard error, in points), on prompts that
nothing was tuned on: tiny.en with noise 10 dB below the speech -0.91 (0.92); base on English +0.34 (0.19), French
-0.28 (0.53), Italian -0.91 (0.77), Spanish +0.30 (0.85, languages detected), and Russian +2.38 (1.25). The bound of 0.5
was set beforehand for all of these languages, so multilingual models use it only where it is asked for.
Segment times move by 0.02 to 0.13 s on average. Detection on short windows names another language in 7 % of Spanish
prompts, so it always takes whole ones. Larger models have not been measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from whisperd.engine.base import Window
from whisperd.speech.fallback import LATEST_END_PAST_AUDIO_S, compression_ratio
from whisperd.speech.features import CHUNK_FRAMES
from whisperd.speech.units import SAMPLE_RATE_HZ, Floats

ShortWindows = Literal["auto", "always", "never"]

MEASURED_WIDTH_MAX = 512  # of the encoder's states: tiny and base
STATES = CHUNK_FRAMES // 2  # of a whole window: the encoder halves the frames
STATES_PER_S = 50
FRAMES_PER_S = 100
MARGIN_S = 2.0  # silence that is encoded behind the audio
SHORT_MAX_S = 15.0  # windows of long files are longer: what they save, the guard takes
TAIL_STATES = 5 * STATES_PER_S  # other parts of a quiet window made loops: only its end is an end
QUIET_S = 4.2
QUIET_LEVEL = 1e-3  # 60 dB below full scale
RATIO_MAX = 2.2  # stricter than Whisper's own test: the full window is a second chance that costs little
BYTES_PER_S_MAX = 20.0
BYTES_FREE = 40.0
LOGPROB_MIN = -1.0


def may_be_short(use: ShortWindows, language: str | None, width: int, *, multilingual: bool) -> bool:
    """True if a window may be encoded without its padding; never before its language is known.

    ``width`` is that of the encoder's states; "auto" holds to what was measured, of which not all was good enough for
    multilingual models.
    """
    if use == "never" or language is None:
        return False
    return use == "always" or (not multilingual and width <= MEASURED_WIDTH_MAX)


def quiet_samples() -> Floats:
    """Faint noise, float32 [n], the same each time: a quiet room."""
    noise = np.random.default_rng(0).standard_normal(round(QUIET_S * SAMPLE_RATE_HZ)) * QUIET_LEVEL
    return noise.astype(np.float32)


def frames_of(window: Window) -> int:
    """Mel frames to encode: the audio and the margin, in whole seconds."""
    duration_s = len(window.samples) / SAMPLE_RATE_HZ
    if duration_s >= SHORT_MAX_S:
        return CHUNK_FRAMES
    return min(CHUNK_FRAMES, FRAMES_PER_S * int(np.ceil(duration_s + MARGIN_S)))


def joined(rows: Sequence[Floats], quiet: Floats) -> Floats:
    """Windows of several lengths as one batch.

    Args:
        rows: float32 [1, n, d_model] each, n <= STATES.
        quiet: float32 [1, STATES, d_model], the states of a quiet window.

    Returns:
        float32 [len(rows), m, d_model]; what a row lacks is the end of ``quiet``.
    """
    lengths = [row.shape[1] for row in rows]
    n_states = STATES if max(lengths) == STATES else min(STATES, max(lengths) + TAIL_STATES)
    return np.ascontiguousarray(
        np.concatenate([np.concatenate([row, quiet[:, STATES - (n_states - row.shape[1]) :]], axis=1) for row in rows])
    )


def is_doubtful(text: str, avg_logprob: float, end_s: float, window: Window) -> bool:
    """True if the whole window may give a better text: a loop, too many bytes for its length, a low score, a late end.

    ``end_s`` is the last time that the text names.
    """
    n_bytes = len(text.encode("utf-8"))
    duration_s = len(window.samples) / SAMPLE_RATE_HZ
    if avg_logprob < LOGPROB_MIN or end_s > duration_s + LATEST_END_PAST_AUDIO_S:
        return True
    return bool(text) and (n_bytes > BYTES_FREE + BYTES_PER_S_MAX * duration_s or compression_ratio(text) > RATIO_MAX)

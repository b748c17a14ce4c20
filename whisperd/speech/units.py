"""The units of speech: sample rate, window, frame and step, each defined once. Pure."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Samples = NDArray[np.float32]  # [n], mono at SAMPLE_RATE_HZ, in [-1, 1]

SAMPLE_RATE_HZ = 16_000  # Whisper was trained on it; everything inside whisperd uses it
WINDOW_S = 30  # the encoder's input; shorter audio is padded with silence
WINDOW_SAMPLES = WINDOW_S * SAMPLE_RATE_HZ
FRAME_SAMPLES = 512  # the voice detector's step: 32 ms, one probability per frame
TIMESTAMP_STEP_S = 0.02  # from one timestamp token to the next
ENCODER_STATES_PER_S = 50  # each state covers 20 ms: two mel frames of 10 ms
MEDIAN_FILTER_WIDTH = 7  # encoder states, over the attention that gives word times: openai-whisper's timing.py


class Span(NamedTuple):
    """A half-open range of samples at 16 kHz."""

    start_samples: int
    end_samples: int

"""How likely each 32 ms of audio is speech: Silero VAD. Home of onnxruntime.

The network (``data/silero_vad_16k_sequence.onnx``, MIT) is recurrent: a stream carries its state, so audio may come in
pieces of any size. On the CPU onnxruntime computes it; an engine for GPUs brings a network of its own.
"""

from __future__ import annotations

import os
from importlib import resources
from typing import Protocol

import numpy as np

from whisperd.errors import EngineError
from whisperd.speech.units import FRAME_SAMPLES, Floats

CONTEXT_SAMPLES = 64  # each frame is seen with the end of the one before it
STATE_SHAPE = (1, 1, 128)
QUIET_PEAK, LOUD_PEAK = 0.05, 0.3
GAIN_MAX = 100.0  # 40 dB
MAX_FRAMES_PER_RUN = 1000  # about 32 s: bounds the memory of one call


class SpeechNetwork(Protocol):
    """Whatever computes the network. It remembers nothing: streams bring their state and take it away again."""

    def run(self, frames: Floats, hidden: Floats, cell: Floats) -> tuple[Floats, Floats, Floats]:
        """One stretch of one stream; may be called from any number of threads at once.

        Args:
            frames: float32 [n, 576], each with the 64 samples before it; 0 < n <= MAX_FRAMES_PER_RUN.
            hidden: float32 [1, 1, 128], zeros at the start of the stream; as ``cell``.
            cell: the same.

        Returns:
            Probabilities of speech, float32 [n], and the two states behind the last frame.

        Raises:
            EngineError: the network failed.
        """
        ...


def network_bytes() -> bytes:
    """The network as an ONNX file."""
    return resources.files("whisperd").joinpath("data/silero_vad_16k_sequence.onnx").read_bytes()


class SpeechDetector:
    """The network in onnxruntime, on the CPU."""

    def __init__(self) -> None:
        # read by the library when it is imported; without it, it keeps a database of its own in the home directory
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # the network is too small to share; streams run beside each other instead
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(network_bytes(), options, providers=["CPUExecutionProvider"])
        self._failures = (RuntimeError, onnxruntime.capi.onnxruntime_pybind11_state.Fail)

    def run(self, frames: Floats, hidden: Floats, cell: Floats) -> tuple[Floats, Floats, Floats]:
        """See ``SpeechNetwork``."""
        try:
            probabilities, hidden, cell = self._session.run(None, {"input": frames, "h": hidden, "c": cell})
        except self._failures as error:
            raise EngineError(f"the voice detector failed: {error}") from error
        return probabilities, hidden, cell


class Level:
    """Makes very quiet audio as loud as the network expects: it misses the first words of speech at -50 dB.

    Louder audio stays as it is. The network takes amplified noise for noise.
    """

    def __init__(self) -> None:
        self._peak = 0.0

    def amplify(self, block: Floats) -> Floats:
        """The next float32 [n] of the audio, seconds of it; a loud block before it still counts half."""
        self._peak = max(float(np.abs(block).max(initial=0.0)), self._peak / 2)
        if not 0.0 < self._peak < QUIET_PEAK:
            return block
        return block * np.float32(min(GAIN_MAX, LOUD_PEAK / self._peak))


class SpeechStream:
    """Probabilities of one piece of audio, from its start to its end."""

    def __init__(self, network: SpeechNetwork) -> None:
        self._network = network
        self._hidden = np.zeros(STATE_SHAPE, np.float32)
        self._cell = np.zeros(STATE_SHAPE, np.float32)
        # context of the next frame, then the samples that do not make a frame yet
        self._carry = np.zeros(CONTEXT_SAMPLES, np.float32)

    def feed(self, samples: Floats) -> Floats:
        """float32 [n] at 16 kHz to the probabilities [k] of the frames that are complete now."""
        joined = np.concatenate([self._carry, samples])
        n_frames = (len(joined) - CONTEXT_SAMPLES) // FRAME_SAMPLES
        self._carry = joined[n_frames * FRAME_SAMPLES :]
        if not n_frames:
            return np.zeros(0, np.float32)
        views = np.lib.stride_tricks.sliding_window_view(joined, CONTEXT_SAMPLES + FRAME_SAMPLES)[::FRAME_SAMPLES]
        starts = range(0, n_frames, MAX_FRAMES_PER_RUN)
        return np.concatenate([self._run(views[at : at + MAX_FRAMES_PER_RUN]) for at in starts])

    def finish(self) -> Floats:
        """The probability [1] of the last, incomplete frame, padded with silence; [0] when there is none."""
        n_left = len(self._carry) - CONTEXT_SAMPLES
        return self.feed(np.zeros(FRAME_SAMPLES - n_left, np.float32)) if n_left else np.zeros(0, np.float32)

    def _run(self, frames: Floats) -> Floats:
        found, self._hidden, self._cell = self._network.run(np.ascontiguousarray(frames), self._hidden, self._cell)
        return found

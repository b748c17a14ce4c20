"""Silero VAD in PyTorch: the network of ``whisperd.speech.vad`` for many streams at once, on the device of an engine.

Everything but the recurrent layer is products of matrices over all frames of all streams. The recurrent layer costs
per step and hardly per stream, so streams go side by side. Equal to onnxruntime within 1e-5 on the CPU; it HAS NEVER
RUN ON A GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from whisperd.engine.cuda.coalesce import Coalescer
from whisperd.engine.cuda.failures import translated
from whisperd.engine.cuda.onnxfile import initializers
from whisperd.speech.units import FRAME_SAMPLES, Floats
from whisperd.speech.vad import CONTEXT_SAMPLES, STATE_SHAPE, network_bytes

Found = tuple[Floats, Floats, Floats]

FRAMES_TOGETHER = 8192  # about 150 MB while they are at work, and 26 streams with blocks of 10 s
STEPS = 4  # spectra of one frame
STRIDES = (1, 2, 2, 1)
WIDTH = STATE_SHAPE[-1]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Call:
    """What ``whisperd.speech.vad.SpeechNetwork.run`` takes."""

    frames: Floats
    hidden: Floats
    cell: Floats


class DeviceSpeech:
    """A ``whisperd.speech.vad.SpeechNetwork``; calls of many threads share one pass over the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # a stream of its own: behind the decode steps of the engine a short call would wait for all of them
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._together = Coalescer(self.run_all, size=lambda call: len(call.frames), most=FRAMES_TOGETHER)
        with translated(), self._on_stream():
            self._network = _Network(device)

    def run(self, frames: Floats, hidden: Floats, cell: Floats) -> Found:
        """See ``whisperd.speech.vad.SpeechNetwork``; raises EngineError, OutOfMemory."""
        return self._together(Call(frames=frames, hidden=hidden, cell=cell))

    def run_all(self, calls: Sequence[Call]) -> list[Found]:
        """Several calls, in order; for one thread at a time."""
        counts = [len(call.frames) for call in calls]
        with translated(), torch.inference_mode(), self._on_stream():
            frames = self._sent([call.frames for call in calls])
            hidden, cell = (
                self._sent([one.reshape(1, WIDTH) for one in states])[None]
                for states in ([call.hidden for call in calls], [call.cell for call in calls])
            )
            found = self._network(frames, counts, hidden, cell)
            everything = torch.cat([part.flatten() for part in found]).cpu().numpy()  # waits once
        probabilities, hidden, cell = np.split(everything, np.cumsum([part.numel() for part in found])[:-1])
        by_stream = probabilities.reshape(len(calls), -1)
        states = (part.reshape(len(calls), *STATE_SHAPE) for part in (hidden, cell))
        return [(row[:count], *state) for row, count, *state in zip(by_stream, counts, *states, strict=True)]

    def _sent(self, parts: Sequence[Floats]) -> Tensor:
        """The parts below each other, through memory that the device can read by itself."""
        n_rows = sum(map(len, parts))
        staged = torch.empty((n_rows, parts[0].shape[1]), pin_memory=self._stream is not None)
        np.concatenate(parts, out=staged.numpy())
        return staged.to(self._device, non_blocking=True)

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


class _Network:
    """The layers; convolutions over the few spectra of a frame are written out as matrices."""

    def __init__(self, device: torch.device) -> None:
        weights = {name: torch.from_numpy(value) for name, value in initializers(network_bytes()).items()}
        self._spectra = _spectra(weights["stft.forward_basis_buffer"]).to(device)
        n_steps, self._layers = STEPS, []
        for index, stride in enumerate(STRIDES):
            weight, bias = weights[f"encoder.{index}.weight"], weights[f"encoder.{index}.bias"]
            dense = _written_out(weight, n_steps, stride)
            n_steps = -(-n_steps // stride)
            self._layers.append((dense.to(device), bias.repeat_interleave(n_steps).to(device)))
        self._recurrent = _recurrent(weights).to(device)
        self._recurrent.flatten_parameters()
        self._out = weights["output.weight"][:, :, 0].to(device), weights["output.bias"].to(device)
        if device.type == "cuda":
            # TensorFloat-32 is the default of recurrent layers and moves probabilities by a thousandth; the engine's
            # own convolutions compute in half precision and are not affected
            torch.backends.cudnn.allow_tf32 = False

    def __call__(self, frames: Tensor, counts: Sequence[int], hidden: Tensor, cell: Tensor) -> tuple[Tensor, ...]:
        """Frames of all streams below each other, ``counts`` of each; states float32 [1, streams, 128].

        Returns probabilities [streams, most frames] and the states.
        """
        by_stream = pad_sequence(list(self._features(frames).split(list(counts))))
        packed = pack_padded_sequence(by_stream, torch.tensor(counts), enforce_sorted=False)
        outputs, (hidden, cell) = self._recurrent(packed, (hidden, cell))
        padded, _ = pad_packed_sequence(outputs, batch_first=True)
        return functional.linear(padded.relu(), *self._out).sigmoid()[..., 0], hidden, cell

    def _features(self, frames: Tensor) -> Tensor:
        """[n, 576] to [n, 128]."""
        real, imaginary = (frames @ self._spectra).chunk(2, dim=1)
        found = (real.square() + imaginary.square()).sqrt()
        for weight, bias in self._layers:
            found = torch.addmm(bias, found, weight).relu()
        return found


def _spectra(basis: Tensor) -> Tensor:
    """[576, 258 * 4]: a frame, mirrored at its end, to the real and then the imaginary parts of its spectra."""
    n_samples = CONTEXT_SAMPLES + FRAME_SAMPLES
    mirrored = functional.pad(torch.eye(n_samples)[:, None], (0, CONTEXT_SAMPLES), mode="reflect")
    return functional.conv1d(mirrored, basis, stride=basis.shape[-1] // 2).flatten(1)


def _written_out(weight: Tensor, n_steps: int, stride: int) -> Tensor:
    """A convolution over ``n_steps`` positions as one matrix: what it makes of each input that is 1 alone."""
    n_inputs = weight.shape[1] * n_steps
    ones = torch.eye(n_inputs).view(n_inputs, weight.shape[1], n_steps)
    return functional.conv1d(ones, weight, stride=stride, padding=1).flatten(1)


def _recurrent(weights: dict[str, Tensor]) -> torch.nn.LSTM:
    layer = torch.nn.LSTM(WIDTH, WIDTH).requires_grad_(False)
    both_biases = weights["onnx::LSTM_211"][0].chunk(2)
    for target, source in (
        (layer.weight_ih_l0, weights["onnx::LSTM_209"][0]),
        (layer.weight_hh_l0, weights["onnx::LSTM_210"][0]),
        (layer.bias_ih_l0, both_biases[0]),
        (layer.bias_hh_l0, both_biases[1]),
    ):
        into, out, forget, candidate = source.chunk(4)  # the order of ONNX; PyTorch's is i f c o
        target.copy_(torch.cat([into, forget, candidate, out]))
    return layer

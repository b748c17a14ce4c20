"""Whisper's encoder on OpenVINO, built from the tensors of a checkpoint. Home of openvino.

The architecture is that of openai-whisper's ``model.py``. On a CPU that computes in bfloat16 the layers run in it; what
that costs in accuracy is less than what CTranslate2's int8 costs (tiny.en, 10 minutes of speech). Elsewhere, and where
float32 is asked for, the states are those of CTranslate2 in float32 but for rounding.
"""

from __future__ import annotations

import importlib
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from whisperd.engine import checkpoints
from whisperd.engine.checkpoints import Checkpoint
from whisperd.errors import EngineError, OutOfMemory, SourceError
from whisperd.speech.units import Floats

if TYPE_CHECKING:
    import openvino


NORM_EPSILON = 1e-5
CONVOLUTIONS = ((1, 1), (2, 2))  # number and stride
BFLOAT16 = "BF16"  # as OpenVINO names what a device can do
CONVERTER = "openvino.tools.ovc"
EXACT_TYPES = ("float32",)  # the compute types that ask for no rounding


class OpenVinoEncoder:
    """One compiled encoder; ``load`` makes it. May be called from several threads at the same time."""

    def __init__(self, compiled: openvino.CompiledModel, precision: str) -> None:
        self.precision = precision
        self._compiled = compiled
        self._local = threading.local()

    @classmethod
    def load(cls, path: Path, *, compute_type: str, streams: int, threads_per_stream: int) -> OpenVinoEncoder:
        """Reads the encoder of a model directory and compiles it for this CPU.

        Args:
            path: a CTranslate2 directory or a Hugging Face snapshot.
            compute_type: "float32" keeps the CPU from computing in bfloat16.
            streams: calls that run at the same time.
            threads_per_stream: threads of each.

        Raises:
            SourceError: the files are no whole Whisper.
            OutOfMemory: there is no room for it.
            EngineError: OpenVINO cannot compile it here.
        """
        openvino = imported()
        try:
            core = openvino.Core()
            short = compute_type not in EXACT_TYPES and BFLOAT16 in core.get_property(
                "CPU", "OPTIMIZATION_CAPABILITIES"
            )
            settings = {
                "NUM_STREAMS": streams,
                "INFERENCE_NUM_THREADS": streams * threads_per_stream,
                "INFERENCE_PRECISION_HINT": "bf16" if short else "f32",
                "ENABLE_CPU_PINNING": False,  # whisperd shares its machine
            }
            compiled = core.compile_model(_Graph(checkpoints.read(path)).model(), "CPU", settings)
        except KeyError as error:
            raise SourceError(f"{path} is not a whole Whisper checkpoint: {error.args[0]} is missing") from error
        except MemoryError as error:
            raise OutOfMemory(f"no memory for the encoder in {path}: {error}") from error
        except RuntimeError as error:
            raise EngineError(f"OpenVINO cannot compile the encoder in {path}: {error}") from error
        return cls(compiled, "bfloat16" if short else "float32")

    def __call__(self, features: Floats) -> Floats:
        """float32 [n_mels, frames] to float32 [1, frames / 2, d_model]; raises RuntimeError or MemoryError."""
        if not hasattr(self._local, "request"):
            self._local.request = self._compiled.create_infer_request()
        found = self._local.request.infer({0: np.ascontiguousarray(features[None])}, share_outputs=False)
        return np.asarray(found[0], np.float32)


class _Graph:
    """The operations of one encoder; ``model`` puts them together. Frames may be any even number."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._openvino: Any = imported()
        self._ops: Any = self._openvino.opset13
        self._tensors = checkpoint.tensors
        self._shape = checkpoint.shape

    def model(self) -> openvino.Model:
        """Log-mel [1, n_mels, frames] to states [1, frames / 2, width]."""
        features = self._ops.parameter(self._openvino.PartialShape([1, self._shape.n_mels, -1]), np.float32)
        states = self._with_positions(self._ops.transpose(self._convolved(features), _integers(0, 2, 1)))
        for layer in range(self._shape.encoder_layers):
            states = self._layer(states, f"model.encoder.layers.{layer}")
        model: openvino.Model = self._openvino.Model(
            [self._norm(states, "model.encoder.layer_norm")], [features], "encoder"
        )
        return model

    def _weight(self, name: str) -> Any:
        return self._ops.constant(np.ascontiguousarray(self._tensors[name], np.float32))

    def _convolved(self, features: Any) -> Any:
        for number, stride in CONVOLUTIONS:
            name = f"model.encoder.conv{number}"
            bias = np.asarray(self._tensors[f"{name}.bias"], np.float32)[None, :, None]
            features = self._ops.convolution(features, self._weight(f"{name}.weight"), [stride], [1], [1], [1])
            features = self._ops.gelu(self._ops.add(features, self._ops.constant(bias)), "erf")
        return features

    def _with_positions(self, states: Any) -> Any:
        length = self._ops.gather(self._ops.shape_of(states), _integers(1), self._ops.constant(0))
        positions = self._weight("model.encoder.embed_positions.weight")
        return self._ops.add(states, self._ops.slice(positions, _integers(0), length, _integers(1), _integers(0)))

    def _layer(self, states: Any, name: str) -> Any:
        states = self._ops.add(states, self._attention(self._norm(states, f"{name}.self_attn_layer_norm"), name))
        hidden = self._linear(self._norm(states, f"{name}.final_layer_norm"), f"{name}.fc1")
        return self._ops.add(states, self._linear(self._ops.gelu(hidden, "erf"), f"{name}.fc2"))

    def _attention(self, states: Any, name: str) -> Any:
        query, key, value = (self._heads(self._linear(states, f"{name}.self_attn.{part}_proj")) for part in "qkv")
        mixed = self._ops.transpose(self._ops.scaled_dot_product_attention(query, key, value), _integers(0, 2, 1, 3))
        joined = self._ops.reshape(mixed, _integers(0, 0, self._shape.width), special_zero=True)
        return self._linear(joined, f"{name}.self_attn.out_proj")

    def _heads(self, states: Any) -> Any:
        n_heads = self._shape.encoder_heads
        split = self._ops.reshape(states, _integers(0, 0, n_heads, self._shape.width // n_heads), special_zero=True)
        return self._ops.transpose(split, _integers(0, 2, 1, 3))

    def _linear(self, states: Any, name: str) -> Any:
        product = self._ops.matmul(states, self._weight(f"{name}.weight"), transpose_a=False, transpose_b=True)
        if f"{name}.bias" not in self._tensors:  # Whisper's keys have none
            return product
        return self._ops.add(product, self._weight(f"{name}.bias"))

    def _norm(self, states: Any, name: str) -> Any:
        scaled = self._ops.mvn(states, _integers(-1), normalize_variance=True, eps=NORM_EPSILON, eps_mode="inside_sqrt")
        return self._ops.add(self._ops.multiply(scaled, self._weight(f"{name}.weight")), self._weight(f"{name}.bias"))


def imported() -> ModuleType:
    """Imports openvino without its model converter, which contacts the network when it is imported and keeps a number
    for the user in the home directory."""
    if "openvino" not in sys.modules:
        sys.modules.setdefault(CONVERTER, None)  # type: ignore[arg-type]
        try:
            return importlib.import_module("openvino")
        finally:
            if sys.modules[CONVERTER] is None:
                del sys.modules[CONVERTER]
    return sys.modules["openvino"]


def _integers(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, np.int64)

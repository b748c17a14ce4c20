"""A Hugging Face Whisper checkpoint (safetensors) to a CTranslate2 model, without torch.

The layout of the tensors is that of CTranslate2's own converter for transformers: query, key and value projections are
fused, and key projections have no bias in Whisper.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whisperd.engine.checkpoints.safetensors import BLANK_TOKEN, Tensors, json_object, tensors, weight_files
from whisperd.errors import DiskFull, SourceError
from whisperd.speech.units import TIMESTAMP_STEP_S

log = logging.getLogger(__name__)


def converted(snapshot: Path, work_dir: Path, quantization: str) -> Path:
    """The CTranslate2 form of a Hugging Face snapshot; converts it if there is none yet.

    Args:
        snapshot: directory with ``config.json``, ``tokenizer.json`` and safetensors.
        work_dir: where conversions are kept, one directory for each commit and type.
        quantization: type of the stored weights, as CTranslate2 names it.

    Raises:
        SourceError: the checkpoint is not a whole Whisper.
        DiskFull: the result could not be written.
    """
    target = work_dir / f"{_identity(snapshot)}--{quantization}"
    if (target / "model.bin").is_file():
        return target
    started_s = time.monotonic()
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=work_dir, prefix=".converting-"))
        try:
            _write(snapshot, scratch / "model", quantization)
            (scratch / "model").rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise DiskFull(f"cannot keep the converted model in {work_dir}: {error}") from error
    log.info("converted %s to %s in %.1f s", snapshot, quantization, time.monotonic() - started_s)
    return target


def _identity(snapshot: Path) -> str:
    """Repository and commit inside a Hugging Face cache; elsewhere a digest that changes with the files."""
    if snapshot.parent.name == "snapshots":
        return f"{snapshot.parent.parent.name}--{snapshot.name}"
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weight_files(snapshot)]
    digest = hashlib.sha256(repr((str(snapshot), stats)).encode()).hexdigest()
    return f"path--{snapshot.name}--{digest[:16]}"


def _write(snapshot: Path, target: Path, quantization: str) -> None:
    from ctranslate2.specs import whisper_spec

    config = json_object(snapshot / "config.json")
    generation = json_object(snapshot / "generation_config.json")
    if config.get("model_type") != "whisper":
        raise SourceError(f"{snapshot} holds a model of type {config.get('model_type')!r}, expected 'whisper'")
    sizes = ("encoder_layers", "encoder_attention_heads", "decoder_layers", "decoder_attention_heads")
    try:
        spec = whisper_spec.WhisperSpec(*(config[size] for size in sizes))
        _fill(spec, _Reader(tensors(snapshot)))
        spec.register_vocabulary(_vocabulary(snapshot, config["vocab_size"]))
        _configure(spec.config, config, generation)
    except KeyError as error:
        raise SourceError(f"{snapshot} is not a whole Whisper checkpoint: {error.args[0]} is missing") from error
    spec.validate()
    spec.optimize(quantization=quantization)
    target.mkdir()
    spec.save(str(target))


def _configure(target: Any, config: Mapping[str, Any], generation: Mapping[str, Any]) -> None:
    """The ids that CTranslate2 suppresses by itself, and the alignment heads."""
    n_layers, n_heads = config["decoder_layers"], config["decoder_attention_heads"]
    merged = {**config, **{key: value for key, value in generation.items() if value is not None}}
    target.suppress_ids = merged.get("suppress_tokens") or []
    target.suppress_ids_begin = merged.get("begin_suppress_tokens") or [BLANK_TOKEN, config["eos_token_id"]]
    target.lang_ids = sorted(merged.get("lang_to_id", {}).values())
    # without known heads: all heads of the upper half, as openai-whisper does
    upper = [(layer, head) for layer in range(n_layers // 2, n_layers) for head in range(n_heads)]
    target.alignment_heads = merged.get("alignment_heads") or upper


class _Reader:
    """Fills the parts of a specification from tensors by their transformers names."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors

    def array(self, name: str) -> NDArray[Any]:
        return np.array(self._tensors[name])

    def norm(self, spec: Any, name: str) -> None:
        spec.gamma, spec.beta = self.array(f"{name}.weight"), self.array(f"{name}.bias")

    def linear(self, spec: Any, *names: str) -> None:
        """One layer, or several stacked into one."""
        spec.weight = np.concatenate([self._tensors[f"{name}.weight"] for name in names])
        spec.bias = np.concatenate([self._bias(name) for name in names])

    def _bias(self, name: str) -> NDArray[Any]:
        weight = self._tensors[f"{name}.weight"]
        return self._tensors.get(f"{name}.bias", np.zeros(len(weight), weight.dtype))

    def attention(self, spec: Any, name: str) -> None:
        projections = [f"{name}.{part}_proj" for part in "qkv"]
        if len(spec.linear) == 2:  # self-attention
            self.linear(spec.linear[0], *projections)
        else:
            self.linear(spec.linear[0], projections[0])
            self.linear(spec.linear[1], *projections[1:])
        self.linear(spec.linear[-1], f"{name}.out_proj")
        self.norm(spec.layer_norm, f"{name}_layer_norm")

    def feed_forward(self, spec: Any, name: str) -> None:
        self.norm(spec.layer_norm, f"{name}.final_layer_norm")
        self.linear(spec.linear_0, f"{name}.fc1")
        self.linear(spec.linear_1, f"{name}.fc2")


def _fill(spec: Any, read: _Reader) -> None:
    for side, part in (("encoder", spec.encoder), ("decoder", spec.decoder)):
        part.position_encodings.encodings = read.array(f"model.{side}.embed_positions.weight")
        read.norm(part.layer_norm, f"model.{side}.layer_norm")
        for index, layer in enumerate(part.layer):
            name = f"model.{side}.layers.{index}"
            read.attention(layer.self_attention, f"{name}.self_attn")
            if side == "decoder":
                read.attention(layer.attention, f"{name}.encoder_attn")
            read.feed_forward(layer.ffn, name)
    for name in ("conv1", "conv2"):
        read.linear(getattr(spec.encoder, name), f"model.encoder.{name}")
    spec.decoder.embeddings.weight = read.array("model.decoder.embed_tokens.weight")
    spec.decoder.projection.weight = spec.decoder.embeddings.weight  # Whisper ties them


def _vocabulary(snapshot: Path, size: int) -> Sequence[str]:
    """All token strings by id; timestamps, which older tokenizer files lack, get their names."""
    tokenizer = json_object(snapshot / "tokenizer.json")
    known = {index: token for token, index in tokenizer["model"]["vocab"].items()}
    known.update({token["id"]: token["content"] for token in tokenizer.get("added_tokens", [])})
    first_missing = next((index for index in range(size) if index not in known), size)
    return [known.get(i, f"<|{(i - first_missing) * TIMESTAMP_STEP_S:.2f}|>") for i in range(size)]

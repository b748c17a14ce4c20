"""A CTranslate2 Whisper directory written in the layout of transformers: the inverse of ``checkpoints.convert``."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from whisperd.speech.tokenizer import Vocabulary

Tensors = dict[str, NDArray[Any]]

BINARY_TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


def export(source: Path, target: Path, *, shards: int = 1, bfloat16: bool = False) -> Path:
    """Writes config, generation config, tokenizer and safetensors to ``target`` and returns it."""
    weights = dict(_read_binary(source / "model.bin"))
    target.mkdir(parents=True)
    shutil.copy(source / "tokenizer.json", target)
    vocabulary = Vocabulary.load(source)
    own = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(_config(weights, vocabulary)))
    generation = {
        "suppress_tokens": own["suppress_ids"],
        "begin_suppress_tokens": own["suppress_ids_begin"],
        "alignment_heads": own["alignment_heads"],
        "is_multilingual": vocabulary.multilingual,
        "max_initial_timestamp_index": 50,
        "max_length": 448,
        "no_timestamps_token_id": vocabulary.no_timestamps,
        "prev_sot_token_id": vocabulary.sot_prev,
        "return_timestamps": False,
        **_text_edges(vocabulary),
    }
    (target / "generation_config.json").write_text(json.dumps(generation))
    write_shards(dict(_named(weights)), target, shards, bfloat16=bfloat16)
    return target


def _read_binary(path: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    """CTranslate2's model.bin, version 6: a header, then name, shape, type and bytes of each variable."""
    with path.open("rb") as file:

        def number(form: str) -> int:
            return int(struct.unpack(f"<{form}", file.read(struct.calcsize(form)))[0])

        def text() -> str:
            return file.read(number("H"))[:-1].decode()

        assert number("I") == 6
        text(), number("I")  # name and revision of the specification
        for _ in range(number("I")):
            name = text()
            shape = [number("I") for _ in range(number("B"))]
            dtype = BINARY_TYPES[number("B")]
            yield name, np.frombuffer(file.read(number("I")), dtype).reshape(shape)


def _config(weights: Mapping[str, NDArray[Any]], vocabulary: Vocabulary) -> dict[str, Any]:
    def layers(side: str) -> int:
        return 1 + max(int(found[1]) for name in weights if (found := re.match(rf"{side}/layer_(\d+)/", name)))

    return {
        "model_type": "whisper",
        "vocab_size": len(weights["decoder/embeddings/weight"]),
        "encoder_layers": layers("encoder"),
        "decoder_layers": layers("decoder"),
        "encoder_attention_heads": int(weights["encoder/num_heads"]),
        "decoder_attention_heads": int(weights["decoder/num_heads"]),
        "d_model": weights["decoder/embeddings/weight"].shape[1],
        "encoder_ffn_dim": len(weights["encoder/layer_0/ffn/linear_0/bias"]),
        "decoder_ffn_dim": len(weights["decoder/layer_0/ffn/linear_0/bias"]),
        "num_mel_bins": weights["encoder/conv1/weight"].shape[1],
        **_text_edges(vocabulary),
    }


def _text_edges(vocabulary: Vocabulary) -> dict[str, int]:
    """The tokens at which a text begins and ends; Whisper has one token for all ends."""
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), vocabulary.eot)
    return {**ends, "decoder_start_token_id": vocabulary.sot}


RENAMED = (  # CTranslate2's part, transformers' parts; fused projections have several
    ("self_attention/layer_norm", ("self_attn_layer_norm",)),
    ("self_attention/linear_0", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("self_attention/linear_1", ("self_attn.out_proj",)),
    ("attention/layer_norm", ("encoder_attn_layer_norm",)),
    ("attention/linear_0", ("encoder_attn.q_proj",)),
    ("attention/linear_1", ("encoder_attn.k_proj", "encoder_attn.v_proj")),
    ("attention/linear_2", ("encoder_attn.out_proj",)),
    ("ffn/layer_norm", ("final_layer_norm",)),
    ("ffn/linear_0", ("fc1",)),
    ("ffn/linear_1", ("fc2",)),
)
KINDS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}


def _named(weights: Mapping[str, NDArray[Any]]) -> Iterator[tuple[str, NDArray[Any]]]:
    yield "model.decoder.embed_tokens.weight", weights["decoder/embeddings/weight"]
    for name, tensor in weights.items():
        side, _, rest = name.partition("/")
        if rest == "position_encodings/encodings":
            yield f"model.{side}.embed_positions.weight", tensor
        elif found := re.fullmatch(r"(conv\d|layer_norm)/(\w+)", rest):
            yield f"model.{side}.{found[1]}.{KINDS[found[2]]}", tensor
        elif found := re.fullmatch(r"layer_(\d+)/(.+)/(weight|bias|gamma|beta)", rest):
            parts = dict(RENAMED)[found[2]]
            for part, piece in zip(parts, np.split(tensor, len(parts)), strict=True):
                if not (part.endswith("k_proj") and found[3] == "bias"):
                    yield f"model.{side}.layers.{found[1]}.{part}.{KINDS[found[3]]}", piece


def write_shards(tensors: Tensors, target: Path, shards: int, *, bfloat16: bool) -> None:
    """Tensors in one file of safetensors, or in several."""
    if shards == 1 and bfloat16:
        _write_bfloat16(tensors, target / "model.safetensors")
        return
    names = sorted(tensors)
    for index in range(shards):
        mine = {name: np.ascontiguousarray(tensors[name]) for name in names[index::shards]}
        file = "model.safetensors" if shards == 1 else f"model-{index + 1:05}-of-{shards:05}.safetensors"
        save_file(mine, target / file, metadata={"format": "pt"})


def _write_bfloat16(tensors: Tensors, path: Path) -> None:
    """numpy has no bfloat16: the upper halves of float32, under a header written by hand."""
    header: dict[str, Any] = {}
    bodies: list[bytes] = []
    at = 0
    for name, tensor in tensors.items():
        halves = (tensor.astype(np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + len(halves)]}
        bodies.append(halves)
        at += len(halves)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + b"".join(bodies))

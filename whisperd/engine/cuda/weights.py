"""Arrays of a checkpoint to tensors on the device, in the groups that ``model`` multiplies with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whisperd.engine.checkpoints import Checkpoint
from whisperd.engine.checkpoints.safetensors import Tensors
from whisperd.errors import SourceError


@dataclass(frozen=True, slots=True, kw_only=True)
class Affine:
    """A linear layer, a convolution or the scale and shift of a normalisation."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderLayer:
    """``qkv``: query, key and value stacked; keys have no bias in Whisper, so theirs is 0."""

    attention_norm: Affine
    qkv: Affine
    out: Affine
    mlp_norm: Affine
    fc1: Affine
    fc2: Affine


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayer(EncoderLayer):
    """The same, and attention to the encoder: ``cross_kv`` is applied once for each window."""

    cross_norm: Affine
    cross_q: Affine
    cross_kv: Affine
    cross_out: Affine


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderWeights:
    """Two convolutions, positions [frames, width], layers and a last normalisation."""

    conv1: Affine
    conv2: Affine
    positions: Tensor
    layers: tuple[EncoderLayer, ...]
    norm: Affine


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderWeights:
    """``embedding`` [vocabulary, width] is the output projection too."""

    embedding: Tensor
    positions: Tensor
    layers: tuple[DecoderLayer, ...]
    norm: Affine


def load(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> tuple[EncoderWeights, DecoderWeights]:
    """Copies tensor by tensor, so that no second copy of the model lies in the memory of the host."""
    from_disk = _Loader(checkpoint.tensors, device, dtype)
    try:
        return from_disk.encoder(checkpoint.shape.encoder_layers), from_disk.decoder(checkpoint.shape.decoder_layers)
    except KeyError as error:
        raise SourceError(f"the checkpoint is not a whole Whisper: {error.args[0]} is missing") from error


class _Loader:
    def __init__(self, tensors: Tensors, device: torch.device, dtype: torch.dtype) -> None:
        self._tensors = tensors
        self._device = device
        self._dtype = dtype

    def encoder(self, n_layers: int) -> EncoderWeights:
        return EncoderWeights(
            conv1=self._affine("model.encoder.conv1"),
            conv2=self._affine("model.encoder.conv2"),
            positions=self._tensor("model.encoder.embed_positions.weight"),
            layers=tuple(self._encoder_layer(f"model.encoder.layers.{index}") for index in range(n_layers)),
            norm=self._affine("model.encoder.layer_norm"),
        )

    def decoder(self, n_layers: int) -> DecoderWeights:
        return DecoderWeights(
            embedding=self._tensor("model.decoder.embed_tokens.weight"),
            positions=self._tensor("model.decoder.embed_positions.weight"),
            layers=tuple(self._decoder_layer(f"model.decoder.layers.{index}") for index in range(n_layers)),
            norm=self._affine("model.decoder.layer_norm"),
        )

    def _encoder_layer(self, name: str) -> EncoderLayer:
        return EncoderLayer(
            attention_norm=self._affine(f"{name}.self_attn_layer_norm"),
            qkv=self._affine(*(f"{name}.self_attn.{part}_proj" for part in "qkv")),
            out=self._affine(f"{name}.self_attn.out_proj"),
            mlp_norm=self._affine(f"{name}.final_layer_norm"),
            fc1=self._affine(f"{name}.fc1"),
            fc2=self._affine(f"{name}.fc2"),
        )

    def _decoder_layer(self, name: str) -> DecoderLayer:
        shared = self._encoder_layer(name)
        return DecoderLayer(
            attention_norm=shared.attention_norm,
            qkv=shared.qkv,
            out=shared.out,
            mlp_norm=shared.mlp_norm,
            fc1=shared.fc1,
            fc2=shared.fc2,
            cross_norm=self._affine(f"{name}.encoder_attn_layer_norm"),
            cross_q=self._affine(f"{name}.encoder_attn.q_proj"),
            cross_kv=self._affine(*(f"{name}.encoder_attn.{part}_proj" for part in "kv")),
            cross_out=self._affine(f"{name}.encoder_attn.out_proj"),
        )

    def _affine(self, *names: str) -> Affine:
        """One layer, or several stacked into one."""
        weights = [self._tensor(f"{name}.weight") for name in names]
        biases = [self._bias(name, weight) for name, weight in zip(names, weights, strict=True)]
        if len(names) == 1:
            return Affine(weight=weights[0], bias=biases[0])
        return Affine(weight=torch.cat(weights), bias=torch.cat(biases))

    def _bias(self, name: str, weight: Tensor) -> Tensor:
        return self._tensor(f"{name}.bias") if f"{name}.bias" in self._tensors else weight.new_zeros(len(weight))

    def _tensor(self, name: str) -> Tensor:
        # a copy, for arrays of a mapped file are read-only, which torch does not know
        return torch.from_numpy(self._tensors[name].copy()).to(self._device, self._dtype)

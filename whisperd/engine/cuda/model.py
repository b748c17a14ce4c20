"""Whisper's encoder and decoder. The decoder keeps keys and values in slots, so that rows start and end at any step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from whisperd.engine.cuda.caches import Caches
from whisperd.engine.cuda.weights import Affine, DecoderLayer, DecoderWeights, EncoderLayer, EncoderWeights

FLOAT16_LIMIT = 64_504.0  # float16's largest less 1000: residuals of large models run over, as transformers found


class Encoder:
    """Encodes mel spectrograms."""

    def __init__(self, weights: EncoderWeights, n_heads: int) -> None:
        self._weights = weights
        self._n_heads = n_heads

    def __call__(self, mel: Tensor) -> Tensor:
        """[windows, n_mels, 3000] to [windows, 1500, width]."""
        weights = self._weights
        states = functional.gelu(functional.conv1d(mel, weights.conv1.weight, weights.conv1.bias, padding=1))
        states = functional.conv1d(states, weights.conv2.weight, weights.conv2.bias, stride=2, padding=1)
        states = functional.gelu(states).transpose(1, 2) + weights.positions
        for layer in weights.layers:
            states = _clamped(_mlp(layer, self._attended(layer, states)))
        return _norm(states, weights.norm)

    def _attended(self, layer: EncoderLayer, states: Tensor) -> Tensor:
        query, key, value = _qkv(layer, states, self._n_heads)
        found = functional.scaled_dot_product_attention(query, key, value)
        return states + _linear(_joined(found), layer.out)


class Decoder:
    """Decodes tokens of many rows, each at its own position in its own slot."""

    def __init__(self, weights: DecoderWeights, n_heads: int, caches: Caches) -> None:
        self._weights = weights
        self._n_heads = n_heads
        self.caches = caches

    def store(self, encoded: Tensor, windows: Tensor) -> None:
        """Projects the encoder states of windows [n, frames, width] into their slots (int64 [n])."""
        for index, layer in enumerate(self._weights.layers):
            keys, values = _linear(encoded, layer.cross_kv).chunk(2, dim=-1)
            self.caches.put_audio(index, windows, _split(keys, self._n_heads), _split(values, self._n_heads))

    def __call__(
        self,
        tokens: Tensor,
        first: Tensor,
        rows: Tensor,
        windows: Tensor,
        bound: int,
        heads: Sequence[tuple[int, int]] = (),
        active: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Reads new tokens and stores their keys and values.

        Args:
            tokens: int64 [rows, new].
            first: int64 [rows], the position of the first of them.
            rows: int64 [rows], slots of the text.
            windows: int64 [rows], slots of the audio.
            bound: no position reaches this.
            heads: (layer, head) whose attention to the audio is returned.
            active: bool [rows], for one new token each; the others read nothing, and their states mean nothing.

        Returns:
            Normalised states [rows, new, width], and for each of ``heads`` the scores before the softmax, float32
            [rows, new, frames].
        """
        weights = self._weights
        positions = first[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        states = functional.embedding(tokens, weights.embedding) + functional.embedding(positions, weights.positions)
        frames = self.caches.cross_keys.shape[3]
        text_live, audio_live = first + 1, torch.full_like(windows, frames)
        if active is not None:
            text_live, audio_live = text_live * active, audio_live * active
        scores: list[Tensor] = []
        for index, layer in enumerate(weights.layers):
            states = states + self._self_attended(index, layer, states, rows, first, text_live, bound)
            query = _split(_linear(_norm(states, layer.cross_norm), layer.cross_q), self._n_heads)
            scores += [self._scores(index, head, query, windows) for number, head in heads if number == index]
            found = self.caches.attend_audio(index, query, windows, audio_live)
            states = states + _linear(_joined(found), layer.cross_out)
            states = _mlp(layer, states)
        return _norm(states, weights.norm), scores

    def logits(self, states: Tensor) -> Tensor:
        """[..., width] to [..., vocabulary], in the type of the model."""
        return functional.linear(states, self._weights.embedding)

    def _self_attended(
        self,
        index: int,
        layer: DecoderLayer,
        states: Tensor,
        rows: Tensor,
        first: Tensor,
        live: Tensor,
        bound: int,
    ) -> Tensor:
        query, key, value = _qkv(layer, states, self._n_heads)
        self.caches.put_text(index, rows, first, key, value)
        found = self.caches.attend_text(index, query, rows, live, bound)
        return _linear(_joined(found), layer.out)

    def _scores(self, index: int, head: int, query: Tensor, windows: Tensor) -> Tensor:
        keys = self.caches.audio_keys(index, head, windows)
        return query[:, head].float() @ keys.transpose(1, 2) * query.shape[-1] ** -0.5


def _linear(states: Tensor, layer: Affine) -> Tensor:
    return functional.linear(states, layer.weight, layer.bias)


def _norm(states: Tensor, norm: Affine) -> Tensor:
    return functional.layer_norm(states, norm.weight.shape, norm.weight, norm.bias)


def _mlp(layer: EncoderLayer, states: Tensor) -> Tensor:
    hidden = functional.gelu(_linear(_norm(states, layer.mlp_norm), layer.fc1))
    return states + _linear(hidden, layer.fc2)


def _qkv(layer: EncoderLayer, states: Tensor, n_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = _linear(_norm(states, layer.attention_norm), layer.qkv).chunk(3, dim=-1)
    return _split(query, n_heads), _split(key, n_heads), _split(value, n_heads)


def _split(states: Tensor, n_heads: int) -> Tensor:
    """[n, length, width] to [n, heads, length, head width]."""
    return states.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def _joined(states: Tensor) -> Tensor:
    return states.transpose(1, 2).flatten(2)


def _clamped(states: Tensor) -> Tensor:
    return states.clamp(-FLOAT16_LIMIT, FLOAT16_LIMIT) if states.dtype == torch.float16 else states

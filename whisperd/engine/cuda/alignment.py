"""When each token is spoken: the cheapest path through the attention of the heads that follow the audio.

The method is openai-whisper's ``timing.py``: scores are normalised over the text, smoothed over time, averaged over the
heads, and walked by dynamic time warping (``dtw``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from whisperd.engine.base import TokenTime
from whisperd.speech.units import ENCODER_STATES_PER_S, MEDIAN_FILTER_WIDTH


def attention_matrix(scores: Tensor) -> Tensor:
    """float32 [heads, text, frames] before the softmax, cut to the real audio, to [text, frames].

    A frame that says nothing, as the only one of very short audio, counts as 0.
    """
    weights = scores.softmax(dim=-1)
    deviation, mean = torch.std_mean(weights, dim=-2, keepdim=True, correction=0)
    return _median_filtered(((weights - mean) / deviation).nan_to_num(0.0)).mean(dim=0)


def _median_filtered(weights: Tensor) -> Tensor:
    half = MEDIAN_FILTER_WIDTH // 2
    if weights.shape[-1] <= half:
        return weights
    padded = functional.pad(weights, (half, half, 0, 0), mode="reflect")
    return padded.unfold(-1, MEDIAN_FILTER_WIDTH, 1).median(dim=-1).values


def token_times(
    tokens: Sequence[int], starts: Sequence[float], probabilities: Sequence[float]
) -> tuple[TokenTime, ...]:
    """A token starts where the path first reaches it and ends where the next one starts; ``starts`` has one more."""
    edges_s = [frame / ENCODER_STATES_PER_S for frame in starts]
    return tuple(
        TokenTime(token=token, start_s=edges_s[index], end_s=edges_s[index + 1], probability=probability)
        for index, (token, probability) in enumerate(zip(tokens, probabilities, strict=True))
    )

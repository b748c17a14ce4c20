"""The number of windows that fit on a device. Pure."""

from __future__ import annotations

from whisperd.engine.checkpoints import Shape
from whisperd.errors import OutOfMemory

SLOTS_MAX = 128  # beyond it the weights are read for so many rows at once that more gain less than a twentieth
ENCODE_WINDOWS = 8  # windows that are encoded together
LOGIT_COPIES = 8  # float32 rows of the vocabulary that the token rules hold at the same time
KEPT_SHARE = 8  # for so many slots one more keeps the audio of a window that may come again: load leaves no slot free
SPARE = 0.1  # of the budget: fragments of the allocator, and what libraries keep for themselves


def weight_bytes(shape: Shape, item_bytes: int) -> int:
    """Bytes of all weights."""
    width, hidden = shape.width, shape.hidden
    encoder_layer = 4 * width * width + 2 * width * hidden
    decoder_layer = 8 * width * width + 2 * width * hidden
    convolutions = 3 * width * (shape.n_mels + width)
    embeddings = width * (shape.vocabulary_size + shape.positions + shape.frames)
    layers = shape.encoder_layers * encoder_layer + shape.decoder_layers * decoder_layer
    return item_bytes * (layers + convolutions + embeddings)


def ahead(slots: int) -> int:
    """How many windows wait inside an engine beside those in its rows: as many as it encodes together."""
    return min(slots, ENCODE_WINDOWS)


def kept(slots: int) -> int:
    """How many windows more than ``slots`` keep their audio on the device."""
    return slots // KEPT_SHARE


def audio_bytes(shape: Shape, item_bytes: int) -> int:
    """Bytes of the keys and values of one window's audio."""
    return 2 * shape.decoder_layers * shape.frames * shape.width * item_bytes


def slot_bytes(shape: Shape, item_bytes: int, audio_item_bytes: int = 0) -> int:
    """Bytes of one slot: keys and values of the audio (other items than the rest, if given) and of the text, and its
    row of logits.
    """
    text_bytes = padding_bytes(shape, item_bytes)
    return audio_bytes(shape, audio_item_bytes or item_bytes) + text_bytes + LOGIT_COPIES * 4 * shape.vocabulary_size


def padding_bytes(shape: Shape, item_bytes: int) -> int:
    """Bytes of the one row that pads steps."""
    return 2 * shape.decoder_layers * shape.positions * shape.width * item_bytes


def workspace_bytes(shape: Shape, item_bytes: int) -> int:
    """Bytes that encoding needs for a moment: the widest layer and its input, twice, for each window."""
    return ENCODE_WINDOWS * 2 * shape.frames * 2 * (shape.hidden + 4 * shape.width) * item_bytes


def slots(shape: Shape, item_bytes: int, budget_bytes: int, *, audio_item_bytes: int = 0, most: int = SLOTS_MAX) -> int:
    """How many slots a budget holds beside weights and workspace; raises OutOfMemory when not even one fits."""
    fixed = weight_bytes(shape, item_bytes) + workspace_bytes(shape, item_bytes) + padding_bytes(shape, item_bytes)
    room = int(budget_bytes * (1 - SPARE)) - fixed
    one_bytes = slot_bytes(shape, item_bytes, audio_item_bytes)
    kept_bytes = audio_bytes(shape, audio_item_bytes or item_bytes)
    found = min(most, int(room / (one_bytes + kept_bytes / KEPT_SHARE)))
    if found < 1 and room >= one_bytes:
        return 1
    if found < 1:
        needed = int((fixed + one_bytes) / (1 - SPARE))
        raise OutOfMemory(
            f"the model needs {needed / 1e9:.1f} GB on the device, and {budget_bytes / 1e9:.1f} GB are free"
        )
    return found

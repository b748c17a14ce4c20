"""How many windows each model decodes at the same time, by the memory of the GPU: derived, not measured.

    python -m benchmarks.gpu.sizing

prints the table of docs/gpu.md. It needs neither a GPU nor PyTorch.
"""

from __future__ import annotations

from benchmarks.random_whisper import SHAPES
from whisperd.engine.checkpoints import Shape
from whisperd.engine.cuda import memory
from whisperd.errors import OutOfMemory

SIZES_GB = (8, 12, 16, 24, 48, 80, 141)
MODELS = ("tiny", "base", "small", "medium", "large-v3", "large-v3-turbo", "distil-large-v3")
FREE = 0.95  # of a GPU's memory, when nothing else uses it: the driver and PyTorch take the rest
HALF_BYTES, FP8_BYTES = 2, 1


def table() -> str:
    """Slots in float16, and with ``engine.fp8_cross`` where that holds more."""
    head = "| model | " + " | ".join(f"{size} GB" for size in SIZES_GB) + " |"
    rule = "|---" * (1 + len(SIZES_GB)) + "|"
    lines = [f"| {name} | " + " | ".join(_cell(SHAPES[name], size) for size in SIZES_GB) + " |" for name in MODELS]
    return "\n".join([head, rule, *lines])


def _cell(shape: Shape, size_gb: int) -> str:
    half, small = (_slots(shape, size_gb, item_bytes) for item_bytes in (HALF_BYTES, FP8_BYTES))
    return f"{half}" if half == small else f"{half} ({small})"


def _slots(shape: Shape, size_gb: int, audio_item_bytes: int) -> int:
    try:
        return memory.slots(shape, HALF_BYTES, int(FREE * size_gb * 1e9), audio_item_bytes=audio_item_bytes)
    except OutOfMemory:
        return 0


if __name__ == "__main__":
    print(table())

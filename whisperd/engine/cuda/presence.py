"""Whether this machine has a GPU that PyTorch can use, and if not, what is missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path

DEVICE_NODES = ("/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/kfd", "/dev/dxg")  # NVIDIA, Jetson, AMD, Windows' WSL


def absence(nodes: tuple[str, ...] = DEVICE_NODES) -> str | None:
    """What is missing for a GPU at first sight, or None. Cheap, and leaves the GPU's libraries out of this process."""
    if not any(Path(node).exists() for node in nodes):
        return "this machine shows no GPU: its driver is not loaded, or the container was started without the device"
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed: pip install 'whisperd[cuda]'"
    return None


def obstacle(nodes: tuple[str, ...] = DEVICE_NODES) -> str | None:
    """None when a GPU can be used; else what is missing. Asks PyTorch, which then stays in this process."""
    if (missing := absence(nodes)) is not None:
        return missing
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return f"PyTorch {torch.__version__} was built for the CPU: install a build for CUDA or ROCm"
    if not torch.cuda.is_available():
        return (
            f"PyTorch {torch.__version__} finds no usable GPU: its driver may be older than CUDA {torch.version.cuda}"
        )
    return None

"""Whether this machine has a GPU that PyTorch can use, and if not, what is missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path

DEVICE_NODES = ("/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/kfd", "/dev/dxg")  # NVIDIA, Jetson, AMD, Windows' WSL


def obstacle(nodes: tuple[str, ...] = DEVICE_NODES) -> str | None:
    """None when a GPU can be used; else what is missing. Cheap on machines without one: torch is asked last."""
    if not any(Path(node).exists() for node in nodes):
        return "this machine shows no GPU: its driver is not loaded, or the container was started without the device"
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed: pip install 'whisperd[cuda]'"
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return f"PyTorch {torch.__version__} was built for the CPU: install a build for CUDA or ROCm"
    if not torch.cuda.is_available():
        runtime = f"CUDA {torch.version.cuda}" if torch.version.hip is None else f"ROCm {torch.version.hip}"
        return (
            f"PyTorch {torch.__version__} finds no usable GPU: its driver may be older than {runtime}, the GPU too "
            "old for this build, or CUDA_VISIBLE_DEVICES hides it"
        )
    return None

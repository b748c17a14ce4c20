"""Whether this machine has a GPU that PyTorch can use, and if not, what is missing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Mapping, MutableMapping
from pathlib import Path

C_COMPILERS = ("gcc", "clang", "cc")
FP8_CAPABILITY = (8, 9)  # Ada; Triton converts no 8-bit floats for older ones
DEVICE_NODES = ("/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/kfd", "/dev/dxg")  # NVIDIA, Jetson, AMD, Windows' WSL


def absence(nodes: tuple[str, ...] = DEVICE_NODES) -> str | None:
    """What is missing for a GPU, or None. Cheap: loads no library of the GPU into this process."""
    if not any(Path(node).exists() for node in nodes):
        return "this machine shows no GPU: its driver is not loaded, or the container was started without the device"
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed: pip install 'whisperd[cuda]'"
    return None


def obstacle(nodes: tuple[str, ...] = DEVICE_NODES) -> str | None:
    """What is missing for a GPU, or None. Imports PyTorch."""
    if (missing := absence(nodes)) is not None:
        return missing
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


def fp8_obstacle(capability: tuple[int, int], *, hip: bool) -> str | None:
    """What a GPU of this compute capability lacks to convert 8-bit floats while it loads them, or None."""
    if hip:
        return "the 8-bit floats of AMD's GPUs are others"
    if capability < FP8_CAPABILITY:
        needed, found = (".".join(map(str, pair)) for pair in (FP8_CAPABILITY, capability))
        return f"this GPU has compute capability {found}, and 8-bit floats need {needed} (Ada, Hopper or newer)"
    return None


def set_kernel_cache(work_dir: Path, environ: MutableMapping[str, str] = os.environ) -> None:
    """Has Triton keep compiled kernels in ``work_dir``, unless TRITON_CACHE_DIR says where.

    Its own choice is the home directory, which a service cannot write to. Call it before the first kernel is launched.
    """
    environ.setdefault("TRITON_CACHE_DIR", str(work_dir / "triton"))


def kernel_obstacle(environ: Mapping[str, str] = os.environ, include: str | None = None) -> str | None:
    """What Triton lacks to compile kernels on this machine, or None.

    Besides its own compiler for the GPU it needs a C compiler and Python's headers: at the first launch of a kernel it
    builds a small extension module that calls the driver.

    Args:
        environ: ``CC`` names the compiler, as Triton reads it; else ``PATH`` is searched.
        include: the directory of ``Python.h``; None: that of this Python.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    compiler = environ.get("CC")
    names = [compiler] if compiler else list(C_COMPILERS)
    if not any(shutil.which(name, path=environ.get("PATH")) for name in names):
        return f"Triton needs a C compiler ({' or '.join(names)}): install gcc"
    headers = Path(include or sysconfig.get_paths()["include"]) / "Python.h"
    if not headers.is_file():
        return f"Triton needs Python's headers, and {headers} is missing: install python3-dev"
    return None

"""Every failure of PyTorch, CUDA and Triton becomes an error of whisperd, and a full memory is recognised."""

from __future__ import annotations

import importlib
import inspect
import subprocess

import pytest

from whisperd.errors import EngineError, OutOfMemory

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from whisperd.engine.cuda.failures import is_ours, translated

# what these libraries raise while a model is loaded or runs; their other classes belong to parts that are not used
TORCH = ("OutOfMemoryError", "AcceleratorError")
TRITON_MODULES = ("triton.errors", "triton.runtime.errors", "triton.compiler.errors")

FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError("std::bad_alloc"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
]
BROKEN = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
    RuntimeError("Failed to find C compiler."),
    subprocess.CalledProcessError(1, ["gcc", "main.c"]),
    PermissionError(13, "Permission denied", "/nonexistent/.triton"),
    RuntimeError("out of resource: shared memory, Required: 300000, Hardware limit: 232448"),
]


@pytest.mark.parametrize("error", FULL, ids=str)
def test_full_memory(error: Exception) -> None:
    """A failed allocation is OutOfMemory, so that the batch is halved."""
    with pytest.raises(OutOfMemory, match="not enough memory"), translated():
        raise error


@pytest.mark.parametrize("error", BROKEN, ids=str)
def test_other_failures(error: Exception) -> None:
    """A failure that halving does not help is an engine failure with the library's words."""
    with pytest.raises(EngineError) as caught, translated():
        raise error
    assert not isinstance(caught.value, OutOfMemory)
    assert str(error) in str(caught.value)


def test_full_memory_behind_another_failure() -> None:
    """An error that ends a capture hides its cause; the first cause decides."""
    hidden = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    hidden.__context__ = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(OutOfMemory), translated():
        raise hidden


def test_own_errors_are_not_translated() -> None:
    """An error of our own code, such as a KeyError, is not translated into a failure of the device."""
    with pytest.raises(KeyError), translated():
        raise KeyError("row")


@pytest.mark.parametrize("name", TORCH)
def test_classes_of_pytorch(name: str) -> None:
    """The classes that PyTorch has for failures of a device are translated."""
    found = getattr(torch, name, torch.OutOfMemoryError)
    assert is_ours(found.__new__(found))


def test_classes_of_triton() -> None:
    """All classes that Triton has for failures of compilation and launch are translated, in the installed version."""
    pytest.importorskip("triton", reason="Triton is not installed")
    modules = [importlib.import_module(name) for name in TRITON_MODULES]
    classes = {
        member
        for module in modules
        for _, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, Exception)
    }
    names = {one.__name__ for one in classes}
    assert {"OutOfResources", "PTXASError", "CompilationError"} <= names
    assert [one for one in classes if not is_ours(one.__new__(one))] == []
